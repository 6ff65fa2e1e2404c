"""Processors: workers that run the handler on the loop, in runs over one shared queue."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from ..errors import HandlerTimeout, Release
from ..message import QUEUED, RUNNING, SETTLED, Handler, Message
from .batchers import Batchers
from .endings import Endings
from .failures import Failures
from .settler import PipelineSettler
from .spans import Span, Spans
from .spec import PipelineSpec
from .unset import no

log = logging.getLogger("sluiceway")

RUN = 64  # messages that a processor takes before it lets the loop turn: heartbeats and timers live, and runs amortise
NEARLY = 1 - 1e-6  # sums of floats
SWEEPS = 20  # how often per `timeout` the sweep looks; a timeout is late by at most this share of it


class Queue(Protocol):
    """Where messages go to be handled: the processors, or the lanes before them."""

    def put(self, messages: Sequence[Message[Any]]) -> None:
        """Queue messages, in order."""
        ...

    def put_checked(self, messages: Sequence[Message[Any]]) -> None:
        """The same, but that those whose `error` is set fail in their turn, and are not handled."""
        ...


class Processors(Queue, Protocol):
    """What the intake and the drain need of processors, on the loop or on threads."""

    on_idle: Callable[[], None]
    on_finished: Callable[[Message[Any]], None] | None
    on_crash: Callable[[BaseException], None]
    on_exhausted: Callable[[], None]
    on_abandoned: Callable[[Message[Any]], None]
    still_on_thread: Callable[[Message[Any]], bool]

    def listeners_changed(self, spans: Spans) -> None:
        """Somebody listens, or nobody any more, to runs or to messages."""
        ...

    @property
    def unstarted(self) -> int:
        """Messages whose handler was not entered."""
        ...

    @property
    def running(self) -> int:
        """Messages whose handler was entered and has not ended."""
        ...

    @property
    def idle(self) -> bool:
        """Whether a processor has nothing to do."""
        ...

    def take_unstarted(self) -> list[Message[Any]]:
        """Take back every message whose handler was not entered."""
        ...

    def holds(self, message: Message[Any]) -> bool:
        """Whether a thread runs the message's handler, which nobody can cut off."""
        ...

    def cancel(self) -> int:
        """Cut off what runs, where that can be done; returns how many."""
        ...

    async def end(self) -> None:
        """Let go of what is kept beside messages, when all of them are settled."""
        ...

    def close(self) -> Collection[asyncio.Task[None]]:
        """Cancel all; returns what has yet to end."""
        ...


