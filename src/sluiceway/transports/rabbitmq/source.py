"""The source: one subscription, as the event loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from ...errors import TransportError
from ...message import Message, Refused, Settlement
from ...source import Backlog, Renewer, SourceStatus, Subscription
from .arrivals import Arrivals
from .copies import Copies
from .credit import Credit
from .hand import Hand
from .hub import Hub
from .suspects import Suspects
from .topology import suspects_of
from .wire import Delivery

log = logging.getLogger("sluiceway")

_GRACE = 0.5  # seconds of a pause before what has arrived goes back: most pauses are shorter


class RabbitMQSource:
    """One subscription, on a connection of its own. Its scope is the connection's epoch.

    The broker may push as many messages as the pipeline has held and asked for at once in the last seconds, and never
    more than the window: what waits beside a slow handler could be handled elsewhere. While there are suspects it
    pushes for one `receive` at a time, so that nothing is in hand beside what runs.
    """

    _sets_apart = True  # while there are suspects nothing else is in hand
    settles_at_once = True  # acks only: they are handed to the I/O thread, and the broker answers none
    returns_failed = True

    def __init__(self, hub: Hub, subscription: Subscription) -> None:
        self.lease: float | None = None
        self.renewer: Callable[[], Renewer] | None = None
        self.closed = False
        self.kept = False  # closed, and its connection is open, for what still runs on threads
        self.loop = asyncio.get_running_loop()
        self._hub = hub
        self._subscription = subscription
        self._window = subscription.window
        queues = [hub.names.queue(subscription.group, topic) for topic in subscription.topics]
        self._inlet = hub.inlet(subscription, queues, self)
        copies = Copies(hub, subscription)
        self._hand = self._make_hand(copies)
        self._credit = self._make_credit()
        self._arrivals = Arrivals(hub, self._hand, queues, subscription)
        self._suspects = Suspects(hub, self._inlet, self._hand, copies, self._credit, self)
        self._apart = False  # there are suspects
        self._lasting: list[asyncio.Task[None]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._demand = 0
        self._stopped = False
        self._ending = asyncio.Event()  # it has stopped
        self._trouble: str | None = None
        self._since = time.time()
        self._tasks: set[asyncio.Task[None]] = set()

    def _make_hand(self, copies: Copies) -> Hand:
        return Hand(self._hub, self._inlet, copies, self.settled)

    def _make_credit(self) -> Credit:
        return Credit(self._hub, self._inlet, self._hand)

    async def open(self) -> None:
        """Make the group's queues and connect. Raises TransportError."""
        await self._hub.io.run(self._inlet.open())
        self._lasting.append(self._in_background(self._suspects.look(self._ending), last=True))

    # -- what the I/O thread says

    def opened(self, epoch: int) -> None:
        self._hand.opened(epoch)
        self._credit.opened()
        self._state(None)
        self.wake()

    def arrived(self, epoch: int, deliveries: list[Delivery]) -> None:
        if epoch != self._hand.epoch:
            return
        self._took(deliveries)

    def _took(self, deliveries: list[Delivery]) -> None:
        suspected, early = self._arrivals.take(deliveries)
        self._apart = self._apart or (suspected and self._sets_apart)
        if early:  # what is not due yet goes up to its next rung
            self._in_background(self._insist(early))
        if self._apart:
            self._credit.withdraw()
        if self._hand.buffer:
            self.wake()

    def quiet(self, epoch: int) -> None:
        if epoch == self._hand.epoch:
            self._credit.is_quiet()
            self.wake()

    def lost(self, epoch: int, reason: str) -> None:
        if self._hand.epoch:
            self._in_background(self._subscription.on_revoke(frozenset({self._hand.epoch}), None))
        self._hand.ended()
        self._credit.ended()
        self._suspects.emptied()
        self._state(reason)
        self.wake()

    # -- receiving

    @property
    def receives(self) -> bool:
        """Whether it may take a suspect now."""
        hand = self._hand
        return bool(self._window and hand.epoch and not self._stopped and not (self._apart and hand.held))

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or while the window is 0.

        A lost connection is waited out, and `status()` says so.
        """
        while not self._stopped and self._window:
            if self._suspects.clearing:
                pass
            elif self._apart:
                await self._credit.quiet.wait()
                if self._hand.buffer:
                    messages = self._hand.take(demand, self._subscription.max_bytes)
                    self._apart = any(message.suspect for message in messages)
                    self._in_background(self.give_back())
                    await asyncio.wait(self._tasks, timeout=self._hub.timeout)
                    return messages
            elif messages := self._hand.take(demand, self._subscription.max_bytes):
                return messages
            self._demand = demand
            if not self._suspects.clearing:
                self._ask()
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return ()

    def _ask(self) -> None:
        self._credit.ask(self._demand, self._window, apart=self._apart)

    def settled(self) -> None:
        """There is less in hand."""
        if self._suspects.clearing:
            self._suspects.see_whether_empty()
        elif self._waiter is not None and self._credit.stale:
            self._ask()

    def resize(self, window: int) -> None:
        """Change the window. 0 pauses: a waiting `receive` returns nothing, and what has arrived for it goes back."""
        if (window == 0) != (self._window == 0):
            self._since = time.time()
        if window < self._window:
            self._credit.withdraw()
        self._window = window
        if window == 0:
            self._in_background(self._clear())
        self.wake()

    def stop(self) -> None:
        """Receive nothing more: a waiting `receive` returns nothing, and what has arrived goes back. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._ending.set()
            self._since = time.time()
            self._credit.withdraw()
            self._in_background(self._clear())
            self.wake()

    async def _clear(self) -> None:
        if not self._stopped:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), _GRACE)
        await self._credit.quiet.wait()
        if self._stopped or not self._window:
            await self.give_back()

    async def give_back(self) -> None:
        """Hand back what has arrived and nobody asked for."""
        buffer, self._hand.buffer = self._hand.buffer, []
        if buffer:
            await self._insist([Settlement(message, "release") for message in buffer])

    async def moves(self, message: Message[Any]) -> None:
        """A message is about to move to the suspects."""

    async def has_turn(self, queue: int) -> bool:
        """Whether it is this process that may run what is of a queue."""
        return True

    async def _insist(self, settlements: Sequence[Settlement]) -> None:
        while True:
            try:
                await self.settle((), settlements)
            except TransportError as error:
                log.warning("handing back %d messages failed: %s; trying again", len(settlements), error)
                await asyncio.sleep(1.0)
            else:
                return

    def wake(self) -> None:
        """Let a waiting receive look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- settling

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries. Acks are on their way when it returns; `flush` waits for them.

        What belongs to others (copies for a retry or a release, dead letters, outputs) is confirmed by the broker
        before its delivery is acknowledged. Raises TransportError when it cannot be published now.
        """
        return await self._hand.settle(acks, others)

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected: a copy among the suspects takes its place, and is taken to be run.

        The broker counts how often it comes back from there: that is how often a process died while it ran alone, so
        nothing more is written before its further runs. False: the message is not ours any more; or another process
        took the copy. Raises TransportError when it cannot be written now.
        """
        return await self._suspects.write_down(message)

    async def flush(self) -> None:
        """Return when the broker has all acks."""
        await self._hub.io.run(self._inlet.flush())

    # -- looking

    def status(self) -> SourceStatus:
        """How the source is. `held_by_broker`: returned by `receive` and not settled."""
        scopes = frozenset({self._hand.epoch}) if self._hand.epoch else frozenset()
        blocked = self._hub.blocked
        state: Literal["connecting", "running", "paused", "blocked", "stopped"] = (
            "running" if self._window else "paused"
        )
        if self._stopped:
            state = "stopped"
        elif not self._hand.epoch:
            state = "connecting"
        elif blocked:
            state = "blocked"
        return SourceStatus(
            state=state,
            since=self._since,
            error=self._trouble or blocked,
            scopes=scopes,
            held_by_broker=len(self._hand.held),
        )

    def _state(self, trouble: str | None) -> None:
        if (trouble is None) != (self._trouble is None):
            self._since = time.time()
        self._trouble = trouble

    async def backlog(self) -> Backlog | None:
        """What waits in the queues of this subscription, its suspects, and the retries that this source has put off;
        not what others have on the delay ladder, which all groups share. How old the first is cannot be told: the head
        of a queue is not seen without taking it.
        """
        queues = [*self._inlet.queues, *map(suspects_of, self._inlet.queues)]
        waiting = sum(await self._hub.io.run(self._inlet.waiting(queues)))
        count = waiting + len(self._hand.buffer) + self._hand.put_off
        return Backlog(count, None if count else 0.0)

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give back what is not settled, uncounted, but for `keep`: for that the connection stays open until this
        process ends. Idempotent."""
        if self.closed:
            return
        self.stop()
        self.closed = True
        kept: set[int] = {message.token for message in keep if message.scope == self._hand.epoch}
        try:
            async with asyncio.timeout(self._hub.timeout):
                await self._credit.quiet.wait()
                if tasks := {*self._lasting, *self._tasks}:
                    await asyncio.wait(tasks)
                await self._give_all_back(kept)
        except (TimeoutError, TransportError) as error:
            log.warning(
                "%d messages go back to %s as if this process had died: %s", len(self._hand.held), self._inlet, error
            )
        for task in (*self._tasks, *self._lasting):
            task.cancel()
        self.kept = bool(kept)
        if not kept:
            await self._hub.io.run(self._inlet.close())

    async def _give_all_back(self, kept: set[int]) -> None:
        """All but those with the tags `kept`."""
        left = [message for message in self._hand.unsettled() if message.token not in kept]
        await self.settle((), [Settlement(message, "release") for message in left])
        await self.flush()

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
