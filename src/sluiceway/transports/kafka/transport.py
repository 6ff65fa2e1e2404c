"""The transport: connects, publishes, subscribes, shows dead letters."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Self

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from ..._decisions.topics import check_topic, is_pattern
from ...errors import ConnectError, OptionError, PublishError, TransportError, Unsupported
from ...message import Outgoing, Stored
from ...source import Start, Subscription
from ...transport import Features, Finding
from .browsing import Shelf
from .member import Member, Place
from .partition import Partition
from .publishing import Parcel, Publisher
from .settings import Settings, from_url
from .source import KafkaSource
from .topics import Topics
from .wire import Record, key_bytes, retry_topic, topic_name, write_headers

log = logging.getLogger("sluiceway.kafka")

CONNECT_TIMEOUT = 5.0
_CLEAR = (KafkaError._AUTHENTICATION, KafkaError._SSL)


class KafkaTransport:
    """Apache Kafka.

    - `servers`: one `host:port` or several.
    - `tls`: speak TLS. `ca_file`, `cert_file` and `key_file` are PEM files; the first two mean the same.
    - `user` and `password`, by SASL; `mechanism` is PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.
    - `session_timeout`: seconds after which a member that is not heard of has lost its partitions.
    - `instance`: the name of a static member (`group.instance.id`): a restart within the session timeout moves no
      partitions. Each process needs its own.
    - `prefix`: stands before the names of all topics and groups.
    - `create`: make topics that are not there, with so many `partitions` and `replicas` (-1: what the server says).
    - `max_record`: bytes, the most a record may have; not more than the topics' `max.message.bytes`.

    Raises OptionError for a value that is not allowed.
    """

    def __init__(self, servers: str | Sequence[str] = "127.0.0.1:9092", **options: Any) -> None:
        hosts = (servers,) if isinstance(servers, str) else tuple(servers)
        self._settings = Settings(servers=hosts, **options)
        self._publisher: Publisher | None = None
        self._connecting = asyncio.Lock()
        self._joining = asyncio.Lock()
        self._members: dict[str, Member] = {}
        self._sources: set[KafkaSource] = set()
        self._forwards: set[asyncio.Task[None]] = set()
        self.features = Features(
            durable=True, retains=True, order="none", delay="topic", atomic=False, park=False, release=True,
            lease=False, max_payload=self._settings.max_payload, wildcards=False, browse=True, backlog=True,
            shares=False,
        )  # fmt: skip

    @classmethod
    def from_url(cls, url: str) -> Self:
        """A transport for `kafka://[user:password@]host[:port][,host…][?option=value]`, or `kafkas://` for TLS. Raises
        OptionError that says what is wrong with the URL."""
        return cls(**from_url(url))

    def __repr__(self) -> str:
        return f"KafkaTransport({self._settings.where()})"

    async def connect(self) -> None:
        """Connect to one of the servers. Idempotent. Raises ConnectError: unreachable, refused, no TLS."""
        async with self._connecting:
            if self._publisher is None:
                await asyncio.to_thread(_check, self._settings)
                self._topics = Topics(self._settings)
                self._shelf = Shelf(self._settings, self._topics)
                self._publisher = Publisher(self._settings, self._topics)

    @property
    def _open(self) -> Publisher:
        if self._publisher is None:
            raise TransportError(
                f"the Kafka transport of {self._settings.where()} is not connected; await connect() first"
            )
        return self._publisher

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        """Make the topics, those of retries too, and say where groups begin; or say which topics are missing."""
        _ = self._open
        findings: list[Finding] = []
        for one in subscriptions:
            places = self._places(one)
            if create:
                findings += [_missing(name) for name in await self._begin(one, places)]
            else:
                there = await asyncio.to_thread(self._topics.look)
                findings += [_missing(name) for name in places if name not in there]
        return findings

    def _places(self, subscription: Subscription) -> dict[str, Place]:
        if not subscription.topics:
            raise OptionError(f"the subscription of group {subscription.group!r} names no topic")
        prefix, places = self._settings.prefix, dict[str, Place]()
        for topic in dict.fromkeys(subscription.topics):
            check_topic(topic, pattern=True)
            if is_pattern(topic):
                raise Unsupported(f"{topic!r} is a pattern; this transport subscribes to topics by their names")
            places[topic_name(prefix, topic)] = (topic, False, subscription.start)
            places[topic_name(prefix, retry_topic(topic, subscription.group))] = (topic, True, "earliest")
        return places

    async def _begin(self, subscription: Subscription, places: dict[str, Place]) -> Sequence[str]:
        missing = await asyncio.to_thread(self._topics.cover, list(places))
        if not missing and subscription.group not in self._members:
            starts: dict[str, Start] = {name: start for name, (_, _, start) in places.items()}
            await asyncio.to_thread(self._topics.begin, subscription.group, starts)
        return missing

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish in order; all replicas in sync have them when it returns. Raises PublishError with those that are not
        confirmed, PayloadTooLarge before anything is sent, and OptionError for a topic that cannot be."""
        publisher = self._open
        await publisher.publish(publisher.parcels(messages))

    async def subscribe(self, subscription: Subscription) -> KafkaSource:
        """Open a source. The group exists when this returns. Raises OptionError or Unsupported for a topic that cannot
        be, TransportError for one that is not there."""
        publisher = self._open
        places = self._places(subscription)
        async with self._joining:
            missing = await self._begin(subscription, places)
            if missing:
                raise TransportError(_missing(missing[0]).text)
            member = self._members.get(subscription.group)
            if member is None or member.ended:
                member = Member(self._settings, self._topics, subscription.group, self._forward)
                self._members[subscription.group] = member
            source = KafkaSource(
                member, publisher, subscription, self._settings.prefix, self._shelf.backlog, self._leave
            )
            self._sources.add(source)
            await member.attach(source, places)
        return source

    async def _leave(self, source: KafkaSource, keep: Sequence[int]) -> None:
        async with self._joining:
            self._sources.discard(source)
            member = source.member
            if not await member.detach(source, keep):
                await member.close()
                if self._members.get(member.group) is member:
                    del self._members[member.group]

    def _forward(self, member: Member, partition: Partition, record: Record) -> None:
        """A message that is not due yet goes to the retries of the group."""
        task = asyncio.create_task(self._copy(member, partition, record))
        self._forwards.add(task)
        task.add_done_callback(self._forwards.discard)

    async def _copy(self, member: Member, partition: Partition, record: Record) -> None:
        topic = retry_topic(partition.topic, member.group)
        envelope = record.envelope
        identity = envelope.id or f"{partition.name}-{partition.number}-{record.offset}"
        out = Outgoing(topic, record.body, record.key, envelope.headers, identity, record.timestamp)
        headers = write_headers(out, due=record.due)
        parcel = Parcel(topic_name(self._settings.prefix, topic), out.body, key_bytes(out.key), headers, out)
        while not member.ended:
            try:
                await self._open.publish([parcel])
            except PublishError as error:
                log.warning("moving a delayed message to %r: %s; trying again in 1 s", topic, error)
                await asyncio.sleep(1)
                continue
            with suppress(TransportError):  # it has left meanwhile: another one moves it too
                member.call(lambda: partition.finish(record.offset))
            return

    async def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        """The messages of an exact topic from behind position `after`, handled or not, oldest first within a partition.
        Consumes nothing. Raises OptionError for an `after` that is no position."""
        check_topic(topic, pattern=False)
        _ = self._open
        while page := await asyncio.to_thread(self._shelf.page, topic, after):
            for one in page:
                yield one
            after = page[-1].position

    async def remove(self, stored: Sequence[Stored]) -> None:
        """Remove messages that `browse` showed, for every group. One that is gone already is no error.

        Kafka deletes no single record: which are removed is written down, and the first ones of a partition are
        deleted. Raises TransportError where too many that stay lie between them.
        """
        _ = self._open
        await asyncio.to_thread(self._shelf.remove, stored)

    async def aclose(self) -> None:
        """Close the sources that are still open, and the connections. Idempotent."""
        for source in list(self._sources):
            await source.aclose()
        for member in list(self._members.values()):
            await member.close()
        self._members.clear()
        for task in list(self._forwards):
            task.cancel()
            await asyncio.wait([task])
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            await publisher.aclose()
            self._topics.close()


