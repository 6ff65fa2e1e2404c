"""Batchers gather handled messages; batch processors run the batch handler."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from .._decisions.batching import Change, Emitted, Forming, Trigger
from ..errors import HandlerTimeout, Release, RoutingError
from ..message import DEFAULT_BATCHER, Batch, Message
from ..telemetry import BatchFinished, Telemetry
from .failures import Failures
from .settler import PipelineSettler
from .spec import BatcherSpec, PipelineSpec


class Batcher:
    """One batcher and its batch processors.

    A batch is emitted by size, time, flush, drain or starvation into a queue from which up to `concurrency` batch
    processors take; they are tasks that start when there is work and end when there is none.
    """

    def __init__(
        self, spec: PipelineSpec, batcher: BatcherSpec, settler: PipelineSettler, failures: Failures, hub: Telemetry
    ) -> None:
        self.spec = spec
        self.batcher = batcher
        self.settler = settler
        self.failures = failures
        self.telemetry = hub
        self.forming = Forming(batcher.name, batcher.size, batcher.timeout, batcher.key)
        self.queue: deque[Emitted] = deque()
        self.on_idle: Callable[[], None] = _nothing
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def busy(self) -> bool:
        """Whether a batch runs or waits to run."""
        return bool(self._tasks)

    def changed(self, key: Hashable, change: Change) -> None:
        """A message opened a batch, or made it full."""
        if change == "opened":
            self._set_timer(self.forming.opened(key, self._loop.time()))
        else:
            self._emit(self.forming.take(key, "size" if change == "full" else "flush"))

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
        running = [task for task in self._tasks if not task.done()]
        for task in running:
            task.cancel("shutdown")
        return len(running)

    def take_unstarted(self) -> list[Message[Any]]:
        """Take back every message whose batch handler was not entered."""
        emitted = [*self.queue, *self.forming.take_all("drain")]
        self.queue.clear()
        return [message for messages, _ in emitted for message in messages]

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def _emit(self, emitted: Emitted) -> None:
        self.queue.append(emitted)
        if len(self._tasks) < self.batcher.concurrency:
            task = self._loop.create_task(self._work(), name=f"{self.spec.name}: batcher {self.batcher.name}")
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
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

    async def _work(self) -> None:
        while self.queue:
            messages, info = self.queue.popleft()
            batch: Batch[Any] = Batch(messages, info)
            started = time.monotonic()
            error = await self._handle(batch)
            failed = self.settler.ack_batch(messages, error)
            if self.telemetry.wants(BatchFinished):
                seconds = time.monotonic() - started
                self.telemetry.emit(
                    BatchFinished(consumer=self.spec.name, info=info, seconds=seconds, failed=len(failed))
                )
            if failed:
                await self.failures.failed(failed)

    async def _handle(self, batch: Batch[Any]) -> BaseException | None:
        """Run the batch handler; returns what fails the whole batch."""
        try:
            async with asyncio.timeout(self.spec.timeout) as limit:
                await self.batcher.handle(batch)
        except TimeoutError as error:
            if limit.expired():
                return HandlerTimeout(f"{self.spec.name}: a batch of {len(batch)} ran over {self.spec.timeout} s")
            return error
        except asyncio.CancelledError as error:
            return self._why_cancelled(error)
        except GeneratorExit:
            raise
        except BaseException as error:
            return error
        return None

    def _why_cancelled(self, error: asyncio.CancelledError) -> BaseException:
        task = asyncio.current_task()
        assert task is not None
        if not task.cancelling():
            return error  # a handler's own inner task was cancelled: the batch failed
        if error.args == ("shutdown",):
            task.uncancel()
            return Release("shutdown")
        raise error


class Batchers:
    """All batchers of a pipeline, by name."""

    def __init__(self, spec: PipelineSpec, settler: PipelineSettler, failures: Failures, hub: Telemetry) -> None:
        self.by_name = {name: Batcher(spec, batcher, settler, failures, hub) for name, batcher in spec.batchers.items()}
        self.name = spec.name

    def add(self, message: Message[Any], value: Any) -> Change | None:
        """Take a message whose handler returned `value`; a change is to be handed to `changed`.

        Raises RoutingError, and what the user's `key` function raises.
        """
        batcher = self.by_name.get(message.batcher)
        if batcher is None:
            known = ", ".join(map(repr, self.by_name))
            raise RoutingError(f"{self.name}: there is no batcher {message.batcher!r}; its batchers: {known}")
        return batcher.forming.add(message, value)

    def adder(self) -> Callable[[Message[Any], Any], Change | None] | None:
        """`add` for a processor's loop, the shortest way there is; None without batchers."""
        if not self.by_name:
            return None
        if list(self.by_name) == [DEFAULT_BATCHER]:
            return self.by_name[DEFAULT_BATCHER].forming.add  # `to()` has checked the name on the user's own line
        return self.add

    def changed(self, message: Message[Any], change: Change) -> None:
        self.by_name[message.batcher].changed(message.batch_key, change)

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

    def cancel(self) -> int:
        return sum(batcher.cancel() for batcher in self.by_name.values())

    def take_unstarted(self) -> list[Message[Any]]:
        return [message for batcher in self.by_name.values() for message in batcher.take_unstarted()]

    def close(self) -> None:
        for batcher in self.by_name.values():
            batcher.close()


def _nothing() -> None:
    pass
