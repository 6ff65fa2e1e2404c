"""Dead letters: finding their topic, reading them, and what replay and purge do with them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence

import click
from msgspec import Struct

from .._decisions.policy import DEAD_PREFIX, without_dead_headers
from .._decisions.topics import best_match, check_topic, dead_letter_topic, is_dead_letter_topic, is_pattern, matches
from ..app import App
from ..consumer import ConsumerDef
from ..errors import PublishError, unknown
from ..message import Outgoing, Stored
from .exits import Fault
from .topology import group_of
from .words import hint

MOST_MESSAGES = 200  # of one publish and remove
MOST_BYTES = 4 * 1024 * 1024
LATEST = 253_402_300_800.0  # the year 10,000, in seconds since 1970: no later time can be written down


class Letter(Struct, frozen=True):
    """A dead letter with what its headers say; what they do not say is empty."""

    stored: Stored

    def why(self, name: str) -> str:
        """One of the headers that a dead letter has beyond its message's own."""
        return self.stored.headers.get(DEAD_PREFIX + name, "")

    @property
    def failed_at(self) -> float:
        """When it failed, seconds since 1970."""
        return _time(self.why("failed-at"), self.stored.timestamp)

    @property
    def published_at(self) -> float:
        """When its message was published, seconds since 1970."""
        return _time(self.why("published-at"), self.stored.timestamp)

    @property
    def attempts(self) -> int | None:
        """How many attempts its message had; None when that cannot be said."""
        said = self.why("attempts")
        return int(said) if said.isdecimal() and len(said) < 10 else None

    def age(self) -> float:
        return max(0.0, time.time() - self.failed_at)

    def again(self, to: str | None) -> Outgoing | None:
        """The message to publish: for the group that failed, or for whoever reads `to`; None when it cannot be said.

        Id, key, headers, body and time of publishing are the message's own; its attempts begin anew.
        """
        topic, group = (to, None) if to is not None else (self.why("topic"), self.why("group"))
        if not topic or (to is None and not group):
            return None
        return Outgoing(
            topic=topic,
            body=self.stored.body,
            key=self.stored.key,
            headers=without_dead_headers(self.stored.headers),
            id=self.stored.id,
            timestamp=self.published_at,
            group=group,
        )


class Chosen(Struct, frozen=True):
    """What a command is about: positions in each dead-letter topic, and what they are by destination."""

    positions: dict[str, frozenset[str]]
    where: dict[str, int]
    homeless: int
    missing: tuple[str, ...]

    @property
    def count(self) -> int:
        return sum(map(len, self.positions.values()))


def topics_of(app: App, name: str | None, group: str | None, *, exact: bool) -> tuple[str, ...]:
    """The dead-letter topics that a user means by `name`: one of them, a consumer, or a topic. Raises Fault.

    None means those of every consumer of the app. Those of a pattern are one pattern: `orders.*.shop.dead`.
    """
    if name is None:
        return _of_all(app)
    if exact or is_dead_letter_topic(name):
        known = {topic for one in app.consumers.values() for topic in _dead_topics(app, one)}
        if name not in known:
            hint(f"no consumer of the app has the dead-letter topic {name!r}", name, known)
        return (check_topic(name, pattern=False),)
    if name in app.consumers:
        return _of_consumer(app, name, group)
    own = [
        topic
        for one in app.consumers.values()
        if name in one.topics and group in (None, group_of(app, one))
        for topic in _dead_topics(app, one)
        if one.value("dead_letter_topic") or topic.startswith(f"{name}.{group_of(app, one)}")
    ]
    if own:
        return tuple(dict.fromkeys(own))
    if any(name in _dead_topics(app, one) for one in app.consumers.values()):
        return (name,)
    check_topic(name, pattern=False)
    by_pattern = [
        one.value("dead_letter_topic") or dead_letter_topic(name, group_of(app, one))
        for one in app.consumers.values()
        if group in (None, group_of(app, one)) and any(matches(topic, name) for topic in one.topics)
    ]
    if by_pattern:
        return tuple(dict.fromkeys(by_pattern))
    known = {*app.consumers, *(topic for one in app.consumers.values() for topic in one.topics)}
    if name not in known:
        hint(f"no consumer of the app is called {name!r} or reads that", name, known)
    return (dead_letter_topic(name, group or app.group),)


def _of_all(app: App) -> tuple[str, ...]:
    found = [topic for one in app.consumers.values() for topic in _dead_topics(app, one)]
    if not found:
        raise Fault(
            "name a dead-letter topic, a consumer or a topic, or the app with --app: here is none with consumers"
        )
    return tuple(dict.fromkeys(found))


def _of_consumer(app: App, name: str, group: str | None) -> tuple[str, ...]:
    definition = app.consumers[name]
    if group is not None and group != group_of(app, definition):
        raise unknown(name, group, [group_of(app, definition)], "group")
    return _dead_topics(app, definition)


