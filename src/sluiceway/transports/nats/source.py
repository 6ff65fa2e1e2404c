"""The source: one subscription, over a consumer per topic and stream."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, Literal

from ..._decisions.backoff import reconnect_delay
from ..._decisions.topics import is_pattern
from ...errors import TransportError
from ...message import Message, Refused, Settlement
from ...source import Backlog, Renewer, SourceStatus, Start, Subscription
from .connection import Connection
from .consumers import Consumer, Consumers
from .hand import Hand
from .notes import sweep
from .order import Order
from .publishing import Publisher
from .pulls import BEAT, Pulls
from .reading import Reader
from .renewer import Leases, NATSRenewer, share
from .streams import Streams

log = logging.getLogger("sluiceway.nats")

POLL = 5.0  # seconds between looks at the consumers; what a deleted one repeats was acked since the last look
SWEEP = 120  # looks after which notes are deleted that have no message any more

_numbers = count(1)


class NATSSource:
    """One subscription. A delivery is ours for the lease, from when it came or was renewed; after that its settle is
    refused as lost, and is not sent."""

    returns_failed = True  # what a newer version sent

    def __init__(
        self, connection: Connection, streams: Streams, publisher: Publisher, subscription: Subscription
    ) -> None:
        self.closed = False
        self.subscription = subscription
        self._connection = connection
        self._streams = streams
        self._made = Consumers(connection)
        self._publisher = publisher
        self._consumers: list[Consumer] = []
        self._patterns = any(map(is_pattern, subscription.topics))
        self._start: Start = subscription.start
        self._window = subscription.window
        self._stopped = False
        self._since = time.time()
        self._trouble: str | None = None
        self._left: list[Message[Any]] = []  # came, and no receive has returned them yet
        self._pulls = Pulls(connection, next(_numbers))
        self._pulls.stopped = lambda: self._stopped or not self._window or not connection.up.is_set()
        self._tasks: list[asyncio.Task[None]] = []
        self._order: Order | None = None
        self._notes_before = 0
        self._others_until = 0.0  # till then what others had in hand when this source was opened may come again

    async def open(self) -> None:
        """Make the consumers. Once, before anything else."""
        lease = self._connection.settings.lease
        leases = Leases(lease)
        self._hand = Hand(self._connection, self._publisher, leases, self._gone)
        self._reader = Reader(self._connection, self.subscription.group, self._hand)
        await self.resume(first=True)
        leases.lease = lease = min([consumer.lease for consumer in self._consumers], default=lease)
        self.lease: float | None = lease
        self._pulls.beat = min(BEAT, lease / 6)
        share(leases)
        if self.subscription.order_by is not None:
            self._order = self._hand.order = Order(self._connection, lease)
            self._order.know(self._consumers)
            self._notes_before = await self._order.recall()
            if sum(consumer.held for consumer in self._consumers) > self._notes_before:
                self._others_until = time.monotonic() + lease
            self._tasks.append(asyncio.create_task(self._order.watch()))
        self.renewer: Callable[[], Renewer] | None = partial(NATSRenewer, self._connection.settings, lease, leases.id)
        self._connection.listeners.add(self._on_change)
        self._tasks.append(asyncio.create_task(self._poll()))

    async def resume(self, *, first: bool = False) -> None:
        """Look where the topics are, and make the consumers that are missing; one that was seen before goes on behind
        the last message up to which all were settled then."""
        found: list[Consumer] = []
        group = self.subscription.group
        for topic in dict.fromkeys(self.subscription.topics):
            for stream, subject in await self._streams.places(topic, create=True):
                before = next((one for one in self._consumers if (one.stream, one.topic) == (stream, topic)), None)
                start: Start = self._start if first else "earliest"
                consumer, findings = await self._made.consume(stream, subject, group, topic, start, before)
                for finding in findings:
                    log.log(logging.DEBUG if first else logging.WARNING, "group %r: %s", group, finding.text)
                found.append(consumer)
        streams = {consumer.stream for consumer in found} if self._patterns else ()
        siblings = {stream: await self._made.siblings(stream, group) for stream in streams}
        if self._order is not None:
            self._order.know(found)
        self._consumers = self._hand.consumers = found
        self._reader.know(found, siblings)
        self._pulls.trouble.clear()

    async def _poll(self) -> None:
        """Look at the consumers now and then: how far they are, and for patterns, who else is there. While nobody of
        the group gets or has anything, they stay where they are."""
        seen, rounds = -1, 0
        while True:
            await asyncio.sleep(self._connection.whole(POLL - 1))
            rounds += 1
            moves = self._pulls.moves
            try:
                if rounds % SWEEP == 0:
                    for consumer in await self._look():
                        await sweep(self._connection, consumer.path, consumer.floor)
                if self._patterns and rounds % 6 == 0:
                    await self.resume()
                elif moves != seen or self._hand.held or any(consumer.held for consumer in self._consumers):
                    await self._look()
                seen = moves
            except TransportError as error:
                log.debug("looking at the consumers of %s: %s", self.subscription.topics, error)
            self._renew_waiting()
            for token in [token for token in self._hand.held if self._hand.leases.lost(token)]:
                self._hand.lose(token)

    def _renew_waiting(self) -> None:
        """Renew what no receive has returned yet: the runtime does not know of it."""
        now = time.monotonic()
        tokens = [message.token for message in self._left]
        for number, (_, frames) in enumerate(self._pulls.arrived):
            tokens += [(frame[1], now) for frame in frames]
            self._pulls.arrived[number] = (now, frames)
        self._hand.leases.renewed.update(dict.fromkeys(tokens, now))
        self._connection.write(b"".join([b"PUB %b 4\r\n+WPI\r\n" % reply for reply, _ in tokens]))

    async def _look(self) -> list[Consumer]:
        for index, consumer in enumerate(self._consumers):
            if not await self._made.look(consumer):
                self._pulls.trouble[index] = f"{consumer.path} was deleted"
                self._pulls.wake()
        self._hand.delayed = 0
        return self._consumers

    # -- receiving

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or while the window is 0."""
        tries = 0
        while not self._left:
            demand = min(demand, self._window)
            if self._stopped or demand <= 0:
                break
            try:
                await self._bring(demand)
                if self._trouble is not None:
                    self._trouble, self._since = None, time.time()
                tries = 0
            except TransportError as error:
                delay = reconnect_delay(tries, random.random())
                tries += 1
                self._trouble, self._since = str(error), time.time()
                log.warning("receiving %s: %s; trying again in %.2f s", self.subscription.topics, error, delay)
                await self._pulls.rest(delay)
        if not self._window and not self._stopped and self._left:
            left, self._left = self._left, []
            await self._insist_release(left)
        return self._portion(demand)

    async def _bring(self, demand: int) -> None:
        """Pull once, and put what came in `_left`."""
        if not self._connection.up.is_set():
            await self._pulls.changed()
            return
        if self._pulls.silent:
            await self._look()  # raises when there is no answer, or notices that one is gone
            self._pulls.silent = False
        if self._pulls.trouble:
            log.warning("a consumer of %s is gone: %s; making it anew", self.subscription.topics, self._pulls.trouble)
            self._streams.forget()
            await self._pulls.rest(0.25)  # where a stream goes, its consumers go first
            await self.resume()
        if self._order is not None:
            demand = self._order.demand(demand)
            if demand <= 0 or await self._others_may_have_earlier():
                await self._pulls.rest(0.2)
                return
        if not self._pulls.arrived:
            max_bytes = max(self.subscription.max_bytes, 2 * self._connection.max_payload)
            await self._pulls.pull(self._consumers, demand, max_bytes)
        arrived = self._pulls.arrived[:]
        messages = await self._reader.read(arrived)  # when it raises, what arrived stays and is made again
        del self._pulls.arrived[: len(arrived)]
        self._left += messages

    async def _others_may_have_earlier(self) -> bool:
        """Whether messages that nobody has, of a process that died or lost on their way as a connection broke, come
        before others of their keys. What living processes have looks the same, so that is waited for no longer than a
        lease."""
        if not self._others_until:
            return False
        held = sum(consumer.held for consumer in await self._look())
        known = max(self._notes_before, len(self._hand.held) + (self._order.known if self._order is not None else 0))
        if held <= known or time.monotonic() >= self._others_until:
            self._others_until = 0.0
        return bool(self._others_until)

    def _portion(self, demand: int) -> list[Message[Any]]:
        size = taken = 0
        for message in self._left[:demand]:
            size += len(message.body)
            taken += 1
            if size >= self.subscription.max_bytes:
                break
        if taken > 1 and size > self.subscription.max_bytes:
            taken -= 1
        messages, self._left = self._left[:taken], self._left[taken:]
        return messages

    def resize(self, window: int) -> None:
        """Change the window. 0 pauses: a waiting `receive` returns nothing."""
        if (window == 0) != (self._window == 0):
            self._since = time.time()
        self._window = window
        self._pulls.wake()

    def stop(self) -> None:
        """Receive nothing more: a waiting `receive` returns what has arrived, perhaps nothing. Idempotent."""
        if not self._stopped:
            self._stopped, self._since = True, time.time()
            self._pulls.wake()

    def _gone(self) -> None:
        self._pulls.silent = True
        self._pulls.wake()

    def _on_change(self) -> None:
        self._since = time.time()
        self._notes_before = 0
        if self._order is not None:
            self._others_until = time.monotonic() + (self.lease or 0.0)
        self._pulls.wake()

    # -- settling

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries. When it returns, the server has them: the last ack of a consumer is confirmed, and with it
        those before. Raises TransportError when the connection broke; the same may be settled again then.
        """
        return await self._hand.settle(acks, others)

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected. False: its lease is over. Raises TransportError."""
        return await self._hand.suspect(message)

    async def flush(self) -> None:
        """Return when every earlier settle has reached the broker: each has when it returned."""

    # -- looking

    def status(self) -> SourceStatus:
        """How the source is. `held_by_broker`: received and not settled, as far as this process has heard."""
        error = self._connection.error if not self._connection.up.is_set() else self._trouble
        return SourceStatus(state=self._state(), since=self._since, error=error, held_by_broker=len(self._hand.held))

    def _state(self) -> Literal["connecting", "running", "paused", "blocked", "stopped"]:
        if self._stopped:
            return "stopped"
        if not self._connection.up.is_set():
            return "connecting"
        if self._trouble is not None:
            return "blocked"
        return "running" if self._window else "paused"

    async def backlog(self) -> Backlog | None:
        """Messages that wait for this group, also for their delay, and the age of the oldest that was never handed
        out. What other processes have in hand counts as waiting: the server does not tell it from what dead ones had,
        and that must be counted, or nobody would be started for it."""
        held = len(self._hand.held)
        messages, oldest = -held, 0.0
        for consumer in await self._look():
            messages += consumer.pending + consumer.held
            oldest = max(oldest, await self._made.oldest(consumer))
        return Backlog(max(0, messages), oldest)

    # -- the end

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give everything back that is not settled, uncounted, but for `keep`. Idempotent."""
        if self.closed:
            return
        self.stop()
        self.closed = True
        for task in self._tasks:
            task.cancel()
            await asyncio.wait([task])
        await self._pulls.cancel()
        self._connection.listeners.discard(self._on_change)
        try:
            if self._pulls.arrived:
                await self._reader.read(self._pulls.arrived)
            kept = {message.token for message in keep}
            await self._release([message for token, message in self._hand.held.items() if token not in kept])
            if self._order is not None:
                self._order.release()
        except TransportError as error:
            log.warning(
                "closing the source of %s: %s; the %d messages that it holds come back when their leases end",
                self.subscription.topics, error, len(self._hand.held),
            )  # fmt: skip
        self._hand.held.clear()

    async def _insist_release(self, messages: list[Message[Any]]) -> None:
        try:
            await self._release(messages)
        except TransportError as error:
            self._left = [*messages, *self._left]
            log.warning("handing %d messages back: %s; trying again at the next receive", len(messages), error)

    async def _release(self, messages: Sequence[Message[Any]]) -> None:
        await self.settle((), [Settlement(message, "release") for message in messages])
