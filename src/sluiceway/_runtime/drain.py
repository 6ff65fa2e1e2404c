"""The drain: how a pipeline stops. Nothing is lost, and nothing that finished is repeated."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from ..message import Message, Settlement
from .batchers import Batchers
from .intake import Intake
from .processors import Processors
from .settler import PipelineSettler

log = logging.getLogger("sluiceway")

CUT_OFF = 2.0  # seconds that cancelled handlers have to clean up, and as many again to send the last settles


class Drained(Struct, frozen=True):
    """How a drain went: `released` went back unstarted, `cancelled` were cut off, `unsettled` were left as they are."""

    seconds: float
    released: int
    cancelled: int
    unsettled: int


class Drain:
    """Stops demand, releases what has not started, waits for what runs, emits and waits for batches, flushes settles.

    When the time is up, what runs is cancelled and released; what runs on a thread cannot be, and stays unsettled.
    """

    def __init__(
        self,
        name: str,
        intake: Intake,
        processors: Processors,
        batchers: Batchers,
        settler: PipelineSettler,
        take_unstarted: Callable[[], Sequence[Message[Any]]],
    ) -> None:
        self.name = name
        self.intake = intake
        self.processors = processors
        self.batchers = batchers
        self.settler = settler
        self.take_unstarted = take_unstarted
        self.released = 0
        self._changed = asyncio.Event()
        self._deadline: asyncio.Timeout | None = None
        self._loop = asyncio.get_running_loop()

    def poke(self) -> None:
        """A settle returned, a processor ran dry, a batch or a stage ended."""
        self._changed.set()

    def hurry(self) -> None:
        """Time is up. Idempotent; does nothing before the drain and after it."""
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(self._loop.time())

    async def run(self, receiving: asyncio.Task[None], sending: asyncio.Task[None], seconds: float) -> Drained:
        """Drain within `seconds`. Raises when the settler has crashed."""
        started = self._loop.time()
        cancelled = 0
        receiving.add_done_callback(lambda _: self.poke())
        sending.add_done_callback(lambda _: self.poke())
        self.intake.stop()
        try:
            async with asyncio.timeout(seconds) as self._deadline:
                await self._finish(receiving, sending)
        except TimeoutError:
            if self._deadline is not None and not self._deadline.expired():
                raise  # not ours: the source's
            self._deadline = None
            cancelled = await self._cut_off(sending)
        self._deadline = None
        return Drained(self._loop.time() - started, self.released, cancelled, len(self.settler.held))

    async def _finish(self, receiving: asyncio.Task[None], sending: asyncio.Task[None]) -> None:
        self._release(self.take_unstarted())
        self.intake.draining.set()
        while not receiving.done():
            await self._change(sending)
            self._release_unless_last()
        self._release_unless_last()
        while self.processors.running or self.processors.unstarted or self.intake.waiting_in_lanes():
            if not (self.processors.running or self.processors.unstarted):
                self.batchers.emit_all("drain")  # what waits in a lane waits for a batch
            await self._change(sending)
        self.batchers.emit_all("drain")
        while self.batchers.busy:
            await self._change(sending)
        await self._flush(sending)
        await self.processors.end()

    def _release_unless_last(self) -> None:
        """Release what has not started, but for what the source put out because of this drain."""
        if not self.intake.last:
            self._release(self.take_unstarted())

    async def _cut_off(self, sending: asyncio.Task[None]) -> int:
        """Release what waits, cancel and release what runs, and send the last settles."""
        self._release(self.take_unstarted())
        self._release(self.batchers.take_unstarted())
        cancelled = self.processors.cancel() + self.batchers.cancel()
        log.warning("%s: the time to drain is up; %d handlers are cancelled", self.name, cancelled)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CUT_OFF):
                while cancelled and (self.processors.running or self.batchers.busy):
                    await self._change(sending)
        self._release(self.take_unstarted())
        self._release(self.batchers.take_unstarted())  # of handlers that swallowed their cancellation and returned
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CUT_OFF):
                await self._flush(sending)
        return cancelled

    async def _flush(self, sending: asyncio.Task[None]) -> None:
        while self.settler.unsent:
            await self._change(sending)
        await self.settler.source.flush()

    async def _change(self, sending: asyncio.Task[None]) -> None:
        """Wait until something ends. Raises when the settler did: nothing would be settled any more."""
        self._changed.clear()
        await self._changed.wait()
        if sending.done():
            raise RuntimeError(f"{self.name}: the settler ended in the drain") from _error(sending)

    def _release(self, messages: Sequence[Message[Any]]) -> None:
        self.released += len(messages)
        for message in messages:
            self.settler.settle(Settlement(message, "release", counted=False))


def _error(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()
