"""`sluiceway run`: consumers in this process, or in N workers."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Sequence

import click
from msgspec import Struct

from ..app import App
from ..errors import OptionError, unknown
from ..message import DEFAULT_BATCHER
from . import logs
from .events import Started
from .exits import Fault
from .find import Found, app_once, find_app, is_private, wanted
from .lifeline import Lifeline
from .screen import JsonScreen, LogScreen, Screen, TerminalScreen, WireScreen
from .serve import Plan, Server, run_in_loop
from .topology import describe, file_of
from .words import is_terminal
from .workers import Workers

EPILOG = """\b
Examples:
  sluiceway run hello:app
  sluiceway run shop:app --workers 4 --set payments.concurrency=20
  sluiceway run shop:app --only payments --until-empty
  sluiceway run shop:app --json | jq .

\b
Without MODULE:APP the app is the one that SLUICEWAY_APP names, else
[tool.sluiceway] app = "shop:app" in pyproject.toml here or above, else the
module in this folder that says `app = App(...)`.

\b
Ctrl-C or SIGTERM drains: nothing new is taken, what runs is finished, the rest
goes back to the broker. A second one cancels what runs, a third leaves at once.

\b
Exit codes:
  0    drained well, or nothing was left with --until-empty
  1    a pipeline or a worker was given up, or the app's lifespan failed
  2    wrong use: no such app, option or consumer
  3    the broker cannot be reached, opened or trusted
  130  a second Ctrl-C cut the drain short (143: a second SIGTERM)
  141  nobody reads --json any more
  A handler that raises SystemExit(n) ends the app with n."""


class Settings(Struct, frozen=True, kw_only=True):
    """The command's options, as they are given on to workers."""

    reference: str | None
    until_empty: bool
    sets: tuple[str, ...]
    only: tuple[str, ...]
    url: str | None
    log_level: str
    gc_tuning: bool

    def command(self) -> list[str]:
        """The command line of one worker. The URL is not on it: other users can see the arguments of processes."""
        arguments = [sys.executable, "-m", "sluiceway", "run"]
        arguments += ["--until-empty"] if self.until_empty else []
        arguments += [part for one in self.sets for part in ("--set", one)]
        arguments += [part for one in self.only for part in ("--only", one)]
        arguments += ["--log-level", self.log_level]
        arguments += [] if self.gc_tuning else ["--no-gc-tuning"]
        return arguments + (["--", self.reference] if self.reference else [])


@click.command(epilog=EPILOG, short_help="Run an app's consumers.")
@click.argument("reference", metavar="[MODULE:APP]", required=False)
@click.option("named", "--app", metavar="MODULE:APP", help="The app; the same as the argument.")
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Run in N processes; one that dies is replaced."
)
@click.option("--until-empty", is_flag=True, help="Drain and end when nothing waits at the broker, not even a retry.")
@click.option(
    "sets", "--set", multiple=True, metavar="CONSUMER.OPTION=VALUE", help="Change an option of a consumer. Repeatable."
)
@click.option("--only", multiple=True, metavar="NAME", help="Run only this consumer. Repeatable.")
@click.option("--url", metavar="URL", help="The broker, instead of SLUICEWAY_URL and the app's own.")
@click.option("as_json", "--json", is_flag=True, help="Tell what happens as one JSON object per line.")
@click.option(
    "--log-level", type=click.Choice(logs.LEVELS, case_sensitive=False), default="info", show_default=True,
    help="The least that is logged, on standard error.",
)  # fmt: skip
@click.option(
    "--gc-tuning/--no-gc-tuning", default=True, show_default=True,
    help="Let Python collect garbage less often, which makes messages cheaper.",
)  # fmt: skip
def run(
    reference: str | None,
    named: str | None,
    workers: int | None,
    until_empty: bool,
    sets: tuple[str, ...],
    only: tuple[str, ...],
    url: str | None,
    as_json: bool,
    log_level: str,
    gc_tuning: bool,
) -> None:
    """Run an app's consumers until Ctrl-C, then drain."""
    reference = app_once(reference, named)
    lifeline = Lifeline.from_environment()
    settings = Settings(
        reference=reference,
        until_empty=until_empty,
        sets=sets,
        only=only,
        url=url,
        log_level=log_level,
        gc_tuning=gc_tuning,
    )
    screen = _screen(as_json, lifeline)
    try:
        found = find_app(reference, url)
        prepare(found.app, sets, only)
        console = screen.console if isinstance(screen, TerminalScreen) else None
        logs.configure(log_level, console=console, worker=lifeline)
        if workers is None:
            code = _serve(found, settings, screen, lifeline)
        else:
            code = _supervise(found, settings, screen, workers)
    finally:
        screen.close()
    click.get_current_context().exit(code)


def prepare(app: App, sets: Sequence[str], only: Sequence[str]) -> None:
    """Apply `--set` and check `--only`, and everything that a start would refuse. Raises Fault and OptionError."""
    definitions = wanted(app, only)
    for text in sets:
        _set(app, text)
    for definition in definitions:
        describe(app, definition)


def _set(app: App, text: str) -> None:
    target, equals, value = text.partition("=")
    name, dot, option = target.strip().rpartition(".")
    if not (equals and dot and name and option):
        raise OptionError(f"--set takes consumer.option=value, like payments.concurrency=20; got {text!r}")
    if name not in app.consumers:
        raise unknown("--set", name, app.consumers, "consumer")
    definition = app.consumers[name]
    definition.override(option, value.strip())
    if option in ("batch_size", "batch_timeout") and DEFAULT_BATCHER not in definition.batchers:
        raise OptionError(f"{name}: it has no default batcher, so {option} would change nothing")


def _screen(as_json: bool, lifeline: Lifeline | None) -> Screen:
    if lifeline is not None:
        return WireScreen(lifeline)
    if as_json:
        return JsonScreen()
    return TerminalScreen(sys.stderr) if is_terminal(sys.stderr) else LogScreen()


def _serve(found: Found, settings: Settings, screen: Screen, lifeline: Lifeline | None) -> int:
    if settings.gc_tuning:
        gc.set_threshold(50_000, 20, 100)
        gc.collect()
        gc.freeze()

    async def main() -> int:
        plan = Plan(names=settings.only, until_empty=settings.until_empty)
        return await Server(found, plan, screen, lifeline).run()

    return run_in_loop(main())


def _supervise(found: Found, settings: Settings, screen: Screen, count: int) -> int:
    app = found.app
    if is_private(app):
        raise Fault(f"{app.broker} is made anew in each process, so workers would share nothing; give a --url")
    if settings.url:
        os.environ["SLUICEWAY_URL"] = settings.url
    first = Started(
        app=found.reference,
        how=found.how,
        broker=app.broker,
        file=file_of(app),
        pid=os.getpid(),
        consumers=tuple(describe(app, app.consumers[name]) for name in settings.only or app.consumers),
    )

    async def main() -> int:
        return await Workers(settings.command(), count, screen, first, app.shutdown_timeout).run()

    return asyncio.run(main())
