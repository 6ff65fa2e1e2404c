"""The entry point: `sluiceway` and `python -m sluiceway`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import SluicewayError
from .backlog import backlog
from .dlq import dlq
from .exits import INTERRUPTED, NO_READER, Fault, code_of, forget_stdout
from .inspect import inspect
from .publish import publish
from .run import run

EPILOG = """\b
Examples:
  sluiceway publish greetings '"Ada"'
  sluiceway run hello:app
  sluiceway run shop:app --workers 4 --set payments.concurrency=20
  sluiceway backlog shop:app
  sluiceway dlq list payments

\b
Environment:
  SLUICEWAY_URL  the broker, for every command; it wins over the app's own
  SLUICEWAY_APP  the app, as module:app, where none is named

\b
Every command takes --app module:app; those that are about an app as a whole
(run, inspect, backlog) take it as their argument too."""


class Commands(click.Group):
    """A group that names the nearest command for a misspelt one, and ends quietly when nobody reads its output."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            known = self.list_commands(ctx)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f". Known: {', '.join(known)}"
            raise click.UsageError(f"there is no command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            forget_stdout()
            raise click.exceptions.Exit(NO_READER) from None
        return result


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sluiceway", message="%(prog)s %(version)s")
def cli() -> None:
    """Run message consumers that pull only as fast as they can handle, and lose nothing."""


for command in (run, publish, inspect, backlog, dlq):
    cli.add_command(command)


def call(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments), prog_name="sluiceway", standalone_mode=False
        )
    except click.ClickException as error:
        error.show()
        return error.code if isinstance(error, Fault) else error.exit_code
    except SluicewayError as error:
        click.echo(f"Error: {error}", err=True)
        return code_of(error)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """What the console script calls."""
    sys.exit(call())
