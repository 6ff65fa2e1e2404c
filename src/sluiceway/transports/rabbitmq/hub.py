"""The hub: what a transport and its sources share: the I/O thread, the outlet, and where messages go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..._decisions.topics import best_match, is_dead_letter_topic, matches
from ...errors import TransportError
from ...message import Outgoing, new_id
from ...source import Subscription
from .address import Address, Options
from .inlet import Inlet, Listener
from .io_thread import IOThread
from .letters import DUE, STORED, TOPIC, Letter, pack
from .outlet import Failure, Outlet
from .topology import RUNG, Declared, Names, rung_for, suspects_of
from .wire import CLOSE, Connection, connect

log = logging.getLogger("sluiceway")

_MEND = 1.0  # seconds in which all is made again once at most
_SOON = 0.2  # seconds in which what the broker took back comes again


class Hub:
    """Made by the transport, which opens and closes it."""

    def __init__(self, address: Address, options: Options) -> None:
        self.address = address
        self.options = options
        self.timeout = options.timeout
        self.names = Names(options.exchange, options.queue_type)
        self.passive = not options.declare
        self.topics: dict[str, set[str]] = {}  # by group: what it subscribes to, as far as we know
        self.ready: set[str] = set()  # queues that a moment ago were there, with all that belongs to them
        self._thread: IOThread | None = None
        self._outlet: Outlet | None = None
        self._connections: set[Connection] = set()  # touched on the I/O thread alone
        self._mended = -math.inf  # when all was made again
        self._taken_back: dict[str, tuple[int, float]] = {}  # by queue: how many at most, and until when

    @property
    def io(self) -> IOThread:
        if self._thread is None:
            raise TransportError(f"RabbitMQ at {self.address.place} is not connected; await connect() first")
        return self._thread

    @property
    def outlet(self) -> Outlet:
        if self._outlet is None:
            raise TransportError(f"RabbitMQ at {self.address.place} is not connected; await connect() first")
        return self._outlet

    @property
    def blocked(self) -> str | None:
        """Why nothing can be published at present; None when it can."""
        return self.outlet.trouble

    async def connect(self) -> Connection:
        connection = await connect(self.address.parameters, self.address.place)
        self._connections.add(connection)
        connection.lost.add_done_callback(lambda _: self._connections.discard(connection))
        return connection

    async def _disconnect(self) -> None:
        for connection in self._connections:
            connection.end()
        if self._connections:
            await asyncio.wait([connection.lost for connection in self._connections], timeout=CLOSE)

    async def open(self) -> list[str]:
        """Start the thread and connect the outlet; returns what is wrong at the broker. Idempotent."""
        if self._outlet is not None:
            return []
        thread = IOThread()
        outlet = Outlet(self.connect, self.names.base(), self.passive)
        try:
            problems = await thread.run(outlet.open())
        except BaseException:
            await thread.run(self._disconnect())
            await thread.stop()
            raise
        self._thread, self._outlet = thread, outlet
        return problems

    async def close(self, *, kept: bool) -> None:
        """End all connections and the thread; with `kept` only the outlet: sources keep something in hand."""
        outlet, self._outlet = self._outlet, None
        thread, self._thread = self._thread, None
        if thread is not None and outlet is not None:
            await thread.run(outlet.close())
            if not kept:
                await thread.run(self._disconnect())
                await thread.stop()

    def wanted(self, *subscriptions: Subscription) -> list[Declared]:
        names = self.names
        groups = dict.fromkeys(one.group for one in subscriptions)
        topics = dict.fromkeys((one.group, topic) for one in subscriptions for topic in one.topics)
        ordered = {(one.group, topic) for one in subscriptions if one.order_by is not None for topic in one.topics}
        return [
            *names.base(),
            *(one for group in groups for one in names.of_group(group)),
            *(one for pair in topics for one in names.of_topic(*pair, ordered=pair in ordered)),
            *(one for pair in ordered for one in names.record(names.queue(*pair))),
            *(one for group, topic in topics for one in names.suspects(names.queue(group, topic))),
        ]

    def inlet(self, subscription: Subscription, queues: Sequence[str], listener: Listener) -> Inlet:
        loop = asyncio.get_running_loop()

        def tell(hear: Callable[..., object], *what: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to hear it
                loop.call_soon_threadsafe(hear, *what)

        there = self.ready.issuperset(queues)
        self.ready.difference_update(queues)
        return Inlet(self.connect, queues, self.wanted(subscription), self.passive, listener, tell, there=there)

    def queues_of(self, topic: str) -> list[str]:
        """Where messages of `topic` wait, as far as we know."""
        if is_dead_letter_topic(topic):
            return [self.names.queue("", topic)]
        subscribed = [(group, one) for group, topics in self.topics.items() for one in topics if matches(one, topic)]
        return [self.names.queue(group, one) for group, one in subscribed]

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
        found = best_match(self.topics.get(group, ()), topic)
        return None if found is None else self.names.queue(group, found)

    async def letter(self, message: Outgoing) -> Letter:
        """A message as it is sent, once there is somewhere for it to go.

        Raises ValueError for what cannot be sent, and TransportError.
        """
        if len(message.body) > self.options.max_payload:
            raise ValueError(f"a body of {len(message.body)} bytes is over the limit of {self.options.max_payload}")
        names, topic = self.names, message.topic
        more: dict[str, str] = {}
        if is_dead_letter_topic(topic):
            queue = names.queue("", topic)
            await self._have(names.dead(topic))
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

    async def have_record(self, queue: str) -> None:
        """Make the queue where it is written down what of `queue` is away, unless it is there."""
        await self._have(self.names.record(queue))

    async def _have(self, wanted: Sequence[Declared]) -> None:
        if any(one.name not in self.outlet.known for one in wanted):
            await self.io.run(self.outlet.declare(wanted, self.timeout))

    async def to_suspects(self, queue: str, body: bytes, properties: Any, delay: float) -> Letter:
        """A letter to the suspects of a queue."""
        await self._have(self.names.suspects(queue))
        return await self.to_queue(suspects_of(queue), body, properties, delay)

    async def to_queue(self, queue: str, body: bytes, properties: Any, delay: float) -> Letter:
        """A letter to one queue."""
        if delay <= 0:
            return Letter("", queue, body, properties)
        return await self._delayed(queue, body, properties, delay)

    async def _delayed(self, key: str, body: bytes, properties: Any, delay: float) -> Letter:
        rung = rung_for(delay)
        await self._have(self.names.rung(rung))
        properties.headers[RUNG] = f"{rung:g}"
        return Letter(self.names.delay, key, body, properties)

    async def send(self, letters: Sequence[Letter]) -> dict[int, Failure]:
        """Publish; returns, by index, what is not confirmed.

        What is routed nowhere is sent once more after all that we know of is made again: somebody may have deleted it.
        """
        if not letters:
            return {}
        failed = await self.io.run(self.outlet.publish(letters, self.timeout))
        homeless = [index for index, failure in failed.items() if failure.homeless]
        if homeless and self.topics and not self.passive and time.monotonic() > self._mended + _MEND:
            self._mended = time.monotonic()
            try:
                await self.io.run(self.outlet.declare(self._ways(), self.timeout))
            except TransportError as error:
                log.warning("exchanges and bindings cannot be made again: %s", error)
                return failed
            again = await self.io.run(self.outlet.publish([letters[index] for index in homeless], self.timeout))
            failed = {index: failure for index, failure in failed.items() if not failure.homeless}
            failed |= {homeless[at]: failure for at, failure in again.items()}
        return failed

    def _ways(self) -> list[Declared]:
        """Exchanges and bindings of all that this process subscribed to or made.

        No queues: RabbitMQ 3.10 does not tell a consumer of a deleted queue that it has ended, when there is one of
        that name again at once. The source that misses its queue makes it.
        """
        groups = [one for group in self.topics for one in self.names.of_group(group)]
        queues = [(group, topic) for group, topics in self.topics.items() for topic in topics]
        ways = [*self.names.base(), *groups, *(one for pair in queues for one in self.names.of_topic(*pair))]
        return [one for one in ways if one.what != "queue_declare"]
