"""Processors on threads, for handlers that are plain functions."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import HandlerTimeout
from ..message import QUEUED, RUNNING, Message
from .batchers import Batchers
from .endings import Endings
from .failures import Failures
from .processors import NEARLY, SWEEPS
from .settler import PipelineSettler
from .spans import Spans
from .spec import PipelineSpec
from .thread_calls import returned_awaitable
from .unset import always

log = logging.getLogger("sluiceway")


class _Slot:
    """What one thread is doing. `claim` holds its message: whoever takes it out says how the message ended."""

    __slots__ = ("claim", "overdue", "seen", "since")

    def __init__(self) -> None:
        self.claim: list[Message[Any]] = []
        self.overdue: Message[Any] | None = None  # abandoned, and to be settled when the thread returns
        self.seen: Message[Any] | None = None
        self.since = 0.0


class ThreadProcessors(Endings):
    """Up to `concurrency` threads that pull from one queue.

    Threads take messages themselves, and the loop hears of what they finished in one call per burst, not per message.
    A thread cannot be cancelled: one that runs over `timeout` is abandoned. Its message fails, another thread takes its
    place, and what it returns one day is dropped. `on_exhausted` is called when as many are abandoned and have not
    returned as there are processors: the process cannot be trusted with more.
    """

    def __init__(self, spec: PipelineSpec, settler: PipelineSettler, batchers: Batchers, failures: Failures) -> None:
        super().__init__(spec, settler, batchers, failures)
        self.still_on_thread: Callable[[Message[Any]], bool] = always
        self._handle: Callable[[Message[Any]], Any] = spec.handle  # looked up for each message: listeners come and go
        self._abandoned: set[_Slot] = set()  # until they return, if ever
        self._threads = 0
        self._closed = False
        self._queue: SimpleQueue[Message[Any] | None] = SimpleQueue()
        self._done: deque[tuple[Message[Any], Any, BaseException | None]] = deque()
        settler.following = self._done
        self._told = False
        self._inside = 0  # messages put and not collected
        self._slots: list[_Slot] = []
        self._sweep: asyncio.TimerHandle | None = None
        if spec.timeout is not None:
            self._sweep = self._loop.call_later(spec.timeout / SWEEPS, self._sweep_slots, spec.timeout)

    def listeners_changed(self, spans: Spans) -> None:
        self._handle = spans.handler_on_thread(self.spec.handle)

    @property
    def unstarted(self) -> int:
        return self._queue.qsize()

    @property
    def running(self) -> int:
        return self._inside - self._queue.qsize() + len(self._failing)

    @property
    def idle(self) -> bool:
        return self._inside < self.spec.concurrency

    def put(self, messages: Sequence[Message[Any]]) -> None:
        self._inside += len(messages)
        self._note_occupancy()
        for message in messages:
            self._queue.put(message)
        while len(self._slots) < min(self.spec.concurrency, self._inside):
            self._start()

    def take_unstarted(self) -> list[Message[Any]]:
        taken: list[Message[Any]] = []
        while True:
            try:
                message = self._queue.get_nowait()
            except Empty:
                break
            if message is not None:
                self._inside -= 1
                if message.state == QUEUED:
                    taken.append(message)
        self._note_occupancy()
        return taken

    def holds(self, message: Message[Any]) -> bool:
        """Whether a thread runs the message's handler."""
        return any(message in slot.claim for slot in self._slots)

    def cancel(self) -> int:
        """A thread cannot be cut off: what it runs stays unsettled, and comes back when the process is gone."""
        return self._cancel_failing()

    async def end(self) -> None:
        pass

    def close(self) -> Collection[asyncio.Task[None]]:
        if self._sweep is not None:
            self._sweep.cancel()
        self._closed = True
        for _ in range(self._threads):
            self._queue.put(None)
        self._cancel_failing()
        return list(self._failing)

    def _start(self) -> None:
        slot = _Slot()
        self._slots.append(slot)
        self._threads += 1
        # Daemons: a handler that never returns must not keep the process from ending after its drain.
        name = f"{self.spec.name}: processor {self._threads}"
        threading.Thread(target=self._work, args=(slot,), name=name, daemon=True).start()

    def _work(self, slot: _Slot) -> None:
        get, done, decode = self._queue.get, self._done, self.spec.decode
        settler, claim = self.settler, slot.claim
        while not self._closed:
            message = get()
            if message is None:
                return
            if message.state != QUEUED:
                done.append((message, None, None))
            else:
                message.state = RUNNING
                message.settler = settler
                claim.append(message)
                try:
                    message.payload = message.body if decode is None else decode(message.body)
                    handle = self._handle
                    value = handle(message)
                    if inspect.isawaitable(value):
                        raise returned_awaitable(handle, value)
                    outcome: tuple[Message[Any], Any, BaseException | None] = (message, value, None)
                except BaseException as error:
                    outcome = (message, None, error)
                try:
                    claim.pop()
                except IndexError:
                    self._returned_late(slot)
                    return
                done.append(outcome)
            if not self._told:
                self._told = True
                try:
                    self._loop.call_soon_threadsafe(self._collect)
                except RuntimeError:
                    return  # the loop is closed: the process ends, and the broker hands the message out again

    def _returned_late(self, slot: _Slot) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ended_late, slot)
        except RuntimeError:
            return  # the loop is closed

    def _ended_late(self, slot: _Slot) -> None:
        self._abandoned.discard(slot)
        message, slot.overdue = slot.overdue, None
        if message is not None and not self._closed:
            self.settler.overdue.discard(message)
            self._fail([message])

    def _collect(self) -> None:
        """Take what threads have finished since the last call."""
        self._told = False
        failed: list[Message[Any]] = []
        for _ in range(len(self._done)):
            message, value, error = self._done.popleft()
            self._inside -= 1
            if error is None:
                error = message.error
            if error is None and message.state == RUNNING:
                try:
                    self._succeed(message, value)
                except Exception as raised:
                    error = raised
            if error is not None:
                message.error = error
                failed.append(message)
        if failed:
            self._fail(failed)
        self._note_occupancy()
        self.on_idle()

    def _note_occupancy(self) -> None:
        running = min(self._inside, self.spec.concurrency)
        self.settler.occupancy.processing(self._loop.time(), running, self.spec.concurrency - running)

    def _sweep_slots(self, timeout: float) -> None:
        """Abandon threads that run over `timeout`."""
        now = self._loop.time()
        for slot in list(self._slots):
            message = next(iter(slot.claim), None)
            if message is not slot.seen:
                slot.seen, slot.since = message, now
            elif message is not None and now - slot.since >= timeout * NEARLY:
                self._abandon(slot, message, timeout)
        self._sweep = self._loop.call_later(timeout / SWEEPS, self._sweep_slots, timeout)

    def _abandon(self, slot: _Slot, message: Message[Any], timeout: float) -> None:
        try:
            slot.claim.pop()
        except IndexError:
            return  # it finished this very moment
        self._slots.remove(slot)
        self._abandoned.add(slot)
        error = HandlerTimeout(
            f"{self.spec.name}: message {message.id} ran over {timeout} s; a thread cannot be cancelled, "
            "so it is abandoned and another takes its place"
        )
        if self.spec.ordered and message.key is not None:
            self._hold(slot, message, error)
        else:
            self._done.append((message, None, error))
        self._collect()
        self._start()
        if len(self._abandoned) >= self.spec.concurrency:
            self.on_exhausted()

    def _hold(self, slot: _Slot, message: Message[Any], error: BaseException) -> None:
        """Settle an abandoned message only when its thread returns, so that nothing of its key passes it."""
        log.error("%s; it stays unsettled until then, and later ones of key %r wait", error, message.key)
        message.error, slot.overdue = error, message
        self._inside -= 1
        self.settler.overdue.add(message)
        self.settler.out_of_sight((message,))
        self.on_abandoned(message)
