"""`sluiceway dlq`: look at dead letters, send them back, or delete them."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import click
import msgspec

from .._decisions.topics import check_topic, matches
from ..app import App
from ..errors import PublishError
from .dead import Chosen, Letter, batches, choose, read, replay, there, topics_of
from .exits import GAVE_UP, Fault
from .find import check_shared, find_broker
from .progress import Bar
from .show import Detail, letter_text, table_of
from .words import ask, clean, many, nearest

WHERE = """\b
TOPIC is a dead-letter topic (payments.shop.dead), a consumer's name, or the
topic that was consumed. Which broker: --url, else SLUICEWAY_URL, else that of
--app, SLUICEWAY_APP, the app in pyproject.toml or in this folder, else
sqlite:///sluiceway.db here."""

GROUP_EPILOG = f"""\b
Examples:
  sluiceway dlq list payments
  sluiceway dlq show payments --id 3f9ac01b77-2a
  sluiceway dlq replay payments --limit 10
  sluiceway dlq purge payments --id 3f9ac01b77-2a --yes

{WHERE}"""

Command = Callable[..., Any]


def _options(command: Command) -> Command:
    """The options that every command here has."""
    for option in (
        click.option("as_json", "--json", is_flag=True, help="Print JSON, one object per line."),
        click.option("--exact", is_flag=True, help="TOPIC is the dead-letter topic itself, whatever it is called."),
        click.option("--group", metavar="NAME", help="The group that failed; the app's group unless given."),
        click.option("reference", "--app", metavar="MODULE:APP", help="The app whose broker and consumers they are."),
        click.option("--url", metavar="URL", help="The broker."),
    ):
        command = option(command)
    return command


def _changing(command: Command) -> Command:
    """The options of the commands that change something."""
    for option in (
        click.option("--yes", "-y", is_flag=True, help="Do not ask."),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
        click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many, the oldest first."),
        click.option(
            "ids", "--id", multiple=True, metavar="ID", help="Only this one, as `dlq list` shows it. Repeatable."
        ),
    ):
        command = option(command)
    return command


@click.group(epilog=GROUP_EPILOG, short_help="List, show, replay or purge dead letters.")
def dlq() -> None:
    """Look at dead letters, send them back to where they failed, or delete them."""


@dlq.command(
    name="list", epilog=f"\b\nExamples:\n  sluiceway dlq list payments\n  sluiceway dlq list --json | jq .id\n\n{WHERE}"
)
@click.argument("topic", required=False)
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True, metavar="N", help="0 lists all.")
@_options
def list_(
    topic: str | None, limit: int, url: str | None, reference: str | None, group: str | None, exact: bool, as_json: bool
) -> None:
    """List dead letters, the oldest first. Without TOPIC: those of every consumer of the app."""
    app, wanted = _target(topic, url, reference, group, exact)

    async def work(topics: tuple[str, ...]) -> None:
        for name in topics:
            await _list(app, name, limit, as_json)

    _run(app, wanted, work)


async def _list(app: App, topic: str, limit: int, as_json: bool) -> None:
    shown: list[Letter] = []
    errors: Counter[str] = Counter()
    async for letter in read(app, topic):
        errors[letter.why("type") or "unknown"] += 1
        if not limit or errors.total() <= limit:
            if as_json:
                click.echo(msgspec.json.encode(Detail.of(letter, topic, body=False)).decode())
            else:
                shown.append(letter)
    if as_json:
        return
    if not shown:
        click.echo(f"{topic}: no dead letters")
        return
    click.echo(table_of(shown), nl=False)
    counts = ", ".join(f"{clean(name)} {count:,}" for name, count in errors.most_common(5))
    part = "" if errors.total() == len(shown) else f", the oldest {len(shown):,} shown (--limit 0 for all)"
    click.echo(f"{topic}: {many(errors.total(), 'dead letter')}{part}: {counts}")


@dlq.command(epilog=f"\b\nExample:\n  sluiceway dlq show payments --id 3f9ac01b77-2a\n\n{WHERE}")
@click.argument("topic")
@click.option(
    "ids", "--id", multiple=True, required=True, metavar="ID", help="Which, as `dlq list` shows it. Repeatable."
)
@_options
def show(
    topic: str,
    ids: tuple[str, ...],
    url: str | None,
    reference: str | None,
    group: str | None,
    exact: bool,
    as_json: bool,
) -> None:
    """Show dead letters whole: why, headers, body, traceback."""
    app, wanted = _target(topic, url, reference, group, exact)

    async def work(topics: tuple[str, ...]) -> None:
        found = 0
        for name in topics:
            async for letter in read(app, name):
                if letter.stored.id in ids:
                    found += 1
                    detail = Detail.of(letter, name, body=True)
                    click.echo(msgspec.json.encode(detail).decode() if as_json else letter_text(letter, name))
        if not found:
            raise Fault(f"no dead letter in {', '.join(topics)} has the id {' or '.join(ids)}")

    _run(app, wanted, work)


REPLAY_EPILOG = f"""\b
Examples:
  sluiceway dlq replay payments
  sluiceway dlq replay payments --id 3f9ac01b77-2a --to payments.repair --yes

A message is published first and deleted from the dead letters then, so that a kill between the two repeats it and loses
nothing. It goes to the topic it came from, for the group that failed and no other, with its id, key and headers, and
with its attempts at 1; with --to it goes to every group of that topic. What fails meanwhile is not replayed again.

{WHERE}"""


