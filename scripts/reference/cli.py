"""The page of commands."""

from __future__ import annotations

from collections.abc import Iterator

import click

from sluiceway.cli.main import cli

HEAD = """\
# The command line

Made from the commands by `make docs`; each says the same of itself with `--help`.
"""

WIDTH = 100


def page() -> str:
    return "\n".join([HEAD, *(f"## {name}\n\n```text\n{text}\n```\n" for name, text in helps())])


def helps() -> Iterator[tuple[str, str]]:
    """Every command with its help, in the order in which they are shown."""
    yield from _helps(cli, "sluiceway", None)


def _helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH, "color": False}
    context = click.Context(command, parent, name, **settings)
    yield context.command_path, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    if isinstance(command, click.Group):
        for one in command.list_commands(context):
            found = command.get_command(context, one)
            if found is not None:
                yield from _helps(found, one, context)