class Slot:
    """What one processor is doing."""

    __slots__ = ("cancelled", "cancelled_for", "failed", "in_run", "message", "seen", "since", "span", "taken", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.message: Message[Any] | None = None
        self.seen: Message[Any] | None = None  # what the last sweep saw here
        self.since = 0.0  # since when, on the loop's clock
        self.cancelled_for: str | None = None  # why we cancelled the task
        self.cancelled: Message[Any] | None = None  # what it ran then
        self.in_run = False
        self.taken = 0  # messages of its run; known when that ends or one fails
        self.failed = 0  # of these
        self.span: Span | None = None  # of its run, when somebody listens


class AsyncProcessors(Endings):
    """Up to `concurrency` tasks over one deque.

    There is no task and no future per message: a processor takes message after message, lets the loop turn after a run
    of them, and sleeps when there are none. Tasks start when there is work for one more. A processor that comes to wait
    in a handler while more is there has one other woken, so that a burst spreads; where handlers never wait, one
    processor runs them all, and the others sleep on.
    """

    def __init__(self, spec: PipelineSpec, settler: PipelineSettler, batchers: Batchers, failures: Failures) -> None:
        super().__init__(spec, settler, batchers, failures)
        self.still_on_thread: Callable[[Message[Any]], bool] = no
        self._handle: Handler = spec.handle  # looked up for each message: listeners come and go
        self._span_of_run: Callable[[str], Span] | None = None
        self._in_run = 0  # processors within a run
        self._spreading = False  # `_spread` is about to be called
        self._noted = (0, 0)  # what the occupancy was told last
        self._abandoned: set[Slot] = set()  # until their handlers end, if ever
        self._closed = False
        self._ready: deque[Message[Any]] = deque()
        settler.following = self._ready
        self._sleepers: list[asyncio.Future[None]] = []
        self._slots: set[Slot] = set()
        self._sweep: asyncio.TimerHandle | None = None
        if spec.timeout is not None:
            self._sweep = self._loop.call_later(spec.timeout / SWEEPS, self._sweep_slots, spec.timeout)

    def listeners_changed(self, spans: Spans) -> None:
        self._handle = spans.handler(self.spec.handle)
        self._span_of_run = spans.of_runs()

    @property
    def unstarted(self) -> int:
        return len(self._ready)

    @property
    def running(self) -> int:
        return len(self._slots) - len(self._sleepers) + len(self._failing)

    @property
    def idle(self) -> bool:
        return bool(self._sleepers) or len(self._slots) < self.spec.concurrency

    def put(self, messages: Sequence[Message[Any]]) -> None:
        self._ready.extend(messages)
        self._wake_one()

    def take_unstarted(self) -> list[Message[Any]]:
        unstarted = [message for message in self._ready if message.state == QUEUED]
        self._ready.clear()
        return unstarted

    def holds(self, message: Message[Any]) -> bool:
        return False

    def cancel(self) -> int:
        running = [slot for slot in self._slots if slot.message is not None]
        for slot in running:
            self._cancel(slot, "shutdown")
        return len(running) + self._cancel_failing()

    async def end(self) -> None:
        pass

    def close(self) -> Collection[asyncio.Task[None]]:
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        tasks = {slot.task for slot in (*self._slots, *self._abandoned) if slot.task is not None} | self._failing
        for task in tasks:
            task.cancel()
        self._ready.clear()
        self._slots.clear()  # a handler that swallows this cancellation is the last that its processor runs
        return tasks

    def _wake_one(self) -> None:
        while self._sleepers:
            sleeper = self._sleepers.pop()
            if not sleeper.done():
                sleeper.set_result(None)
                return
        if len(self._slots) < self.spec.concurrency:
            self._start()

    def _spread(self) -> None:
        """Wake one more when the processor that began a run waits in a handler, and has not ended the run."""
        self._spreading = False
        if self._ready and self._in_run:
            self._wake_one()

    def _start(self) -> None:
        slot = Slot()
        self._slots.add(slot)
        slot.task = self._loop.create_task(self._work(slot), name=f"{self.spec.name}: processor {len(self._slots)}")
        slot.task.add_done_callback(lambda task: self._ended(slot, task))

    def _ended(self, slot: Slot, task: asyncio.Task[None]) -> None:
        self._slots.discard(slot)
        if slot in self._abandoned:
            self._abandoned.discard(slot)
            self.settler.overdue -= {slot.message}
        if self._ready and not self._closed:
            self._wake_one()  # somebody cancelled it between two messages: another takes its place
        self._run_ended(slot, asyncio.CancelledError() if task.cancelled() else task.exception())
        self._look_for_crash(task)

    def _run_started(self, slot: Slot) -> None:
        slot.in_run = True
        self._in_run += 1
        self._note_occupancy()
        if self._span_of_run is not None and slot.task is not None:
            slot.failed = 0
            slot.span = self._span_of_run(slot.task.get_name())

    def _run_ended(self, slot: Slot, error: BaseException | None = None) -> None:
        self._leave_run(slot)
        if slot.span is not None:
            slot.span.end(error, count=slot.taken, failed=slot.failed)
            slot.span = None

    def _leave_run(self, slot: Slot) -> None:
        if slot.in_run:
            slot.in_run = False
            self._in_run -= 1
        if not self._ready:  # else the next run begins in this very turn of the loop, and tells
            self._note_occupancy(falling_asleep=slot in self._slots)

    def _note_occupancy(self, *, falling_asleep: bool = False) -> None:
        """Idle are the processors that sleep, or are about to, and those that were not needed yet."""
        idle = self.spec.concurrency - len(self._slots) + len(self._sleepers) + falling_asleep
        if self._noted != (self._in_run, idle):
            self._noted = (self._in_run, idle)
            self.settler.occupancy.processing(self._loop.time(), self._in_run, idle)

    async def _sleep(self) -> None:
        sleeper = self._loop.create_future()
        self._sleepers.append(sleeper)
        self.on_idle()
        try:
            await sleeper
        except asyncio.CancelledError:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)
            raise

    async def _work(self, slot: Slot) -> None:
        ready, settler, decode = self._ready, self.settler, self.spec.decode
        add_to_batch, batch_changed = self.batchers.adder(), self.batchers.changed
        forming, nearly_full = self.batchers.plain()
        finished, call_soon = self.on_finished, self._loop.call_soon
        run = RUN  # so that the first turn looks round
        while True:
            if run >= RUN or not ready:
                slot.message, slot.taken = None, run
                if slot not in self._slots:
                    return  # it was abandoned and another has its place
                self._run_ended(slot)
                if not ready:
                    await self._sleep()
                else:
                    await asyncio.sleep(0)
                run = 0
                if len(ready) > 1 and not self._spreading:
                    self._spreading = True
                    call_soon(self._spread)
                if not ready:
                    continue
                self._run_started(slot)
            run += 1
            message = ready.popleft()
            if message.state != QUEUED:
                continue
            message.state = RUNNING
            message.settler = settler
            slot.message = message
            try:
                message.payload = message.body if decode is None else decode(message.body)
                handle = self._handle
                value = await handle(message)
                if message.error is not None:
                    await self._failed(slot, message, message.error)
                elif message.state == RUNNING:
                    if forming and len(forming) < nearly_full and message.routing is None:
                        if value is not None:  # as it is already; writing an attribute is a third of what this costs
                            message.value = value
                        forming.append(message)
                    elif add_to_batch is not None:
                        change = add_to_batch(message, value)
                        if change is not None:
                            batch_changed(message, change)
                    elif message.outputs is not None:
                        settler.ack(message)
                    else:
                        message.state = SETTLED
                        settler.acks.append(message)  # looked up each time: a send puts a new list there
                        if not settler.scheduled:
                            settler.schedule()
                    if finished is not None:
                        finished(message)
                else:
                    settler.handler_ended(message)
            except BaseException as error:
                slot.taken = run
                await self._failed(slot, message, error)

    async def _failed(self, slot: Slot, message: Message[Any], error: BaseException) -> None:
        if slot not in self._slots:
            await self._failed_late(message)
            raise asyncio.CancelledError  # it was abandoned, and another has its place
        if isinstance(error, asyncio.CancelledError):
            error = self._why_cancelled(slot, message, error)
        if isinstance(error, GeneratorExit):
            raise error
        message.error = error
        slot.failed += 1
        if self._keeps_lane(message) and any(calls.holds(message) for calls in self.spec.threads):
            self._hold(slot, message, error)
            for calls in self.spec.threads:
                await calls.returned(message)
            await self._failed_late(message)
            raise asyncio.CancelledError
        await self.failures.failed((message,))

    def _keeps_lane(self, message: Message[Any]) -> bool:
        """Whether the message is settled only when its handler has really ended: nothing of its key may pass it."""
        return self.spec.ordered and message.key is not None

    def _hold(self, slot: Slot, message: Message[Any], error: BaseException) -> None:
        log.error("%s; it stays unsettled until its handler ends, and later ones of key %r wait", error, message.key)
        self.settler.overdue.add(message)
        self.settler.out_of_sight((message,))
        self.on_abandoned(message)
        self._give_place(slot)

    def _give_place(self, slot: Slot) -> None:
        """Let another processor take the place of one whose handler does not end."""
        self._slots.discard(slot)
        self._abandoned.add(slot)
        if self._ready:
            self._wake_one()
        if len(self._abandoned) >= self.spec.concurrency:
            self.on_exhausted()

    async def _failed_late(self, message: Message[Any]) -> None:
        """The handler of an abandoned message has ended."""
        if message in self.settler.overdue and not self._closed:
            self.settler.overdue.discard(message)
            await self.failures.failed((message,))

    def _why_cancelled(self, slot: Slot, message: Message[Any], error: asyncio.CancelledError) -> BaseException:
        task = slot.task
        assert task is not None
        if not task.cancelling():
            return error  # an inner task of the handler was cancelled: the message failed
        reason, slot.cancelled_for = slot.cancelled_for, None
        if self._closed or (reason == "shutdown" and self.still_on_thread(message)):
            raise error
        task.uncancel()
        if reason is None or slot.cancelled is not message:
            return error  # somebody else's doing; or an earlier handler had swallowed that, and now an inner task was
        if reason == "timeout":
            return HandlerTimeout(f"{self.spec.name}: message {message.id} ran over {self.spec.timeout} s")
        return Release("shutdown")

    def _cancel(self, slot: Slot, reason: str) -> None:
        assert slot.task is not None
        slot.cancelled_for, slot.cancelled = reason, slot.message
        slot.task.cancel()

    def _sweep_slots(self, timeout: float) -> None:
        """Cancel what runs over `timeout`: one look at all slots now and then, never a timer per message."""
        now = self._loop.time()
        for slot in list(self._slots):
            if slot.message is not slot.seen:
                slot.seen, slot.since = slot.message, now
                self._forget_cancel(slot)
            elif slot.message is not None and now - slot.since >= timeout * NEARLY:
                if slot.cancelled_for is None:
                    self._cancel(slot, "timeout")
                    slot.since = now
                else:
                    self._abandon(slot, timeout)
        self._sweep = self._loop.call_later(timeout / SWEEPS, self._sweep_slots, timeout)

    def _forget_cancel(self, slot: Slot) -> None:
        """A handler swallowed its cancellation and returned: the next one starts with a clean task."""
        if slot.cancelled_for is not None and slot.task is not None and slot.task.cancelling():
            slot.cancelled_for = None
            slot.task.uncancel()

    def _abandon(self, slot: Slot, timeout: float) -> None:
        """Give up a handler that swallows its cancellation: its message fails, another processor takes its place."""
        message = slot.message
        assert message is not None
        message.error = HandlerTimeout(
            f"{self.spec.name}: message {message.id} ran over {timeout} s and ignored its cancellation"
        )
        if self._keeps_lane(message):
            self._hold(slot, message, message.error)
            return
        self._fail((message,))
        self._give_place(slot)
        self._leave_run(slot)  # its message is settled, though the handler runs on
