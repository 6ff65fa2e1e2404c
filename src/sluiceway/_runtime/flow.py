"""One run of a pipeline: its stages, wired, from an open source to a drained one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from .._decisions.window import Window
from ..message import RUNNING, Message, Settlement
from ..source import Source
from ..telemetry import PipelineStopped, Telemetry
from .batchers import Batchers
from .failures import Failures
from .intake import Intake
from .leases import LeaseKeeper
from .ordering import LaneKeeper
from .processors import AsyncProcessors, Processors
from .quarantine import SuspectQuarantine
from .settler import PipelineSettler
from .spec import PipelineSpec
from .threads import ThreadProcessors

log = logging.getLogger("sluiceway")

CLOSE_TIMEOUT = 5.0  # seconds to hand the last settles over when the time to drain is up


class Drained(Struct, frozen=True):
    """How a drain went: `released` went back unstarted, `cancelled` were cut off, `unsettled` stayed with the broker."""

    seconds: float
    released: int
    cancelled: int
    unsettled: int


class Flow:
    """The stages of one pipeline over one source. It runs once; a restart makes a new one."""

    def __init__(self, spec: PipelineSpec, source: Source, telemetry: Telemetry) -> None:
        self.spec = spec
        self.source = source
        self.telemetry = telemetry
        self.on_exit: Callable[[BaseException], None] = _raise
        horizon = spec.buffer_time if source.lease is None else min(spec.buffer_time, source.lease / 3)
        self.window = Window(floor=spec.floor, ceiling=spec.ceiling, horizon=horizon, max_bytes=spec.max_bytes)
        self.settler = PipelineSettler(spec, source, telemetry)
        self.failures = Failures(spec, self.settler, telemetry)
        self.failures.on_exit = self._exit
        self.batchers = Batchers(spec, self.settler, self.failures, telemetry)
        self.processors: Processors = self._make_processors()
        self.intake = Intake(
            spec, source, self.window, self.settler, self.processors, self.batchers, self.failures, telemetry
        )
        self._quarantine = SuspectQuarantine(
            spec, source, self.settler, self.processors, self.batchers, self.failures, telemetry
        )
        self._quarantine.take_unstarted = self._take_unstarted
        self.intake.quarantine = self._quarantine
        self.intake.release_unstarted = lambda: self._release(self._take_unstarted())
        self._changed = asyncio.Event()
        self.settler.on_freed = self.processors.on_idle = self._poked
        self.batchers.on_idle(self._poked)
        self.lanes: LaneKeeper | None = None
        if spec.ordered:
            self.lanes = LaneKeeper(self.processors, self.settler, batched=bool(spec.batchers))
            self.intake.queue = self.lanes
            self.intake.waiting_in_lanes = lambda: self.lanes.waiting if self.lanes is not None else 0
        self.leases = LeaseKeeper(spec.name, source, self.settler)
        self._stop = asyncio.Event()
        self._deadline: asyncio.Timeout | None = None

    def stop(self) -> None:
        """Begin the drain. Idempotent."""
        self._stop.set()

    def hurry(self) -> None:
        """Cut the drain short, as if its time were up. Idempotent; does nothing before the drain."""
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time())

    async def run(self, shutdown_timeout: Callable[[], float]) -> Drained:
        """Move messages until `stop()`, then drain within `shutdown_timeout()` seconds and close the source.

        Raises what a stage raised. Whatever happens, the source is closed, so that what is unsettled goes back.
        """
        self.leases.start()
        sending = asyncio.create_task(self.settler.run(), name=f"{self.spec.name}: settler")
        receiving = asyncio.create_task(self.intake.run(), name=f"{self.spec.name}: intake")
        stopping = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait((sending, receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                return await self._drain(receiving, sending, shutdown_timeout())
            for task in done:
                task.result()  # raises what crashed the stage
            raise RuntimeError(f"{self.spec.name}: a stage ended by itself")
        finally:
            await self._close(sending, receiving, stopping)

    async def _drain(self, receiving: asyncio.Task[None], sending: asyncio.Task[None], seconds: float) -> Drained:
        """Stop demand, release what has not started, wait for what runs, emit and wait for batches, flush settles."""
        started = time.monotonic()
        cancelled = released = 0
        self.intake.stop()
        try:
            async with asyncio.timeout(seconds) as self._deadline:
                while not receiving.done():
                    released += self._release(self._take_unstarted())
                    await self._change(receiving, sending)
                released += self._release(self._take_unstarted())
                while self.processors.running or self.processors.unstarted:
                    await self._change(sending)
                self.batchers.emit_all("drain")
                while self.batchers.busy:
                    await self._change(sending)
                await self.settler.drained()
        except TimeoutError:
            self._deadline = None
            cancelled = await self._cut_off(sending)
        self._deadline = None
        result = Drained(time.monotonic() - started, released, cancelled, len(self.settler.held))
        if self.telemetry.wants(PipelineStopped):
            event = PipelineStopped(
                consumer=self.spec.name, seconds=result.seconds, released=released, cancelled=cancelled
            )
            self.telemetry.emit(event)
        return result

    async def _cut_off(self, sending: asyncio.Task[None]) -> int:
        """The time to drain is up: cancel and release what runs or waits in a batch, and send the last settles."""
        cancelled = self.processors.cancel() + self.batchers.cancel()
        log.warning("%s: the time to drain is up; %d handlers are cancelled", self.spec.name, cancelled)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                while cancelled and (self.processors.running or self.batchers.busy):
                    await self._change(sending)
        self._release(self._take_unstarted() + self.batchers.take_unstarted())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.settler.drained()
        return cancelled

    async def _change(self, *watched: asyncio.Task[None]) -> None:
        """Wait until something ends; raises what crashed a watched stage."""
        self._changed.clear()
        change = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait((change, *watched), return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
        for task in watched:
            if task.done():
                task.result()

    def _poked(self) -> None:
        """A settle returned, a processor ran dry, a batch ended: whoever waits for that looks again."""
        self.intake.poke()
        self._quarantine.poke()
        self._changed.set()

    def _release(self, messages: list[Message[Any]]) -> int:
        for message in messages:
            self.settler.settle(Settlement(message, "release", counted=False))
        return len(messages)

    def _take_unstarted(self) -> list[Message[Any]]:
        unstarted = self.processors.take_unstarted()
        return unstarted if self.lanes is None else [*unstarted, *self.lanes.take_waiting()]

    async def _close(self, *tasks: asyncio.Task[Any]) -> None:
        self.processors.close()
        self.batchers.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.leases.stop()
        on_threads = [message for message in self.settler.held if message.state == RUNNING]
        await self.source.aclose(keep=on_threads if self.spec.mode == "thread" else ())

    def _make_processors(self) -> Processors:
        if self.spec.mode == "async":
            return AsyncProcessors(self.spec, self.settler, self.batchers, self.failures)
        threads = ThreadProcessors(self.spec, self.settler, self.batchers, self.failures)
        threads.on_exhausted = self._exhausted
        return threads

    def _exhausted(self) -> None:
        self._exit(
            SystemExit(
                f"{self.spec.name}: {self.spec.concurrency} handlers never returned and were abandoned; "
                "the process drains and exits so that a fresh one can take over"
            )
        )

    def _exit(self, error: BaseException) -> None:
        self.on_exit(error)


def _raise(error: BaseException) -> None:
    raise error