def _missing(name: str) -> Finding:
    return Finding("error", f"there is no topic {name!r}; make it, or start once with create and create=yes in the URL")


def _check(settings: Settings) -> None:
    """Ask the brokers for anything. Raises ConnectError, at once where trying again does not help."""
    told: list[KafkaError] = []
    deadline = time.monotonic() + CONNECT_TIMEOUT
    try:
        config: dict[str, Any] = {**settings.client(), "error_cb": told.append}
        client = AdminClient(config)
    except KafkaException as error:  # a TLS file that cannot be used
        raise ConnectError(f"cannot connect to Kafka at {settings.where()}: {error.args[0].str()}") from error
    while True:
        try:
            client.list_topics(timeout=0.5)
            return
        except KafkaException as error:
            client.poll(0.05)  # which tells why
            why = next((one for one in told if one.code() in _CLEAR), None)
            if why is None and time.monotonic() < deadline:
                continue
            why = why or next((one for one in told if one.code() != KafkaError._ALL_BROKERS_DOWN), error.args[0])
            raise ConnectError(f"cannot connect to Kafka at {settings.where()}: {why.str()}{_advice(why)}") from error


def _advice(error: KafkaError) -> str:
    code = error.code()
    if code == KafkaError._AUTHENTICATION:
        return "; check user, password and mechanism"
    if code == KafkaError._SSL:
        return "; check ca_file, cert_file and whether the port speaks TLS (kafkas://)"
    if code in (KafkaError._TRANSPORT, KafkaError._RESOLVE):
        return "; check host and port, and whether the server is up (and speaks TLS, or not, as the URL says)"
    return "; check the host, and whether its port wants TLS (kafkas://) or a user"
