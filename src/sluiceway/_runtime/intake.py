"""The intake: asks the source for messages when there is room, and never for more than that."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from .._decisions.suspicion import group_size
from .._decisions.window import Window
from ..errors import DecodeError
from ..message import Message
from ..source import Source
from ..telemetry import Demanded, Queued, Received, Telemetry, WindowFull
from .batchers import Batchers
from .failures import Failures
from .gates import Gates
from .prepare import Preparer
from .processors import Processors, Queue
from .settler import PipelineSettler
from .spec import PipelineSpec

log = logging.getLogger("sluiceway.intake")

TICK = 1e-6  # seconds: a timer may fire a clock's resolution early, and asking again at once would be told the same
EMPTY = 0.001  # seconds to wait after a receive of nothing: a source may return at once, again and again


class Quarantine(Protocol):
    async def run(self, messages: Sequence[Message[Any]]) -> None: ...
    def stop(self) -> None: ...


class Intake:
    """One receive at a time.

    It asks when what has not started fell to half the window or a processor is idle, for as many as the window has
    room and the gates allow. A slot of the window is free when its settle returned.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        source: Source,
        window: Window,
        settler: PipelineSettler,
        processors: Processors,
        batchers: Batchers,
        failures: Failures,
        telemetry: Telemetry,
    ) -> None:
        self.spec = spec
        self.source = source
        self.window = window
        self.settler = settler
        self.processors = processors
        self.batchers = batchers
        self.failures = failures
        self.telemetry = telemetry
        self.queue: Queue = processors
        self.waiting_in_lanes = _none
        self.quarantine: Quarantine | None = None
        self.prepare: Preparer | None = None
        self.received = 0
        self.stopping = False
        self.asking = 0  # the demand of the receive that waits, 0 when none does
        self.release_unstarted: Callable[[], object] = _none
        self.leases_needed = threading.Event()
        self.last = False  # what is received now is handled, though a drain has begun
        self.draining = asyncio.Event()  # and has released what had not started
        self._prepare_for_draining = getattr(source, "prepare_for_draining", None)
        self._may_have_failed = spec.prepare is not None or getattr(source, "returns_failed", False)
        self._suspected = False  # the last receive had suspects
        self._largest = 0  # bytes, the largest body in it
        self._apart = False  # and they run apart
        self._ran_dry = True  # the processors had nothing more to do when the last receive returned
        self._told_full = False  # that the window is full, since the last receive
        self._paused = False
        self._long_closed: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        self._at_gates = False  # there would be room, but gates are closed
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self.gates = Gates(spec.gates, self.poke, self._take_back)
        for gate in spec.gates:
            gate.on_change(self._gate_changed)
        settler.on_stuck = self._gate_changed

    async def run(self) -> None:
        """Receive until `stop()`."""
        while not self.stopping:
            demand = self._demand()
            if demand <= 0:
                await self._wait_for_room()
                continue
            self._resume()
            messages = await self._receive(demand)
            if not messages:
                self._answered(0, demand)
                if not self.stopping:
                    await asyncio.sleep(EMPTY)
            elif len(messages) == demand or self._in_order or self._suspected:
                self._answered(len(messages), demand)
                await self._admit(messages)
                if len(messages) < demand or self.gates.contended:
                    await self._let_others_first()
            else:
                # The broker has no more: what it gave is handled first, then the books are kept. That takes a tenth off
                # the way of a single message.
                try:
                    await self._admit(messages)
                    await self._let_others_first()
                finally:
                    self._answered(len(messages), demand)
        if self._prepare_for_draining is not None:
            await self._receive_last(self._prepare_for_draining)

    async def _let_others_first(self) -> None:
        """What came is handled before more is asked for, and its acks are on their way: to ask takes longer than a turn
        of the loop, and what was asked first is answered first."""
        await asyncio.sleep(0)
        if self.settler.acks:
            await asyncio.sleep(0)

    async def _receive(self, demand: int) -> Sequence[Message[Any]]:
        self.asking = demand
        self._told_full = False
        now = self._loop.time()
        self.gates.ask(now, demand)
        self.settler.occupancy.asked(now)
        if Demanded in self.telemetry.attached:
            self.telemetry.emit(Demanded(consumer=self.spec.name, demand=demand))
        try:
            messages = await self.source.receive(demand)
            if messages and not isinstance(messages[0], Message):
                raise TypeError(
                    f"{self.spec.name}: a source's receive returns Messages, got {type(messages[0]).__name__}; "
                    "Pipeline(transform=...) makes Messages of anything else"
                )
            self.received += len(messages)
            self.settler.held.update(messages)
            if not self.leases_needed.is_set():
                self.leases_needed.set()
            self._look_at(messages)
        except BaseException:
            self._answered(0, demand)
            raise
        self.asking = 0
        self._ran_dry = not self.processors.unstarted
        return messages

    @property
    def _in_order(self) -> bool:
        """Whether somebody is to hear of a receive before its messages are handled."""
        return Received in self.telemetry.attached or self.prepare is not None

    def _answered(self, count: int, demand: int) -> None:
        """The receive brought `count` messages, or raised."""
        self.asking = 0
        now = self._loop.time()
        self.gates.answered(now, count)
        self.settler.occupancy.received(now, count, len(self.settler.held))
        if count:
            self.window.observe(now, self.settler.finished, starved=self._ran_dry)
            if Received in self.telemetry.attached:
                held, window = len(self.settler.held), self.window.size
                self.telemetry.emit(
                    Received(consumer=self.spec.name, demand=demand, count=count, held=held, window=window)
                )

    async def _receive_last(self, prepare_for_draining: Callable[[], Awaitable[object]]) -> None:
        """What a source puts out when a drain begins is handled; what has not started else is released."""
        await self.draining.wait()
        self.last = True
        try:
            await prepare_for_draining()
        except Exception:
            log.exception("%s: prepare_for_draining raised; the drain goes on", self.spec.name)
        self.source.resize(self.window.ceiling)
        self.source.stop()
        while not (self.closed or self.settler.stuck):
            demand = self.gates.allow(self._loop.time(), self.window.size - len(self.settler.held))
            if demand <= 0:
                await self._wait_for_room()
                continue
            messages = await self._receive(demand)
            self._answered(len(messages), demand)
            if not messages:
                return
            await self._admit(messages)

    def stop(self) -> None:
        """Ask for nothing more; a receive that waits returns. Idempotent."""
        if self._prepare_for_draining is None:
            self.source.stop()
        elif not self.stopping:
            self.source.resize(0)  # it stops when it has prepared
        self.stopping = True
        if self._long_closed is not None:
            self._long_closed.cancel()
        if self.quarantine is not None:
            self.quarantine.stop()
        self.poke()

    def poke(self) -> None:
        """Something changed that may make room: a settle returned, a processor ran dry, a gate opened."""
        room = self._room
        if room is not None and not room.done() and (self.stopping or self._may_ask() or self._starved()):
            room.set_result(None)

    def _may_ask(self) -> bool:
        free = self._free()
        return free > 0 and (not self._at_gates or self.gates.allow(self._loop.time(), free) > 0)

    def _demand(self) -> int:
        free = self._free()
        return self.gates.allow(self._loop.time(), free) if free > 0 else 0

    def _free(self) -> int:
        """How many the window has room for; 0 while enough waits for the processors."""
        free = self.window.size - len(self.settler.held)
        unstarted = self.processors.unstarted + self.waiting_in_lanes()
        if free <= 0 or self.settler.stuck or not (self.processors.idle or unstarted <= self.window.size // 2):
            return 0
        if self._apart:
            free = min(free, group_size(self.spec.ceiling))  # more may be suspects; what does not run now goes back
        return free

    async def _wait_for_room(self) -> None:
        if self._starved():
            self.batchers.emit_oldest()
        if not self._told_full and len(self.settler.held) >= self.window.size:
            self._told_full = True
            if self.telemetry.wants(WindowFull):
                self.telemetry.emit(WindowFull(consumer=self.spec.name, window=self.window.size))
        room = self._room = self._loop.create_future()
        timer: asyncio.TimerHandle | None = None
        self._at_gates = self._free() > 0
        try:
            if self._at_gates:
                now = self._loop.time()
                at = self.gates.wait(now)
                timer = None if at is None else self._loop.call_at(max(at, now + TICK), _wake, room)
            await room
        finally:
            self._room = None
            self.gates.wait_no_more()
            if timer is not None:
                timer.cancel()

    def _starved(self) -> bool:
        """Whether forming batches fill the window and nothing else goes on that would make room."""
        free = self.window.size - len(self.settler.held)
        return (
            free < min(self.spec.concurrency, self.window.size)
            and self.batchers.forming > 0
            and not (self.processors.running or self.processors.unstarted)
            and not (self.batchers.busy or self.settler.unsent)
        )

    def _look_at(self, messages: Sequence[Message[Any]]) -> None:
        """Whether there are suspects among what was received, and how large it is: one pass for both questions."""
        sizes = [len(message.body) for message in messages if not message.suspect]
        self._suspected = len(sizes) < len(messages)
        if self._suspected:
            sizes = [len(message.body) for message in messages]
        self._largest = max(sizes, default=0)

    async def _admit(self, messages: Sequence[Message[Any]]) -> None:
        self.window.saw_body(self._largest)
        if self.spec.max_payload is not None and self._largest > self.spec.max_payload:
            self._fail_oversized(messages, self.spec.max_payload)
        if self.quarantine is not None and self._suspected:
            if not self._apart:
                log.warning("%s: a process died with messages in hand; they run apart from the others", self.spec.name)
            self._apart = True
            await self.quarantine.run(messages)
        else:
            self._apart = False
            if self.prepare is None:
                self._queue(messages)
            else:
                await self.put(messages)

    async def put(self, messages: Sequence[Message[Any]]) -> None:
        """Queue messages to be handled, in order; `prepare` has them first."""
        if self.prepare is not None:
            messages = await self.prepare(messages)
        self._queue(messages)

    def _queue(self, messages: Sequence[Message[Any]]) -> None:
        if self._may_have_failed:
            self.queue.put_checked(messages)
        else:
            self.queue.put(messages)
        if self.spec.batchers:
            self.settler.occupancy.queued(self._loop.time(), self.processors.unstarted)
        if Queued in self.telemetry.attached and messages:
            unstarted = self.processors.unstarted + self.waiting_in_lanes()
            self.telemetry.emit(Queued(consumer=self.spec.name, count=len(messages), unstarted=unstarted))

    def _fail_oversized(self, messages: Sequence[Message[Any]], limit: int) -> None:
        """These fail in their turn, so that a retry of one keeps the order of its key."""
        self._may_have_failed = True
        for message in messages:
            if len(message.body) > limit and message.error is None:
                message.error = DecodeError(f"the body has {len(message.body)} bytes; max_payload allows {limit}")

    @property
    def closed(self) -> bool:
        """Whether a gate is closed."""
        return not self.gates.is_open(self._loop.time())

    @property
    def closed_by(self) -> str:
        """Which gates are closed, as text; "" when none is.

        A gate may forget something when it is asked, so it is asked in the loop alone. To another thread, such as one
        that scrapes metrics, this says whether the intake waits at gates.
        """
        if threading.get_ident() != self._thread:
            return "a gate" if self._at_gates and self._room is not None else ""
        return self.gates.shut_by(self._loop.time())

    def _gate_changed(self) -> None:
        """A closed gate, or a settle that the broker rejects, also takes back the demand of a receive that waits.

        What has not started half a lease later goes back to the broker: another process may have an open gate.
        """
        if self.stopping:
            return
        if not (self.closed or self.settler.stuck):
            self._resume()
        else:
            self._take_back()
            if self.source.lease is not None and self._long_closed is None:
                self._long_closed = self._loop.call_later(self.source.lease / 2, self.release_unstarted)
        if self._room is not None:
            _wake(self._room)  # also when it is closed still: it may open earlier than was said

    def _take_back(self) -> None:
        """Let a receive that waits return: a gate has closed, or others wait at it and nothing comes here."""
        if not (self._paused or self.stopping):
            self._paused = True
            self.source.resize(0)

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self.source.resize(self.window.ceiling)
            if self._long_closed is not None:
                self._long_closed.cancel()
                self._long_closed = None


def _wake(room: asyncio.Future[None]) -> None:
    """Look again, whatever has changed: a gate opens by time, and another may still be closed."""
    if not room.done():
        room.set_result(None)


def _none() -> int:
    return 0