def _dead_topics(app: App, definition: ConsumerDef) -> tuple[str, ...]:
    said = definition.value("dead_letter_topic")
    group = group_of(app, definition)
    return (said,) if said else tuple(dict.fromkeys(dead_letter_topic(topic, group) for topic in definition.topics))


async def there(app: App, topics: Sequence[str]) -> tuple[str, ...]:
    """`topics` with what there is at the broker in the place of patterns; one that nothing matches stays.

    Raises Fault where the broker cannot say what there is.
    """
    patterns = [topic for topic in topics if is_pattern(topic)]
    if not patterns:
        return tuple(topics)
    ask = getattr(app.transport, "dead_letter_topics", None)
    if ask is None:
        example = patterns[0].replace("*", "eu").replace("#", "eu")
        text = f"{app.broker} cannot say which topics match {', '.join(patterns)}: name one, like {example}"
        if len(patterns) == len(topics):
            raise Fault(text)
        click.echo(text, err=True)
        return tuple(topic for topic in topics if topic not in patterns)
    known = await ask()
    declared = {*topics, *(topic for one in app.consumers.values() for topic in _dead_topics(app, one))}
    found = [[one for one in known if _is_of(one, topic, declared)] or [topic] for topic in topics]
    return tuple(dict.fromkeys(one for ones in found for one in ones))


def _is_of(topic: str, pattern: str, declared: Iterable[str]) -> bool:
    """Whether the dead letters in `topic` are those of `pattern`, and not of a consumer that reads them more exactly.

    The last word, which no pattern matches, is left out.
    """
    best = best_match((one.removesuffix(".dead") for one in declared), topic.removesuffix(".dead"))
    return topic == pattern or best == pattern.removesuffix(".dead")


async def read(app: App, topic: str) -> AsyncIterator[Letter]:
    """The dead letters of a topic, oldest first; none of a pattern. Raises Fault where the broker cannot show them."""
    if is_pattern(topic):
        return
    if not app.transport.features.browse:
        raise Fault(f"{app.broker} cannot show messages at rest; read {topic} with a consumer")
    async for stored in app.transport.browse(topic):
        yield Letter(stored)


async def choose(app: App, topics: Sequence[str], ids: Sequence[str], limit: int | None, to: str | None) -> Chosen:
    """Fix what a command is about before it begins, so that what arrives meanwhile is left alone.

    A message that fails again while it is replayed comes back to the same topic: without this it would be replayed for
    ever. None in `ids` means all.
    """
    positions: dict[str, set[str]] = {topic: set() for topic in topics}
    where: dict[str, int] = {}
    homeless = left = 0
    found: set[str] = set()
    for topic in topics:
        async for letter in read(app, topic):
            if ids and letter.stored.id not in ids:
                continue
            found.add(letter.stored.id)
            if limit is not None and left >= limit:
                break
            left += 1
            again = letter.again(to)
            homeless += again is None
            if again is not None:
                target = again.topic if again.group is None else f"{again.topic} for group {again.group}"
                where[target] = where.get(target, 0) + 1
            positions[topic].add(letter.stored.position)
    missing = tuple(one for one in ids if one not in found)
    return Chosen({topic: frozenset(ones) for topic, ones in positions.items()}, where, homeless, missing)


async def batches(app: App, chosen: Chosen) -> AsyncIterator[list[Letter]]:
    """The chosen letters that are still there, in batches of a size that brokers like."""
    for topic, positions in chosen.positions.items():
        left = set(positions)
        batch: list[Letter] = []
        size = 0
        if not left:
            continue
        async for letter in read(app, topic):
            if letter.stored.position not in left:
                continue
            left.discard(letter.stored.position)
            batch.append(letter)
            size += len(letter.stored.body)
            if len(batch) >= MOST_MESSAGES or size >= MOST_BYTES or not left:
                yield batch
                batch, size = [], 0
            if not left:
                break
        if batch:
            yield batch


async def replay(app: App, batch: Sequence[Letter], to: str | None) -> tuple[int, int]:
    """Publish a batch again, then delete what was published; returns how many, and how many have no way back.

    Killed between the two, a message is in both places: at least once, never lost. Raises PublishError, with what the
    broker took deleted and the rest kept.
    """
    ways = [(letter.stored, again) for letter in batch if (again := letter.again(to)) is not None]
    if not ways:
        return 0, len(batch)
    try:
        await app.transport.publish([again for _, again in ways])
    except PublishError as error:
        failed = {id(one) for one in error.failed}
        taken = [stored for stored, again in ways if id(again) not in failed] if failed else []
        if taken:
            await app.transport.remove(taken)
        raise
    await app.transport.remove([stored for stored, _ in ways])
    return len(ways), len(batch) - len(ways)


def _time(text: str, otherwise: float) -> float:
    try:
        said = float(text)
    except ValueError:
        return otherwise
    return said if 0 <= said < LATEST else otherwise
