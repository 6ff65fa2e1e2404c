"""A batcher gathers handled messages; its batch processors run the batch handler."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Hashable
from typing import Any

from .._decisions.batching import Change, Emitted, Forming
from ..batch import Batch, BatchInfo, Trigger
from ..errors import HandlerTimeout, Release
from ..message import Message
from ..telemetry import BatchEmitted, Telemetry
from .batch_order import BatchOrder, behind_failed
from .failures import Failures
from .settler import PipelineSettler
from .spans import Span, Spans
from .spec import BatcherSpec, PipelineSpec
from .unset import nothing, raise_it

log = logging.getLogger("sluiceway")


class _Run:
    """What one batch processor is doing."""

    __slots__ = ("abandoned", "cancelled_for", "inside", "messages", "span", "task", "timer")

    def __init__(self) -> None:
        self.messages: list[Message[Any]] = []
        self.inside = 0  # messages in the batch handler
        self.span: Span | None = None
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.cancelled_for: str | None = None
        self.abandoned: BaseException | None = None  # why, when its messages are settled only once it has ended


class Batcher:
    """One batcher and its batch processors.

    A batch is emitted by size, time, flush, drain or starvation into a queue from which up to `concurrency` batch
    processors take; they are tasks that start when there is work and end when there is none. A batch handler that runs
    over `timeout` is cancelled; one that ignores that for as long again is abandoned: its messages fail, and another
    takes its place.
    """

    def __init__(
        self, spec: PipelineSpec, batcher: BatcherSpec, settler: PipelineSettler, failures: Failures, hub: Telemetry
    ) -> None:
        self.spec = spec
        self.batcher = batcher
        self.settler = settler
        self.failures = failures
        self.telemetry = hub
        self.spans = Spans(spec, hub)
        self.forming = Forming(batcher.name, batcher.size, batcher.timeout, batcher.key, batcher.split)
        self.queue: deque[Emitted] = deque()
        self.on_idle: Callable[[], None] = nothing
        self.on_crash: Callable[[BaseException], None] = raise_it
        self.on_exhausted: Callable[[], None] = nothing
        self.order: BatchOrder | None = None
        self._overdue: set[_Run] = set()  # abandoned ones that hold their messages until they end, if ever
        self._closed = False
        self._runs: set[_Run] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # of the runs, of those abandoned, and of what these failed
        self._failing: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def busy(self) -> bool:
        """Whether a batch runs or waits to run."""
        return bool(self._runs or self.queue or self._failing)

    def changed(self, change: Change) -> None:
        """A message opened a batch, or made it full."""
        if change.kind == "opened":
            self._set_timer(self.forming.opened(change.key, self._loop.time()))
        else:
            self._emit(self.forming.take(change.key, change.kind))

    def emit_all(self, trigger: Trigger) -> None:
        """Emit what is forming."""
        for emitted in self.forming.take_all(trigger):
            self._emit(emitted)

    def emit_oldest(self) -> None:
        """Emit the batch that waits longest: the window is full of forming batches."""
        emitted = self.forming.take_oldest()
        if emitted is not None:
            self._emit(emitted)

    def cancel(self) -> int:
        """Cut off what runs; returns how many batches. Their messages are released."""
        runs = list(self._runs)
        for run in runs:
            self._cancel(run, "shutdown")
        return len(runs)

    def take_unstarted(self) -> list[Message[Any]]:
        """Take back every message whose batch handler was not entered."""
        emitted = [*self.queue, *self.forming.take_all("drain")]
        self.queue.clear()
        return [message for messages, _ in emitted for message in messages]

    def close(self) -> Collection[asyncio.Task[None]]:
        """Cancel all; returns what has yet to end."""
        self._closed = True
        self.queue.clear()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        return list(self._tasks)

    def _emit(self, emitted: Emitted) -> None:
        self.queue.append(emitted)
        if self.telemetry.wants(BatchEmitted):
            self.telemetry.emit(BatchEmitted(consumer=self.spec.name, info=emitted[1]))
        if self.order is not None:
            self.order.enter(emitted[0])
        self.start()

    def emit(self, key: Hashable) -> None:
        """Emit the batch of `key`, if one is forming: a later message of one in it goes to another batch."""
        if self.forming.has(key):
            self._emit(self.forming.take(key, "order"))

    def drop(self, messages: Collection[Message[Any]]) -> None:
        """Take messages out of batches that have not run: they go back to the broker."""
        self.forming.remove(messages)
        if self.order is not None:
            self.order.drop(self.queue, messages)

    def _next(self) -> int | None:
        """Where the batch is in the queue that runs next; None when none may."""
        if self.order is not None:
            return self.order.next_in(self.queue)
        return 0 if self.queue else None

    def start(self) -> None:
        """Start one more batch processor, if there is work for it."""
        if len(self._runs) < self.batcher.concurrency and self._next() is not None:
            run = _Run()
            self._runs.add(run)
            run.task = self._watch(self._work(run), f"batcher {self.batcher.name}")

    def _watch(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=f"{self.spec.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._failing.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.on_crash(error)
        self.on_idle()

    def _set_timer(self, due: float) -> None:
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        # A timer may fire a clock's resolution early; what is due by then must go, or it would wait a whole turn more.
        for emitted in self.forming.take_due(self._loop.time() + 0.001):
            self._emit(emitted)
        due = self.forming.next_due()
        if due is not None:
            self._set_timer(due)

    async def _work(self, run: _Run) -> None:
        try:
            while (index := self._next()) is not None:
                messages, info = self.queue[index]
                del self.queue[index]
                self.start()  # one other, if there is work for it: a batch that ends may free several
                self._batch_started(run, messages, info)
                error = await self._handle(run, Batch(messages, info))
                if error is not None and self._hold_while_on_thread(run, error):
                    for calls in self.spec.threads:
                        await calls.returned(messages[0])
                self._end_overdue(run)
                if run not in self._runs and (run.abandoned is None or self._closed):
                    return  # its messages are settled, or go back with all others; another has its place
                await self._settle(run, messages, run.abandoned or error)
                if run.abandoned is not None:
                    return
        finally:
            self._end_overdue(run)
            # Now, not when the task's callbacks run: what is emitted until then needs a new one.
            self._runs.discard(run)
            self._batch_ended(run, asyncio.CancelledError(), 0)  # it was cut off, or has ended before

    def _end_overdue(self, run: _Run) -> None:
        if run in self._overdue:
            self._overdue.discard(run)
            self.settler.overdue.difference_update(run.messages)

    async def _settle(self, run: _Run, messages: list[Message[Any]], error: BaseException | None) -> None:
        behind = behind_failed(messages) if self.order is not None and error is None else []
        failed = self.settler.ack_batch([one for one in messages if one not in behind] if behind else messages, error)
        self._batch_ended(run, error, len(failed))
        if failed:
            await self.failures.failed(failed)
        if self.order is not None:
            self.settler.ack_batch(behind, None)  # but for those that are parked by now
            self.order.over(messages)

    def _batch_started(self, run: _Run, messages: list[Message[Any]], info: BatchInfo) -> None:
        run.messages, run.inside = messages, len(messages)
        self._add_inside(run.inside)
        run.span = self.spans.batch(info, messages)

    def _batch_ended(self, run: _Run, error: BaseException | None, failed: int) -> None:
        if run.inside:
            self._add_inside(-run.inside)
            run.inside = 0
        if run.span is not None:
            run.span.end(error, failed=failed)
            run.span = None

    def _add_inside(self, count: int) -> None:
        inside = self.settler.occupancy.batched
        inside.step(self._loop.time(), inside.count + count)

    async def _handle(self, run: _Run, batch: Batch[Any]) -> BaseException | None:
        """Run the batch handler; returns what fails the whole batch."""
        self._set_limit(run)
        try:
            await self.batcher.handle(batch)
        except asyncio.CancelledError as error:
            return self._why_cancelled(run, error)
        except GeneratorExit:
            raise
        except BaseException as error:
            return error
        finally:
            if run.timer is not None:
                run.timer.cancel()
        self._forget_cancel(run)  # it swallowed one and returned
        return None

    def _set_limit(self, run: _Run) -> None:
        if self.spec.timeout is not None:
            run.timer = self._loop.call_later(self.spec.timeout, self._over_time, run)

    def _over_time(self, run: _Run) -> None:
        if run.cancelled_for is None:
            self._cancel(run, "timeout")
            self._set_limit(run)
            return
        error = self._timeout_error(run, " and ignored its cancellation")
        if self.order is not None:
            self._hold(run, error)
            return
        self._runs.discard(run)
        failed = self.settler.ack_batch(run.messages, error)
        self._batch_ended(run, error, len(failed))
        self._failing.add(self._watch(self.failures.failed(failed), "what an abandoned batch failed"))
        self.start()

    def _hold(self, run: _Run, error: BaseException) -> None:
        """Abandon a run in order: its messages are settled when it has ended, so that nothing of their keys passes."""
        log.error("%s; %d messages wait for its end, and so do later ones of their keys", error, len(run.messages))
        run.abandoned = error
        self._runs.discard(run)
        self._overdue.add(run)
        self.settler.overdue.update(run.messages)
        self.settler.out_of_sight(run.messages)
        self._batch_ended(run, error, len(run.messages))
        if self.order is not None:
            self.order.abandon(run.messages)
        self.start()
        if len(self._overdue) >= self.batcher.concurrency:
            self.on_exhausted()

    def _hold_while_on_thread(self, run: _Run, error: BaseException) -> bool:
        """Whether a thread runs on with the batch, whose caller was cancelled; in order its messages wait for that."""
        if self.order is None or not any(calls.holds(run.messages[0]) for calls in self.spec.threads):
            return False
        if run in self._runs:
            self._hold(run, error)
        return True

    def _cancel(self, run: _Run, reason: str) -> None:
        assert run.task is not None
        run.cancelled_for = reason
        run.task.cancel()

    def _forget_cancel(self, run: _Run) -> None:
        run.cancelled_for = None
        while run.task is not None and run.task.cancelling():
            run.task.uncancel()

    def _why_cancelled(self, run: _Run, error: asyncio.CancelledError) -> BaseException:
        assert run.task is not None
        reason = run.cancelled_for
        if not run.task.cancelling():
            return error  # a handler's own inner task was cancelled: the batch failed
        if run.abandoned is not None and not self._closed:
            self._forget_cancel(run)
            return run.abandoned
        if self._closed or run not in self._runs:
            raise error
        if reason == "shutdown" and any(calls.holds(run.messages[0]) for calls in self.spec.threads):
            raise error  # a thread runs on with it: it stays unsettled
        self._forget_cancel(run)
        if reason == "timeout":
            return self._timeout_error(run)
        return error if reason is None else Release("shutdown")  # None: somebody else's doing

    def _timeout_error(self, run: _Run, more: str = "") -> HandlerTimeout:
        return HandlerTimeout(f"{self.spec.name}: a batch of {len(run.messages)} ran over {self.spec.timeout} s{more}")
