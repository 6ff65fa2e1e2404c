"""The transport: one Redis server, as the event loop sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

from ..._decisions.topics import check_topic, is_pattern
from ...errors import OptionError, PayloadTooLarge, PublishError, TransportError, Unsupported
from ...message import Outgoing, Stored
from ...source import Subscription
from ...transport import Features, Finding
from .entries import MAX_HEADERS, fields_of, stored_of
from .groups import check_server, findings, info, make_group, missing
from .keys import Keys
from .scripts import DELAY
from .settings import Settings, check, parse
from .source import Limits, RedisSource
from .wire import Line, ReplyError, explained, refusal

_PAGE = 500  # messages per step of browse
_CHUNK = 1000  # messages, and bytes, published and not yet confirmed at a time
_CHUNK_BYTES = 8 * 1024 * 1024


class RedisTransport:
    """A Redis server (7.0 or later) or a Valkey server, without cluster.

    - `url`: `redis://[user:password@]host[:port][/db]`, or `rediss://` for TLS. Options may follow as `?lease=10`:
      those below, and for TLS `ca_file`, `cert_file` and `key_file` (ours), `server_name` (what the certificate says).
    - `lease`: seconds, 0.1 or more, that deliveries stay with a source that does not renew. So long it takes until
      others get what a killed process had in hand.
    - `max_payload`: bytes, the most one body may have.
    - `retention`: seconds that a message stays in its topic after every group has finished with it; inf: for ever.
      Programs that read a topic without a group are not seen, and may miss what is deleted.
    - `prefix`: how the keys begin that are not topics.

    What was written may be lost when the server crashes (`appendonly yes`, `appendfsync always` keep all) and when a
    replica takes over (`min-replicas-to-write` bounds it). Raises OptionError for a value that is not allowed.
    """

    def __init__(
        self,
        url: str | Settings,
        *,
        lease: float = 30.0,
        max_payload: int = 16 * 1024 * 1024,
        retention: float = 0.0,
        prefix: str = "sluiceway",
    ) -> None:
        check({"lease": lease, "max_payload": max_payload, "retention": retention, "prefix": prefix})
        options: dict[str, Any] = {}
        if isinstance(url, str):
            url, options = parse(url)
        if options:
            raise OptionError(f"RedisTransport: give {', '.join(options)} as arguments, or use from_url")
        self.features = Features.all_but(max_payload=max_payload, wildcards=False)
        self._settings = url
        self._keys = Keys(prefix)
        self._limits = Limits(lease=lease, max_payload=max_payload, retention=retention)
        self._line = Line(url)
        self._info: dict[str, str] | None = None
        self._sources: list[RedisSource] = []

    @classmethod
    def from_url(cls, url: str) -> Self:
        """A transport for a URL with its options. Raises OptionError that says what is wrong with the URL."""
        settings, options = parse(url)
        return cls(settings, **options)

    def __repr__(self) -> str:
        return f"RedisTransport({self._settings.name})"

    async def connect(self) -> None:
        """Reach the server. Idempotent. Raises ConnectError that says what to do."""
        if self._info is None:
            wire = await self._line.wire()
            found = await info(wire)
            check_server(wire, found)
            self._info = found

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        """Make the groups, or say which are missing; and say which of the server's settings endanger messages.

        Raises OptionError for a topic that cannot be, and Unsupported for a pattern.
        """
        _check_topics(subscriptions)
        wire = await self._line.wire()
        made = findings(await info(wire))
        for one in subscriptions:
            for topic in dict.fromkeys(one.topics):
                named = f"group {one.group!r} on the stream {topic!r}"
                if create and await make_group(wire, self._keys, topic, one.group, one.start):
                    made.append(Finding("info", f"made {named}"))
                elif not create and await missing(wire, topic, one.group):
                    made.append(Finding("error", f"there is no {named}; start once with create to make it"))
        return made

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish, in order, 1,000 at a time in one round trip; the server has them when it returns.

        Raises PayloadTooLarge and OptionError, and then publishes nothing; PublishError with those that the server
        refused or did not confirm: where the connection broke they may be there nevertheless.
        """
        self._check_sizes(messages)
        for message in messages:
            check_topic(message.topic, pattern=False)
        rest = list(messages)
        while rest:
            count, size = 0, 0
            while count < len(rest) and count < _CHUNK and (not count or size < _CHUNK_BYTES):
                size += len(rest[count].body)
                count += 1
            await self._publish(rest[:count], rest, len(messages))
            del rest[:count]

    async def _publish(self, some: list[Outgoing], rest: Sequence[Outgoing], total: int) -> None:
        try:
            commands = [self._command(message) for message in some]
            wire = await self._line.wire()
            answers = await wire.call(*commands)
            if (answer := answers[0]).__class__ is ReplyError and str(answer).startswith("READONLY"):
                raise refusal(wire, "publish", answer)
            failed = [one for one, answer in zip(some, answers, strict=True) if isinstance(answer, ReplyError)]
            if failed:
                why = next(answer for answer in answers if isinstance(answer, ReplyError))
                failed += rest[len(some) :]
                raise PublishError.unconfirmed(
                    failed, total, f"{wire.name} refused {failed[0].topic!r}: {explained(why)}"
                )
        except PublishError:
            raise
        except (TypeError, AttributeError) as error:
            raise PublishError.unconfirmed(rest, total, f"one is not as it must be ({error})") from error
        except TransportError as error:
            raise PublishError.unconfirmed(rest, total, error) from error

    def _command(self, message: Outgoing) -> tuple[Any, ...]:
        if message.delay > 0:
            return ("EVAL", DELAY.text, 0, self._keys.output(message))
        topic, group = message.topic, message.group
        return ("XADD", topic if group is None else self._keys.retry(topic, group), "*", *fields_of(message))

    def _check_sizes(self, messages: Sequence[Outgoing]) -> None:
        self.features.check_sizes(messages)
        many = [one for one in messages if len(one.headers) > MAX_HEADERS]
        if many:
            raise PayloadTooLarge(
                f"message {many[0].id} to {many[0].topic!r} has {len(many[0].headers)} headers and the limit is "
                f"{MAX_HEADERS}; nothing of the call was published",
                many,
            )

    async def subscribe(self, subscription: Subscription) -> RedisSource:
        """Open a source, with a connection of its own to read on. The group exists when this returns.

        Raises OptionError for a topic that cannot be, and Unsupported for a pattern.
        """
        _check_topics([subscription])
        source = RedisSource(self._settings, self._keys, self._line, subscription, self._limits)
        await source.open()
        self._sources = [other for other in self._sources if not other.closed]
        self._sources.append(source)
        return source

    async def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        """The messages in `topic`, oldest first, from behind position `after`. Consumes nothing.

        Shown is what the stream has, also what some groups or all have settled and what is not deleted yet. Raises
        OptionError for an `after` that is no position.
        """
        check_topic(topic, pattern=False)
        if after is not None and not all(part.isdigit() for part in after.split("-", 1)):
            raise OptionError(f"{after!r} is no position in a stream; use one that browse showed")
        position, count = "-" if after is None else f"({after}", 10
        wire = await self._line.wire()
        while page := await wire.ask("XRANGE", topic, position, "+", "COUNT", count):
            for entry in page:
                yield stored_of(entry, topic)
            position = f"({page[-1][0].decode()}"
            largest = max(sum(map(len, entry[1])) for entry in page)
            count = max(1, min(_PAGE, _CHUNK_BYTES // max(1, largest)))
            wire = await self._line.wire()

    async def remove(self, stored: Sequence[Stored]) -> None:
        """Delete messages that `browse` showed, for all groups. One that is gone is no error."""
        by_topic: dict[str, list[str]] = {}
        for one in stored:
            by_topic.setdefault(one.topic, []).append(one.position)
        for topic, positions in by_topic.items():
            await (await self._line.wire()).ask("XDEL", topic, *positions)

    async def aclose(self) -> None:
        """Close the sources that are still open, and the connection. Idempotent."""
        try:
            while self._sources:
                await self._sources.pop().aclose()
        finally:
            self._info = None
            self._line.close()


def _check_topics(subscriptions: Sequence[Subscription]) -> None:
    for subscription in subscriptions:
        if not subscription.topics:
            raise OptionError(f"the subscription of group {subscription.group!r} names no topic")
        for topic in subscription.topics:
            check_topic(topic, pattern=True)
            if is_pattern(topic):
                raise Unsupported(f"{topic!r} is a pattern, and Redis streams have none; name each topic")