@dlq.command(name="replay", epilog=REPLAY_EPILOG)
@click.argument("topic")
@click.option("--to", metavar="TOPIC", help="Publish to this topic instead, for every group that reads it.")
@_changing
@_options
def replay_(
    topic: str,
    to: str | None,
    ids: tuple[str, ...],
    limit: int | None,
    dry_run: bool,
    yes: bool,
    url: str | None,
    reference: str | None,
    group: str | None,
    exact: bool,
    as_json: bool,
) -> None:
    """Send dead letters back to where they failed."""
    if to is not None:
        check_topic(to, pattern=False)
    app, wanted = _target(topic, url, reference, group, exact)
    if to is not None:
        _refuse_misspelt(app, to)

    async def work(topics: tuple[str, ...]) -> None:
        if to in topics:
            raise Fault(f"{to} is the dead-letter topic itself")
        chosen = await _chosen(app, topics, ids, limit, to)
        ways = ", ".join(f"{count:,} to {clean(name)}" for name, count in chosen.where.items())
        if chosen.homeless:
            text = (
                f"{many(chosen.homeless, 'message does', 'messages do')} not say where from; --to TOPIC says where to"
            )
            click.echo(text, err=True)
        if not chosen.where:
            _report(as_json, f"nothing to replay in {', '.join(topics)}", replayed=0, left=chosen.count)
        elif dry_run:
            _report(as_json, f"would replay {ways}", would_replay=chosen.count - chosen.homeless, to=chosen.where)
        elif ask(f"Replay {ways}?", yes=yes):
            await _replay(app, chosen, to, as_json)
        else:
            click.echo("nothing was replayed", err=True)
        if chosen.homeless and not dry_run:
            raise click.exceptions.Exit(GAVE_UP)

    _run(app, wanted, work)


def _refuse_misspelt(app: App, to: str) -> None:
    """A replay deletes what it has published: it is not put where perhaps nobody looks."""
    read = [name for one in app.consumers.values() for name in one.topics]
    near = None if any(matches(pattern, to) for pattern in read) else nearest(to, read)
    if near is not None:
        raise Fault(
            f"no consumer of the app reads {to!r}; did you mean {near!r}? Nothing was replayed. "
            "If you do mean it, give --url instead of the app"
        )


async def _replay(app: App, chosen: Chosen, to: str | None, as_json: bool) -> None:
    done = left = 0
    try:
        with Bar(chosen.count) as bar:
            async for batch in batches(app, chosen):
                sent, homeless = await replay(app, batch, to)
                done, left = done + sent, left + homeless
                bar.advance(len(batch), done)
    except PublishError as error:
        raise Fault(f"{error}; {done:,} or more were replayed, the rest are dead letters still", GAVE_UP) from None
    except asyncio.CancelledError:
        click.echo(f"{many(done, 'message')} replayed before that; the rest are dead letters still", err=True)
        raise
    gone = chosen.count - done - left
    more = f"; {gone:,} were gone by then" if gone else ""
    _report(as_json, f"{many(done, 'message')} replayed{more}", replayed=done, left=left, gone=gone)


PURGE_EPILOG = f"""\b
Examples:
  sluiceway dlq purge payments --dry-run
  sluiceway dlq purge payments --limit 100 --yes

What is deleted is gone. What arrives meanwhile is kept.

{WHERE}"""


@dlq.command(epilog=PURGE_EPILOG)
@click.argument("topic")
@_changing
@_options
def purge(
    topic: str,
    ids: tuple[str, ...],
    limit: int | None,
    dry_run: bool,
    yes: bool,
    url: str | None,
    reference: str | None,
    group: str | None,
    exact: bool,
    as_json: bool,
) -> None:
    """Delete dead letters for good."""
    app, wanted = _target(topic, url, reference, group, exact)

    async def work(topics: tuple[str, ...]) -> None:
        chosen = await _chosen(app, topics, ids, limit, None)
        what = f"{many(chosen.count, 'dead letter')} of {', '.join(topics)}"
        if not chosen.count:
            _report(as_json, f"nothing to delete in {', '.join(topics)}", deleted=0)
        elif dry_run:
            _report(as_json, f"would delete {what}", would_delete=chosen.count)
        elif ask(f"Delete {what} for good?", yes=yes):
            deleted = 0
            with Bar(chosen.count) as bar:
                async for batch in batches(app, chosen):
                    await app.transport.remove([letter.stored for letter in batch])
                    deleted += len(batch)
                    bar.advance(len(batch), deleted)
            _report(as_json, f"{many(deleted, 'dead letter')} deleted", deleted=deleted)
        else:
            click.echo("nothing was deleted", err=True)

    _run(app, wanted, work)


# -- what they share -------------------------------------------------------------------------------------------------


def _target(
    topic: str | None, url: str | None, reference: str | None, group: str | None, exact: bool
) -> tuple[App, tuple[str, ...]]:
    """The app and the dead-letter topics that the arguments mean."""
    app = find_broker(reference, url, consumers=True)
    check_shared(app, "its dead letters")
    return app, topics_of(app, topic, group, exact=exact)


async def _chosen(app: App, topics: Sequence[str], ids: Sequence[str], limit: int | None, to: str | None) -> Chosen:
    chosen = await choose(app, topics, ids, limit, to)
    if chosen.missing:
        raise Fault(f"no dead letter in {', '.join(topics)} has the id {', '.join(chosen.missing)}; nothing was done")
    return chosen


def _run(app: App, wanted: Sequence[str], work: Callable[[tuple[str, ...]], Coroutine[Any, Any, None]]) -> None:
    """Connect, and work on the dead-letter topics that there are for the wanted ones."""

    async def connected() -> None:
        async with app:
            await work(await there(app, wanted))

    asyncio.run(connected())


def _report(as_json: bool, text: str, **counts: Any) -> None:
    click.echo(msgspec.json.encode(counts).decode() if as_json else text)
    sys.stdout.flush()
