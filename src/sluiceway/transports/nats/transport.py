"""The transport: connects, publishes, subscribes, shows dead letters."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

from ..._decisions.topics import check_topic, is_pattern
from ...errors import OptionError, PublishError, TransportError
from ...message import Outgoing, Stored
from ...source import Subscription
from ...transport import Features, Finding
from .answers import ApiError
from .connection import Connection
from .consumers import Consumers
from .headers import read_headers, stored_at
from .publishing import RESERVE, Publisher
from .settings import Settings, from_url
from .source import NATSSource
from .streams import NOTE, Streams, subject_of

ALL_NOTES = f"{NOTE}>"


class NATSTransport:
    """NATS JetStream, 2.9 or newer.

    - `servers`: one `host:port` or several.
    - `tls`: refuse servers without TLS. `ca_file`, `cert_file` and `key_file` are PEM files, and mean the same;
      `server_name` is the name that the server's certificate must have.
    - `user` and `password`, or `token`, or `credentials` (a .creds file), or `nkey` (a file with a seed).
    - `stream`: gets the topics that no stream has; made when it is not there, with `replicas` and `max_age` (seconds
      that it keeps messages, handled or not; 0: for ever).
    - `lease`: seconds that a delivery is ours without renewal, for consumers that are made or differ.
    - `max_delayed`: how many messages of a consumer may be held or wait for their delay; a retry with a delay beyond
      them is refused until there is room.

    Raises OptionError for a value that is not allowed.
    """

    def __init__(self, servers: str | Sequence[str] = "127.0.0.1:4222", **options: Any) -> None:
        hosts = (servers,) if isinstance(servers, str) else tuple(servers)
        self._settings = Settings(servers=hosts, **options)
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._sources: list[NATSSource] = []
        self.features = _features(1024 * 1024)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """A transport for `nats://[user:password@|token@]host[:port][,host…][?option=value]`, or `tls://`. Raises
        OptionError that says what is wrong with the URL."""
        return cls(**from_url(url))

    def __repr__(self) -> str:
        return f"NATSTransport({self._settings.where()})"

    async def connect(self) -> None:
        """Connect to one of the servers. Idempotent. Raises ConnectError: unreachable, refused, no TLS, too old."""
        async with self._connecting:
            if self._connection is None:
                connection = Connection(self._settings)
                await connection.open()
                self._connection = connection
                self._streams = Streams(connection)
                self._consumers = Consumers(connection)
                self._publisher = Publisher(connection, self._streams)
                self.features = _features(connection.max_payload)

    @property
    def _open(self) -> Connection:
        if self._connection is None:
            raise TransportError(
                f"the NATS transport of {self._settings.where()} is not connected; await connect() first"
            )
        return self._connection

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        """Make the streams and consumers, or say which are missing, and what in them endangers messages."""
        connection = self._open
        findings: list[Finding] = []
        used: list[str] = []
        if create:
            await self._streams.cover(ALL_NOTES)
        for subscription in subscriptions:
            _check_topics(subscription)
            group = subscription.group
            for topic in subscription.topics:
                places = await self._streams.places(topic, create=create)
                used += [stream for stream, _ in places]
                if not places:
                    findings.append(Finding("error", f"no stream has {topic!r}; start once with create to make it"))
                for stream, subject in places:
                    if create:
                        _, found = await self._consumers.consume(stream, subject, group, topic, subscription.start)
                        findings += found
                    elif await self._consumers.missing(stream, subject, group, topic):
                        text = f"group {group!r} has no consumer for {topic!r} on stream {stream!r}"
                        findings.append(Finding("error", f"{text}; start once with create to make it"))
        findings += await self._streams.check(used)
        await connection.settled()
        return findings

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish in order; stored by their streams when it returns. Raises PublishError with those that are not
        confirmed, PayloadTooLarge before anything is sent, and OptionError for a topic that cannot be."""
        connection = self._open
        if messages:
            try:
                await connection.ready(5)
            except TransportError as error:
                raise PublishError.unconfirmed(messages, len(messages), error) from error
            await self._publisher.publish(messages)

    async def subscribe(self, subscription: Subscription) -> NATSSource:
        """Open a source. The consumers exist when this returns. Raises OptionError for a topic that cannot be."""
        connection = self._open
        _check_topics(subscription)
        await connection.ready(5)
        await self._streams.cover(ALL_NOTES)
        source = NATSSource(connection, self._streams, self._publisher, subscription)
        await source.open()
        self._sources = [other for other in self._sources if not other.closed]
        for other in self._sources:
            if other.subscription.group == subscription.group and any(map(is_pattern, other.subscription.topics)):
                await other.resume()
        self._sources.append(source)
        return source

    async def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        """The messages of an exact topic, oldest first, from behind position `after`, handled or not. Consumes
        nothing. Raises OptionError for an `after` that is no position."""
        check_topic(topic, pattern=False)
        subject = subject_of(topic)
        since = _position(after) if after is not None else None
        for stream in sorted(await self._streams.having(subject)):
            if since is not None and stream < since[0]:
                continue
            seq = since[1] if since is not None and stream == since[0] else 0
            while True:
                try:
                    body = {"seq": seq + 1, "next_by_subj": subject}
                    found = (await self._open.api(f"STREAM.MSG.GET.{stream}", body))["message"]
                except ApiError as error:
                    if error.code == 404:
                        break
                    raise
                seq = found["seq"]
                yield _stored(topic, stream, found)

    async def remove(self, stored: Sequence[Stored]) -> None:
        """Delete messages that `browse` showed, for every group. One that is gone already is no error."""
        requests = []
        for one in stored:
            stream, seq = _position(one.position)
            requests.append((f"$JS.API.STREAM.MSG.DELETE.{stream}", b"", json.dumps({"seq": seq}).encode()))
        await self._open.ask(requests)

    async def aclose(self) -> None:
        """Close the sources that are still open, and the connection. Idempotent."""
        while self._sources:
            await self._sources.pop().aclose()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()


def _features(max_payload: int) -> Features:
    return Features.all_but(max_payload=max(1, max_payload - RESERVE), order="process", atomic=False)


def _stored(topic: str, stream: str, found: dict[str, Any]) -> Stored:
    envelope, _, _, stranger = read_headers(base64.b64decode(found.get("hdrs") or ""))
    return Stored(
        f"{stream}:{found['seq']}",
        topic,
        base64.b64decode(found.get("data") or ""),
        envelope.id or stranger or f"{stream}-{found['seq']}",
        envelope.key,
        envelope.headers,
        stored_at(found["time"]) if envelope.timestamp is None else envelope.timestamp,
    )


def _position(position: str) -> tuple[str, int]:
    stream, _, seq = position.rpartition(":")
    if not stream or not seq.isdigit():
        raise OptionError(f"{position!r} is no position in a NATS stream; use one that browse showed")
    return stream, int(seq)


def _check_topics(subscription: Subscription) -> None:
    if not subscription.topics:
        raise OptionError(f"the subscription of group {subscription.group!r} names no topic")
    for topic in subscription.topics:
        check_topic(topic, pattern=True)
