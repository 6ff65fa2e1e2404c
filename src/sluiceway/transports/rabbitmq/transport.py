"""The transport: one virtual host of a RabbitMQ server, as the event loop sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

from ..._decisions.topics import best_match, check_topic, is_dead_letter_topic, matches
from ...errors import ConnectError, OptionError, PayloadTooLarge, PublishError, TransportError
from ...message import Outgoing, Stored, new_id
from ...source import Subscription
from ...transport import Features, Finding
from .address import Options, address_of, options_of
from .browser import browse_queue, remove_from_queue
from .inlet import Inlet
from .io_thread import IOThread
from .letters import DUE, STORED, TOPIC, Letter, pack
from .outlet import Failure, Outlet
from .source import RabbitMQSource
from .topology import RUNG, Declared, Names, declare, rung_for
from .wire import Connection, connect

_SOON = 0.2  # seconds in which what the broker took back comes again


class RabbitMQTransport:
    """A virtual host of RabbitMQ 3.10 or later: `amqp://user:password@host:port/vhost`, `amqps://` with TLS.

    - `exchange`: the topic exchange that is published to; the names of all else begin with it.
    - `queue_type`: "quorum"; or "classic", which counts no deliveries: what one process after another dies with is
      found later, and a queue lives on one node alone.
    - `declare`: make what is missing. False: somebody else makes it all, and what is not there is an error.
    - `heartbeat`: seconds without a sign of life after which a connection is lost.
    - `timeout`: seconds to wait for a connection, for confirms, and for a broker that takes no messages.
    - `max_payload`: bytes, the most one body may have; the server has its own `max_message_size`.
    - `ca`, `cert`, `key`: files for TLS, in PEM; without `ca` those that the system trusts. `server_name`: whom the
      server's certificate must name, unless that is the host.

    Raises OptionError for a value that is not allowed; the connection is opened by `connect`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        unknown = set(options) - set(Options.__struct_fields__)
        if unknown:
            raise OptionError(f"RabbitMQTransport: there is no option {min(unknown)!r}")
        self._options = Options(**{**options_of(url), **options})
        self._address = address_of(url, self._options)
        self.timeout = self._options.timeout
        self.features = Features(
            durable=True,
            retains=False,
            order="none",
            delay="ladder",
            atomic=False,
            park=False,
            release=True,
            lease=False,
            max_payload=self._options.max_payload,
            wildcards=True,
            browse=True,
            backlog=True,
        )
        self._names = Names(self._options.exchange, self._options.queue_type)
        self._passive = not self._options.declare
        self._thread: IOThread | None = None
        self._outlet: Outlet | None = None
        self._connecting = asyncio.Lock()
        self._sources: list[RabbitMQSource] = []
        self._connections: set[Connection] = set()  # touched on the I/O thread alone
        self._taken_back: dict[str, tuple[int, float]] = {}  # by queue: how many at most, and until when
        self._topics: dict[str, set[str]] = {}  # by group: what it subscribes to, as far as we know

    def __repr__(self) -> str:
        return f"RabbitMQTransport({self._address.place!r})"

    @classmethod
    def from_url(cls, url: str) -> Self:
        """A transport for `amqp://user:password@host:port/vhost?heartbeat=10`. Raises OptionError."""
        return cls(url)

    @property
    def io(self) -> IOThread:
        if self._thread is None:
            raise TransportError(f"{self!r} is not connected; await connect() first")
        return self._thread

    @property
    def outlet(self) -> Outlet:
        if self._outlet is None:
            raise TransportError(f"{self!r} is not connected; await connect() first")
        return self._outlet

    @property
    def blocked(self) -> str | None:
        """Why nothing can be published at present; None when it can."""
        return self.outlet.trouble

    async def _connect(self) -> Connection:
        connection = await connect(self._address.parameters, self._address.place)
        self._connections.add(connection)
        connection.lost.add_done_callback(lambda _: self._connections.discard(connection))
        return connection

    async def _disconnect(self) -> None:
        for connection in self._connections:
            connection.end()
        if self._connections:
            await asyncio.wait([connection.lost for connection in self._connections], timeout=self.timeout)

    async def connect(self) -> None:
        """Connect, and make the exchanges. Idempotent. Raises ConnectError that says what to do."""
        async with self._connecting:
            if self._outlet is not None:
                return
            thread = IOThread()
            outlet = Outlet(self._connect, self._names.base(), self._passive)
            try:
                problems = await thread.run(outlet.open())
                if problems:
                    raise ConnectError(f"RabbitMQ at {self._address.place} is not as it must be: {'; '.join(problems)}")
            except BaseException:
                await thread.run(self._disconnect())
                await thread.stop()
                raise
            self._thread, self._outlet = thread, outlet

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        """Make the groups' queues, or say what is missing. Raises OptionError for a topic that cannot be."""
        findings: list[Finding] = []
        if self._options.queue_type == "classic":
            text = "classic queues count no deliveries, so what kills its process is found later; use queue_type=quorum"
            findings.append(Finding("warning", text))
        for subscription in subscriptions:
            _check(subscription)
            wanted = self._wanted(subscription)
            problems = await self.io.run(self._declare(wanted, passive=self._passive or not create))
            findings += [Finding("error", problem) for problem in problems]
            if create:
                self._topics.setdefault(subscription.group, set()).update(subscription.topics)
        return findings

    def _wanted(self, subscription: Subscription) -> list[Declared]:
        group = subscription.group
        topics = [one for topic in subscription.topics for one in self._names.of_topic(group, topic)]
        return [*self._names.of_group(group), *topics]

    async def _declare(self, wanted: Sequence[Declared], *, passive: bool) -> list[str]:
        connection = await self._connect()
        try:
            return await declare(connection, wanted, passive=passive)
        finally:
            connection.end()

    def takes_back(self, queues: Sequence[str], count: int) -> None:
        """The broker may take back so many messages that it was about to push: a consumer of ours is cancelled."""
        for queue in queues:
            self._taken_back[queue] = (count, time.monotonic() + _SOON)

    def was_taken_back(self, queue: str) -> bool:
        """Whether a message that was handed over once before may be one of those; at most as many as there can be."""
        count, until = self._taken_back.get(queue, (0, 0.0))
        self._taken_back[queue] = (count - 1, until)
        return count > 0 and time.monotonic() < until

    def best_queue(self, group: str, topic: str) -> str | None:
        """The queue of the best subscription that we know of, of those of a group that match."""
        found = best_match(self._topics.get(group, ()), topic)
        return None if found is None else self._names.queue(group, found)

    # -- publishing

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish, in order; every message is confirmed when it returns.

        Raises PayloadTooLarge, and OptionError for a topic that cannot be, before anything is sent; PublishError with
        what may not be there: no group has the topic, a queue is full, the broker is out of reach or takes nothing.
        """
        self._check_sizes(messages)
        for message in messages:
            check_topic(message.topic, pattern=False)
        letters: list[Letter] = []
        sent: list[Outgoing] = []
        reasons: list[str] = []
        failed: list[Outgoing] = []
        for message in messages:
            try:
                letters.append(await self.letter(message))
                sent.append(message)
            except (ValueError, TransportError) as error:
                failed.append(message)
                reasons.append(str(error))
        failures = await self.send(letters)
        if failures or failed:
            gone = {id(message) for message in failed} | {id(sent[index]) for index in failures}
            reasons += [failure.text for failure in failures.values()]
            raise PublishError(
                f"{len(gone)} of {len(messages)} messages may not be published: {reasons[0]}",
                [message for message in messages if id(message) in gone],
            )

    def _check_sizes(self, messages: Sequence[Outgoing]) -> None:
        limit = self.features.max_payload
        large = [message for message in messages if len(message.body) > limit]
        if large:
            raise PayloadTooLarge(
                f"message {large[0].id} to {large[0].topic!r} has a body of {len(large[0].body)} bytes and the limit "
                f"is {limit} (max_payload of the RabbitMQ transport); nothing of the call was published",
                large,
            )

    async def letter(self, message: Outgoing) -> Letter:
        """A message as it is sent, once there is somewhere for it to go.

        Raises ValueError for what cannot be sent, and TransportError.
        """
        if len(message.body) > self.features.max_payload:
            raise ValueError(f"a body of {len(message.body)} bytes is over the limit of {self.features.max_payload}")
        names, topic = self._names, message.topic
        more: dict[str, str] = {}
        if is_dead_letter_topic(topic):
            queue = names.queue("", topic)
            await self._have([names.dead(topic)])
            more[TOPIC] = topic
            more[STORED] = f"{time.time_ns():020}-{new_id()}"
            exchange, key = "", queue
        elif message.group is not None:
            await self._have(names.of_group(message.group))
            exchange, key = names.group(message.group), topic
        else:
            exchange, key = names.exchange, topic
        if message.delay > 0:
            more[DUE] = repr(time.time() + message.delay)
            return await self._delayed(
                queue if not exchange else topic, message.body, pack(message, more), message.delay
            )
        return Letter(exchange, key, message.body, pack(message, more))

    async def _have(self, wanted: Sequence[Declared]) -> None:
        if any(one.name not in self.outlet.known for one in wanted):
            await self.io.run(self.outlet.declare(wanted))

    async def to_queue(self, queue: str, body: bytes, properties: Any, delay: float) -> Letter:
        """A letter to one queue."""
        if delay <= 0:
            return Letter("", queue, body, properties)
        return await self._delayed(queue, body, properties, delay)

    async def _delayed(self, key: str, body: bytes, properties: Any, delay: float) -> Letter:
        rung = rung_for(delay)
        await self._have(self._names.rung(rung))
        properties.headers[RUNG] = f"{rung:g}"
        return Letter(self._names.delay, key, body, properties)

    async def send(self, letters: Sequence[Letter]) -> dict[int, Failure]:
        """Publish; returns, by index, what may not be there."""
        return await self.io.run(self.outlet.publish(letters, self.timeout)) if letters else {}

    # -- receiving

    async def subscribe(self, subscription: Subscription) -> RabbitMQSource:
        """Open a source. The group exists when this returns. Raises OptionError for a topic that cannot be."""
        _check(subscription)
        self._topics.setdefault(subscription.group, set()).update(subscription.topics)
        source = RabbitMQSource(self, subscription, self._names)
        await source.open()
        self._sources = [other for other in self._sources if not other.closed or other.kept]
        self._sources.append(source)
        return source

    def inlet(self, subscription: Subscription, queues: Sequence[str], listener: RabbitMQSource) -> Inlet:
        tell = listener.loop.call_soon_threadsafe
        return Inlet(self._connect, queues, self._wanted(subscription), self._passive, listener, tell)

    # -- messages at rest

    async def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        """The first 10,000 dead letters of `topic`, oldest first, from behind position `after`.

        They are taken from their queue and put back at once; while that goes on, nobody else sees them. Before RabbitMQ
        4.3 each look counts as a delivery. A topic whose last word is not `dead` shows what waits for each group that
        this process knows of.
        """
        for queue in self._queues_of(topic):
            for stored in await self.io.run(browse_queue(self._connect, queue, topic, after)):
                yield stored

    async def remove(self, stored: Sequence[Stored]) -> None:
        """Delete messages that `browse` showed. One that is gone is no error."""
        by_topic: dict[str, set[str]] = {}
        for one in stored:
            by_topic.setdefault(one.topic, set()).add(one.position)
        for topic, positions in by_topic.items():
            for queue in self._queues_of(topic):
                await self.io.run(remove_from_queue(self._connect, queue, topic, positions))

    def _queues_of(self, topic: str) -> list[str]:
        check_topic(topic, pattern=False)
        if is_dead_letter_topic(topic):
            return [self._names.queue("", topic)]
        subscribed = [(group, one) for group, topics in self._topics.items() for one in topics if matches(one, topic)]
        return [self._names.queue(group, one) for group, one in subscribed]

    async def aclose(self) -> None:
        """Close the sources that are still open, and all connections. Idempotent."""
        kept = False
        for source in self._sources:
            await source.aclose()
            kept = kept or source.kept
        self._sources.clear()
        outlet, self._outlet = self._outlet, None
        thread, self._thread = self._thread, None
        if thread is not None and outlet is not None:
            await thread.run(outlet.close())
            if not kept:  # what still runs on threads stays ours until this process ends
                await thread.run(self._disconnect())
                await thread.stop()


def _check(subscription: Subscription) -> None:
    if not subscription.topics:
        raise OptionError(f"the subscription of group {subscription.group!r} names no topic")
    for topic in subscription.topics:
        check_topic(topic, pattern=True)
