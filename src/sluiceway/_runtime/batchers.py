"""Batchers gather handled messages; batch processors run the batch handler."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from .._decisions.batching import Add, Change, Emitted, Forming
from ..errors import HandlerTimeout, Release, RoutingError
from ..message import DEFAULT_BATCHER, Batch, Message, Trigger
from ..telemetry import BatchFinished, Telemetry
from .failures import Failures
from .settler import PipelineSettler
from .spec import BatcherSpec, PipelineSpec


class _Run:
    """What one batch processor is doing."""

    __slots__ = ("cancelled_for", "messages", "task", "timer")

    def __init__(self) -> None:
        self.messages: list[Message[Any]] = []
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.cancelled_for: str | None = None


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
        self.forming = Forming(batcher.name, batcher.size, batcher.timeout, batcher.key, batcher.split)
        self.queue: deque[Emitted] = deque()
        self.on_idle: Callable[[], None] = _nothing
        self.on_crash: Callable[[BaseException], None] = _raise
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
        self.queue.clear()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        return list(self._tasks)

    def _emit(self, emitted: Emitted) -> None:
        self.queue.append(emitted)
        self._start()

    def _start(self) -> None:
        if self.queue and len(self._runs) < self.batcher.concurrency:
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
            while self.queue:
                messages, info = self.queue.popleft()
                started = self._loop.time()
                run.messages = messages
                error = await self._handle(run, Batch(messages, info))
                if run not in self._runs:
                    return  # it was abandoned, its messages are settled and another has its place
                failed = self.settler.ack_batch(messages, error)
                if self.telemetry.wants(BatchFinished):
                    seconds = self._loop.time() - started
                    self.telemetry.emit(
                        BatchFinished(consumer=self.spec.name, info=info, seconds=seconds, failed=len(failed))
                    )
                if failed:
                    await self.failures.failed(failed)
        finally:
            self._runs.discard(
                run
            )  # now, not when the task's callbacks run: what is emitted until then needs a new one

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
        self._runs.discard(run)
        error = self._timeout_error(run, " and ignored its cancellation")
        failed = self.settler.ack_batch(run.messages, error)
        self._failing.add(self._watch(self.failures.failed(failed), "what an abandoned batch failed"))
        self._start()

    def _cancel(self, run: _Run, reason: str) -> None:
        assert run.task is not None
        run.cancelled_for = reason
        run.task.cancel()

    def _forget_cancel(self, run: _Run) -> None:
        if run.cancelled_for is not None and run.task is not None:
            run.cancelled_for = None
            while run.task.cancelling():
                run.task.uncancel()

    def _why_cancelled(self, run: _Run, error: asyncio.CancelledError) -> BaseException:
        assert run.task is not None
        reason = run.cancelled_for
        if not run.task.cancelling():
            return error  # a handler's own inner task was cancelled: the batch failed
        if reason is None or run not in self._runs:
            raise error
        if reason == "shutdown" and any(calls.holds(run.messages[0]) for calls in self.spec.threads):
            raise error  # a thread runs on with it: it stays unsettled
        self._forget_cancel(run)
        if reason == "timeout":
            return self._timeout_error(run)
        return Release("shutdown")

    def _timeout_error(self, run: _Run, more: str = "") -> HandlerTimeout:
        return HandlerTimeout(f"{self.spec.name}: a batch of {len(run.messages)} ran over {self.spec.timeout} s{more}")


class Batchers:
    """All batchers of a pipeline, by name."""

    def __init__(self, spec: PipelineSpec, settler: PipelineSettler, failures: Failures, hub: Telemetry) -> None:
        self.by_name = {name: Batcher(spec, batcher, settler, failures, hub) for name, batcher in spec.batchers.items()}
        self.name = spec.name

    def add(self, message: Message[Any], value: Any) -> Change | None:
        """Take a message whose handler returned `value`; a change is to be handed to `changed`.

        Raises RoutingError, and what the user's `key` function raises.
        """
        name = DEFAULT_BATCHER if message.routing is None else message.routing.batcher
        batcher = self.by_name.get(name)
        if batcher is None:
            known = ", ".join(map(repr, self.by_name))
            raise RoutingError(f"{self.name}: there is no batcher {name!r}; its batchers: {known}")
        return batcher.forming.add(message, value)

    def adder(self) -> Add | None:
        """`add` for a processor's loop, the shortest way there is; None without batchers."""
        if not self.by_name:
            return None
        if list(self.by_name) == [DEFAULT_BATCHER]:
            return self.by_name[DEFAULT_BATCHER].forming.adder()  # `to()` has checked the name on the user's own line
        return self.add

    def changed(self, message: Message[Any], change: Change) -> None:
        name = DEFAULT_BATCHER if message.routing is None else message.routing.batcher
        self.by_name[name].changed(change)

    @property
    def busy(self) -> bool:
        return any(batcher.busy for batcher in self.by_name.values())

    @property
    def forming(self) -> int:
        """How many messages wait in batches that are not full."""
        return sum(batcher.forming.count for batcher in self.by_name.values())

    def emit_all(self, trigger: Trigger) -> None:
        for batcher in self.by_name.values():
            batcher.emit_all(trigger)

    def emit_oldest(self) -> None:
        """Emit the oldest forming batch of all batchers."""
        if self.by_name:
            min(self.by_name.values(), key=lambda batcher: batcher.forming.oldest_due()).emit_oldest()

    def on_idle(self, call: Callable[[], None]) -> None:
        for batcher in self.by_name.values():
            batcher.on_idle = call

    def on_crash(self, call: Callable[[BaseException], None]) -> None:
        for batcher in self.by_name.values():
            batcher.on_crash = call

    def cancel(self) -> int:
        return sum(batcher.cancel() for batcher in self.by_name.values())

    def take_unstarted(self) -> list[Message[Any]]:
        return [message for batcher in self.by_name.values() for message in batcher.take_unstarted()]

    def close(self) -> Collection[asyncio.Task[None]]:
        """Cancel all; returns what has yet to end."""
        return [task for batcher in self.by_name.values() for task in batcher.close()]


def _nothing() -> None:
    pass


def _raise(error: BaseException) -> None:
    raise error
