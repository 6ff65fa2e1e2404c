"""The source: one subscription, as the event loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from pika.exceptions import AMQPError

from ..._decisions.suspicion import STEADY, suspicions_now
from ..._decisions.topics import is_pattern
from ...errors import TransportError
from ...message import Message, Refused, Settlement
from ...source import Backlog, Renewer, SourceStatus, Subscription
from .copies import Copies
from .hub import Hub
from .inlet import SUSPECTS
from .letters import Letter, open_letter
from .tags import Tags
from .topology import suspects_of
from .wire import Delivery

log = logging.getLogger("sluiceway")

_UNUSED = 5.0  # seconds that credit far above the demand is left with the broker
_CONSUMERS = 8  # after so many one takes their place
_GRACE = 0.5  # seconds of a pause before what has arrived goes back: most pauses are shorter
_REMEMBERED = 10_000  # ids of messages that were lost with a connection
_SOON = 1.0  # seconds between two suspects that others left
_TAKEN = SUSPECTS.encode()


class RabbitMQSource:
    """One subscription, on a connection of its own. Its scope is the connection's epoch.

    The broker may push as many messages as the pipeline has held and asked for at once in the last seconds, and never
    more than the window: what waits beside a slow handler could be handled elsewhere. While there are suspects it
    pushes for one `receive` at a time, so that nothing is in hand beside what runs.
    """

    settles_at_once = True  # acks only: they are handed to the I/O thread, and the broker answers none
    returns_failed = True

    def __init__(self, hub: Hub, subscription: Subscription) -> None:
        self.lease: float | None = None
        self.renewer: Callable[[], Renewer] | None = None
        self.closed = False
        self.kept = False  # closed, and its connection is open, for what still runs on threads
        self._hub = hub
        self._subscription = subscription
        self._group = subscription.group
        self._window = subscription.window
        self._overlaps = any(map(is_pattern, subscription.topics))
        self._copies = Copies(hub, subscription)
        self._alone = self._copies.alone
        self.loop = asyncio.get_running_loop()
        self._epoch = 0  # 0: no channel is open
        self._tags = Tags()
        self._held: dict[int, Message[Any]] = {}  # returned by a receive and not settled, by tag
        self._buffer: list[Message[Any]] = []  # arrived, and not returned by a receive
        self._credit = 0  # what the broker may push, over all consumers
        self._consumers = 0  # at the broker, for each queue: a prefetch cannot change, so that one more adds to it
        self._stale = 0  # the newest tag of a consumer that has ended
        self._used = 0.0  # when a large part of the credit was last asked for
        self._quiet = asyncio.Event()  # no consumer is left, and all that came has arrived
        self._quiet.set()
        self._apart = False  # there are suspects
        self._clearing = False  # a suspect is about to be taken, once nothing is in hand
        self._empty = asyncio.Event()  # which this says, while it is asked
        self._looking: asyncio.Task[None] | None = None
        self._sent: dict[int, set[int]] = {}  # by tag: which of its letters the broker has, though not all
        self._lost: Counter[str] = Counter()  # by id: hand-overs that ended with a connection, while this process lives
        self._waiter: asyncio.Future[None] | None = None
        self._demand = 0
        self._stopped = False
        self._ending = asyncio.Event()  # it has stopped
        self._trouble: str | None = None
        self._since = time.time()
        self._tasks: set[asyncio.Task[None]] = set()
        self._inlet = hub.inlet(
            subscription, [hub.names.queue(self._group, topic) for topic in subscription.topics], self
        )

    async def open(self) -> None:
        """Make the group's queues and connect. Raises TransportError."""
        await self._hub.io.run(self._inlet.open())
        self._looking = self._in_background(self._look_for_suspects(), last=True)

    # -- what the I/O thread says

    def opened(self, epoch: int) -> None:
        self._epoch, self._tags = epoch, Tags()
        self._credit = self._consumers = self._stale = 0
        self._state(None)
        self._wake()

    def arrived(self, epoch: int, deliveries: list[Delivery]) -> None:
        if epoch != self._epoch:
            return
        self._tags.newest = deliveries[-1][0]
        unwanted: list[int] = []
        early: list[Settlement] = []
        for delivery in deliveries:
            taken = delivery[5].endswith(_TAKEN)
            inbound = open_letter(delivery, epoch, self._explain(delivery, taken=taken))
            message = inbound.message
            if inbound.alone is not None:
                self._alone[delivery[0]] = inbound.alone
            if inbound.group not in (None, self._group) or (
                self._overlaps and not taken and self._is_another_queues(delivery, message)
            ):
                unwanted.append(delivery[0])
            elif inbound.due and (left := inbound.due - time.time()) > 0.001:
                early.append(Settlement(message, "release", delay=left))
            else:
                self._buffer.append(message)
                self._apart = self._apart or message.suspect
        if unwanted:
            self._acknowledge(unwanted)
        if early:
            self._in_background(self._climb(early))
        if self._apart and self._credit:
            self._withdraw()
        if self._buffer:
            self._wake()

    def quiet(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._stale = self._tags.newest
            self._quiet.set()
            self._wake()

    def lost(self, epoch: int, reason: str) -> None:
        if self._epoch:
            if len(self._lost) > _REMEMBERED:  # others have them
                self._lost.clear()
            for message in [*self._buffer, *self._held.values()]:
                self._lost[message.id] += 1
            self._in_background(self._subscription.on_revoke(frozenset({self._epoch}), None))
        self._epoch = self._credit = self._consumers = 0
        self._buffer.clear()
        self._held.clear()
        self._alone.clear()
        self._sent.clear()
        self._quiet.set()
        self._empty.set()
        self._state(reason)
        self._wake()

    def _explain(self, delivery: Delivery, *, taken: bool) -> int:
        """How many hand-overs of a message that came back ended otherwise than with a process: with a connection of
        ours, or in a cancel of ours, where the broker takes back what it was about to push."""
        if not delivery[1]:
            return 0
        lost = self._lost.get(str(delivery[3].message_id), 0)
        once = not taken and (delivery[3].headers or {}).get("x-delivery-count") == 1
        return lost or int(once and self._hub.was_taken_back(self._queue_of(delivery)))

    def _is_another_queues(self, delivery: Delivery, message: Message[Any]) -> bool:
        """Whether a better pattern of this group, that we know of, has the message too."""
        return self._hub.best_queue(self._group, message.topic) not in (None, self._queue_of(delivery))

    def _queue_of(self, delivery: Delivery) -> str:
        return self._inlet.queues[int(delivery[5].partition(b".")[0])]

    # -- receiving

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or while the window is 0.

        A lost connection is waited out, and `status()` says so.
        """
        while not self._stopped and self._window:
            if self._clearing:
                pass
            elif self._apart:
                if not self._quiet.is_set():
                    await self._quiet.wait()
                if self._buffer:
                    messages = self._take(demand)
                    self._apart = any(message.suspect for message in messages)
                    self._in_background(self._give_back())
                    await asyncio.wait(self._tasks, timeout=self._hub.timeout)
                    return messages
            elif self._buffer:
                return self._take(demand)
            self._demand = demand
            if not self._clearing:
                self._ask()
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return ()

    def _take(self, demand: int) -> list[Message[Any]]:
        count, size = 0, 0
        for message in self._buffer[:demand]:
            count += 1
            size += len(message.body)
            if size >= self._subscription.max_bytes:
                break
        messages, self._buffer = self._buffer[:count], self._buffer[count:]
        self._held.update([(message.token, message) for message in messages])
        return messages

    def _ask(self) -> None:
        """Let the broker push as much as is held and asked for: what it pushes beyond that, others cannot handle."""
        if not self._epoch or (not self._quiet.is_set() and not self._credit):
            return
        stale = self._tags.open_until(self._stale)
        need = min(self._window, len(self._held) + self._demand)
        now = time.monotonic()
        if 2 * need > self._credit:
            self._used = now
        elif now - self._used > _UNUSED:
            self._withdraw()
            return
        more = need - self._credit - stale
        if more > 0 and not (self._apart and self._credit):
            if self._consumers == _CONSUMERS:
                self._withdraw()
                return
            self._credit += more
            self._consumers += 1
            self._quiet.clear()
            self._hub.io.call(self._inlet.consume, self._epoch, more)

    def _withdraw(self) -> None:
        """Let the broker push nothing more."""
        if self._credit and self._epoch:
            self._hub.takes_back(self._inlet.queues, self._credit)
            self._credit = self._consumers = 0
            self._hub.io.call(self._inlet.cancel, self._epoch)

    def resize(self, window: int) -> None:
        """Change the window. 0 pauses: a waiting `receive` returns nothing, and what has arrived for it goes back."""
        if (window == 0) != (self._window == 0):
            self._since = time.time()
        if window < self._window:
            self._withdraw()
        self._window = window
        if window == 0:
            self._in_background(self._clear())
        self._wake()

    def stop(self) -> None:
        """Receive nothing more: a waiting `receive` returns nothing, and what has arrived goes back. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._ending.set()
            self._since = time.time()
            self._withdraw()
            self._in_background(self._clear())
            self._wake()

    async def _clear(self) -> None:
        if not self._stopped:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), _GRACE)
        await self._quiet.wait()
        if self._stopped or not self._window:
            await self._give_back()

    async def _give_back(self) -> None:
        """Hand back what has arrived and nobody asked for."""
        buffer, self._buffer = self._buffer, []
        if buffer:
            await self._insist([Settlement(message, "release") for message in buffer])

    async def _climb(self, early: list[Settlement]) -> None:
        """What is not due yet goes up to its next rung."""
        await self._insist(early)

    async def _insist(self, settlements: Sequence[Settlement]) -> None:
        while True:
            try:
                await self.settle((), settlements)
            except TransportError as error:
                log.warning("handing back %d messages failed: %s; trying again", len(settlements), error)
                await asyncio.sleep(1.0)
            else:
                return

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- settling

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries. Acks are on their way when it returns; `flush` waits for them.

        What belongs to others (copies for a retry or a release, dead letters, outputs) is confirmed by the broker
        before its delivery is acknowledged. Raises TransportError when it cannot be published now.
        """
        refused: list[Refused] = []
        if acks:
            epoch = self._epoch
            tags = [message.token for message in acks if message.scope == epoch]
            self._acknowledge(tags)
            if len(tags) < len(acks):
                refused += [Refused(message, "lost", _GONE) for message in acks if message.scope != epoch]
        if others:
            refused += await self._settle_others(others)
        return refused

    def _acknowledge(self, tags: Sequence[int]) -> None:
        settled = self._tags.settle(tags)
        if settled:
            self._hub.io.call(self._inlet.ack, self._epoch, settled)
        held = self._held
        lost = self._lost
        for tag in tags:
            message = held.pop(tag, None)
            if lost and message is not None:
                lost.pop(message.id, None)
        if self._alone or self._sent:
            for tag in tags:
                self._alone.pop(tag, None)
                self._sent.pop(tag, None)
        if self._clearing:
            self._see_whether_empty()
        elif self._waiter is not None and self._stale:
            self._ask()

    async def _settle_others(self, others: Sequence[Settlement]) -> list[Refused]:
        epoch = self._epoch
        refused = [Refused(one.message, "lost", _GONE) for one in others if one.message.scope != epoch]
        current = [one for one in others if one.message.scope == epoch and self._tags.is_open(one.message.token)]
        letters: list[Letter] = []
        places: list[tuple[int, int]] = []  # of each letter: its settlement, and its number within that
        bad: dict[int, str] = {}
        for index, settlement in enumerate(current):
            sent = self._sent.get(settlement.message.token, ())
            makers = self._copies.of(settlement)
            try:
                made = [(number, await make()) for number, make in enumerate(makers) if number not in sent]
            except ValueError as error:  # it cannot be sent as it is; nothing of the settlement is
                bad[index] = str(error)
            else:
                letters += [letter for _, letter in made]
                places += [(index, number) for number, _ in made]
        failed = await self._hub.send(letters) if letters else {}
        again: str | None = None
        for at, (index, number) in enumerate(places):
            if at not in failed:
                self._sent.setdefault(current[index].message.token, set()).add(number)
            elif not failed[at].mendable:
                bad[index] = failed[at].text
            else:
                again = failed[at].text
        if self._epoch != epoch:  # the deliveries went back meanwhile
            return [*refused, *(Refused(one.message, "lost", _GONE) for one in current)]
        missing = {places[at][0] for at in failed}
        self._acknowledge(
            [one.message.token for index, one in enumerate(current) if index not in bad and index not in missing]
        )
        if again is not None:
            raise TransportError(f"the broker has not confirmed what belongs to a settle: {again}")
        return [*refused, *(Refused(current[index].message, "rejected", text) for index, text in bad.items())]

    # -- suspects

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected: a copy among the suspects takes its place, and is taken to be run.

        The broker counts how often it comes back from there: that is how often a process died while it ran alone, so
        nothing more is written before its further runs. False: the message is not ours any more; or another process
        took the copy. Raises TransportError when it cannot be written now.
        """
        epoch, tag = self._epoch, message.token
        if message.scope != epoch or not self._tags.is_open(tag):
            return False
        if tag not in self._alone:
            now = suspicions_now(message.deliveries, message.failures, message.suspicions)
            failed = await self._hub.send([await self._copies.as_it_is(message, now)])
            if failed:
                raise TransportError(f"the suspicion of message {message.id} is not written: {failed[0].text}")
            if self._epoch != epoch:
                return False
            self._acknowledge([tag])
            await self._take_suspect(self._copies.source_of(message))
            copy = next((one for one in self._buffer if one.id == message.id and one.token in self._alone), None)
            if copy is None:
                return False
            self._buffer.remove(copy)
            message.token, message.scope = copy.token, copy.scope
            self._held[copy.token] = message
        message.suspicions = self._alone.pop(message.token)
        message.deliveries = message.attempt
        message.suspect = False
        return True

    async def _take_suspect(self, index: int) -> None:
        """Take one of the suspects of a queue, if there is one. It has arrived then."""
        try:
            await self._hub.io.run(self._inlet.take_suspect(index))
        except (TransportError, AMQPError) as error:
            log.warning("suspects of %s wait: %s", self._inlet.queues[index], error)

    async def _look_for_suspects(self) -> None:
        """Take suspects that other processes left, one at a time, while nothing else is in hand.

        Not before this process has lived for a while: where processes are killed soon after their start, a suspect that
        they take would be blamed for it.
        """
        pause = STEADY
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause * (1 + random.random() / 4))
                return
            pause = STEADY
            if not self._window or not self._epoch or (self._apart and self._held):
                continue
            queues = self._inlet.queues
            try:
                counts = await self._hub.io.run(self._inlet.waiting([suspects_of(queue) for queue in queues]))
            except (TransportError, AMQPError):
                continue
            if any(counts):
                pause = _SOON
                await self._take_alone(max(range(len(queues)), key=counts.__getitem__))

    async def _take_alone(self, index: int) -> None:
        self._clearing = True  # so that nothing more is received meanwhile
        try:
            self._withdraw()
            self._see_whether_empty()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STEADY):  # handlers may take hours, and a suspect shall not wait for ever
                    await self._empty.wait()
            await self._quiet.wait()
            await self._give_back()
            if self._window and not self._ending.is_set():
                await self._take_suspect(index)
        finally:
            self._clearing = False
            self._wake()

    def _see_whether_empty(self) -> None:
        if self._held:
            self._empty.clear()
        else:
            self._empty.set()

    async def flush(self) -> None:
        """Return when the broker has all acks."""
        await self._hub.io.run(self._inlet.flush())

    # -- looking

    def status(self) -> SourceStatus:
        """How the source is. `held_by_broker`: returned by `receive` and not settled."""
        scopes = frozenset({self._epoch}) if self._epoch else frozenset()
        blocked = self._hub.blocked
        state: Literal["connecting", "running", "paused", "blocked", "stopped"] = (
            "running" if self._window else "paused"
        )
        if self._stopped:
            state = "stopped"
        elif not self._epoch:
            state = "connecting"
        elif blocked:
            state = "blocked"
        return SourceStatus(
            state=state,
            since=self._since,
            error=self._trouble or blocked,
            scopes=scopes,
            held_by_broker=len(self._held),
        )

    def _state(self, trouble: str | None) -> None:
        if (trouble is None) != (self._trouble is None):
            self._since = time.time()
        self._trouble = trouble

    async def backlog(self) -> Backlog | None:
        """What waits in the queues of this subscription, and its suspects; not what waits on the delay ladder, which
        all groups share. How old the first is cannot be told: the head of a queue is not seen without taking it.
        """
        queues = [*self._inlet.queues, *map(suspects_of, self._inlet.queues)]
        count = sum(await self._hub.io.run(self._inlet.waiting(queues))) + len(self._buffer)
        return Backlog(count, None if count else 0.0)

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give back what is not settled, uncounted, but for `keep`: for that the connection stays open until this
        process ends. Idempotent."""
        if self.closed:
            return
        self.stop()
        self.closed = True
        kept = {message.token for message in keep if message.scope == self._epoch}
        try:
            async with asyncio.timeout(self._hub.timeout):
                await self._quiet.wait()
                if self._looking is not None:
                    await asyncio.wait({self._looking, *self._tasks})
                held = [message for tag, message in self._held.items() if tag not in kept]
                await self.settle((), [Settlement(message, "release") for message in [*self._buffer, *held]])
                await self.flush()
        except (TimeoutError, TransportError) as error:
            log.warning(
                "%d messages go back to %s as if this process had died: %s", len(self._held), self._inlet, error
            )
        for task in (*self._tasks, *([self._looking] if self._looking else ())):
            task.cancel()
        self.kept = bool(kept)
        if not kept:
            await self._hub.io.run(self._inlet.close())

    def _in_background(self, work: Awaitable[Any], *, last: bool = False) -> asyncio.Task[None]:
        """Run it beside; `last`: it lasts as long as the source."""

        async def run() -> None:
            try:
                await work
            except Exception:
                log.exception("the source of %s goes on after", self._inlet)

        task = asyncio.ensure_future(run())
        if not last:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return task


_GONE = "its channel has ended, and the broker hands the message out again"
