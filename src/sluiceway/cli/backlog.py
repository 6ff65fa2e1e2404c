"""`sluiceway backlog`: what waits at the broker for each consumer. No handler runs and nothing is received."""

from __future__ import annotations

import asyncio

import click
import msgspec
from msgspec import Struct

from ..app import App
from ..consumer import ConsumerDef
from ..errors import OptionError
from ..source import Backlog, Subscription
from .exits import GAVE_UP, Fault
from .find import app_once, check_shared, find_app, wanted
from .groups import missing, subscription_of
from .words import duration, heading, many

EPILOG = """\b
Examples:
  sluiceway backlog shop:app
  sluiceway backlog shop:app --only payments --max-messages 1000
  sluiceway backlog shop:app --json | jq .messages

What waits counts messages that wait for a delay or a retry, and not those that
a consumer has in hand. The seconds are the age of the oldest that is due; null
in JSON where the broker cannot tell it (RabbitMQ cannot).

\b
Exit codes:
  0  it is told, and within --max-messages and --max-seconds
  1  more waits than they allow, or what waits is not known and they are given
  2  wrong use: no such app or consumer
  3  the broker cannot be reached, opened or trusted"""


class Row(Struct, frozen=True, kw_only=True):
    """What waits for one consumer. `messages` is None when it is not known, and `why` says so; `seconds` is None then
    and where the broker cannot tell an age."""

    consumer: str
    topics: tuple[str, ...]
    group: str
    messages: int | None = None
    seconds: float | None = None
    why: str | None = None

    def is_over(self, messages: int | None, seconds: float | None) -> bool:
        """Whether more waits than is allowed; what is not known is."""
        limits = ((self.messages, messages), (self.seconds, seconds))
        return any(most is not None and (there is None or there > most) for there, most in limits)

    def __str__(self) -> str:
        if self.messages is None:
            return f"not known: {self.why}"
        if not self.messages:
            return "nothing waits"
        waiting = f"{many(self.messages, 'message')} waiting"
        if self.seconds is None:
            return f"{waiting}; the broker cannot tell for how long"
        return f"{waiting}, the oldest for {duration(self.seconds)}" if self.seconds else f"{waiting}, none of them due"


@click.command(epilog=EPILOG, short_help="Show what waits for each consumer.")
@click.argument("reference", metavar="[MODULE:APP]", required=False)
@click.option("named", "--app", metavar="MODULE:APP", help="The app; the same as the argument.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this consumer. Repeatable.")
@click.option("--max-messages", type=click.IntRange(min=0), metavar="N", help="End with 1 when more wait for one.")
@click.option(
    "--max-seconds", type=click.FloatRange(min=0), metavar="S", help="End with 1 when one has waited for longer."
)
@click.option("--url", metavar="URL", help="The broker, instead of SLUICEWAY_URL and the app's own.")
@click.option("as_json", "--json", is_flag=True, help="Print JSON, one object per line.")
def backlog(
    reference: str | None,
    named: str | None,
    only: tuple[str, ...],
    max_messages: int | None,
    max_seconds: float | None,
    url: str | None,
    as_json: bool,
) -> None:
    """Show how many messages wait at the broker for each consumer, and for how long. Nothing is run or received."""
    app = find_app(app_once(reference, named), url).app
    definitions = wanted(app, only)
    check_shared(app, "what waits")
    rows = asyncio.run(_ask(app, definitions))
    width = max(len(row.consumer) for row in rows)
    for row in rows:
        if as_json:
            click.echo(msgspec.json.encode(row).decode())
        else:
            click.echo(f"{heading(row.consumer)}{' ' * (width - len(row.consumer))}  {row}")
    if any(row.is_over(max_messages, max_seconds) for row in rows):
        raise click.exceptions.Exit(GAVE_UP)


async def _ask(app: App, definitions: list[ConsumerDef]) -> list[Row]:
    async with app:
        return [await _row(app, definition) for definition in definitions]


async def _row(app: App, definition: ConsumerDef) -> Row:
    subscription = subscription_of(app, definition)
    found: Backlog | None = None
    why = "this broker cannot say"
    if app.transport.features.backlog:
        absent = await missing(app, subscription)
        if absent:  # opening a source would make it, and decide where it begins
            why = f"{absent[0].partition(';')[0]}; the first run makes what is missing"
        else:
            found = await _backlog(app, definition.name, subscription)
    row = Row(consumer=definition.name, topics=definition.topics, group=subscription.group, why=why)
    if found is None:
        return row
    seconds = None if found.seconds is None else round(found.seconds, 3)
    return msgspec.structs.replace(row, messages=found.messages, seconds=seconds, why=None)


async def _backlog(app: App, name: str, subscription: Subscription) -> Backlog | None:
    try:
        source = await app.transport.subscribe(subscription)
    except OptionError as error:
        raise Fault(f"{name}: {error}") from None
    try:
        return await source.backlog()
    finally:
        await source.aclose()
