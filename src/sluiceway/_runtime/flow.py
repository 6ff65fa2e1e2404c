"""One run of a pipeline: its stages, wired, from an open source to a drained one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from .._decisions.window import Window
from ..message import QUEUED, Message, Scope, Settlement
from ..source import Source
from ..telemetry import PipelineStopped, Telemetry
from .batchers import Batchers
from .drain import Drain, Drained
from .failures import Failures
from .intake import Intake
from .leases import LeaseKeeper
from .merged import MergedSource
from .ordering import LaneKeeper
from .prepare import Preparer, after_prepare
from .processors import AsyncProcessors, Processors
from .quarantine import SuspectQuarantine
from .settler import PipelineSettler
from .spans import Spans
from .spec import PipelineSpec
from .threads import ThreadProcessors
from .unset import raise_it

log = logging.getLogger("sluiceway")

CLOSE_TIMEOUT = 2.0  # seconds that cancelled handlers have to clean up before the source is closed


class Flow:
    """The stages of one pipeline over one source. It runs once; a restart makes a new one."""

    def __init__(self, spec: PipelineSpec, source: Source, telemetry: Telemetry) -> None:
        self.spec = spec
        self.source = source
        self.telemetry = telemetry
        self.time = asyncio.get_running_loop().time
        self.on_exit: Callable[[BaseException], None] = raise_it
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
        self._drain = Drain(spec.name, self.intake, self.processors, self.batchers, self.settler, self._take_unstarted)
        self.lanes: LaneKeeper | None = None
        self._spans = Spans(spec, telemetry)
        self.leases = LeaseKeeper(spec.name, source, self.settler)
        self._stop = asyncio.Event()
        self._freed = asyncio.Event()
        self._crash: Exception | None = None
        self._connect_stages()
        if spec.ordered:
            self._keep_order()

    def _connect_stages(self) -> None:
        """Tell the stages of each other, and of what is told here."""
        self._quarantine.take_unstarted = self._take_unstarted
        self._quarantine.put = self.intake.put
        self.intake.quarantine = self._quarantine
        self.intake.release_unstarted = lambda: self._release(self._take_unstarted())
        self.intake.leases_needed = self.leases.needed
        if self.spec.prepare is not None:
            self.intake.prepare = Preparer(self.spec, self.settler, self.spec.prepare)
        if self.settler.acknowledgers is not None:
            self.settler.acknowledgers.on_exit = self._exit
        self.settler.on_freed = self.processors.on_idle = self._poked
        self.batchers.on_idle(self._poked)
        self.batchers.on_crash(self._crashed)
        self.batchers.on_exhausted(lambda: self._exhausted("as many batch handlers as run at once"))
        if self.spec.batchers:
            self.settler.occupancy.unstarted = lambda: self.processors.unstarted + self.intake.waiting_in_lanes()
        if isinstance(self.source, MergedSource):
            self.source.keep(self._on_thread)

    def _keep_order(self) -> None:
        """Put lanes between the intake and the processors."""
        lanes = self.lanes = LaneKeeper(self.processors, self.settler, self.window, self.batchers)
        lanes.arriving = self._preparing
        if self.intake.prepare is not None:
            self.intake.prepare.arrived = lanes.arrived
        self.intake.queue = lanes
        self.intake.waiting_in_lanes = lambda: lanes.waiting

    def stop(self) -> None:
        """Begin the drain. Idempotent."""
        self._stop.set()
        self.intake.stop()  # now: what is released must not come back to us

    def hurry(self) -> None:
        """Cut the drain short, as if its time were up. Idempotent; does nothing before the drain."""
        self._drain.hurry()

    async def revoked(self, scopes: frozenset[Scope], seconds: float | None) -> None:
        """Scopes are taken away in so many seconds, or are gone (None). Returns when nothing of them is held, or then.

        What has not started goes back, or is forgotten when they are gone: another consumer has it.
        """
        of_scopes = [message for message in self.settler.held if message.scope in scopes]
        if seconds is None:
            self.settler.forget(of_scopes)
            return
        self._release([message for message in of_scopes if message.state == QUEUED])
        self.batchers.emit_all("revoke")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(message in self.settler.held for message in of_scopes):
                    self._freed.clear()
                    await self._freed.wait()

    async def run(self, shutdown_timeout: Callable[[], float]) -> Drained:
        """Move messages until `stop()`, then drain within `shutdown_timeout()` seconds and close the source.

        Raises what a stage raised, after a drain: what runs then ends, and is settled if the source still can. Whatever
        happens, the source is closed, so that what is unsettled goes back.
        """
        sending = asyncio.create_task(self.settler.run(), name=f"{self.spec.name}: settler")
        receiving = asyncio.create_task(self.intake.run(), name=f"{self.spec.name}: intake")
        stopping = asyncio.create_task(self._stop.wait())
        try:
            self.leases.start()
            self.telemetry.watch(self._listeners_changed)
            self._listeners_changed()
            await asyncio.wait((sending, receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                self._crashed(self._why_ended(sending if sending.done() else receiving))
            drained = await self._drain.run(receiving, sending, shutdown_timeout())
            if receiving.done() and self._crash is None and (receiving.cancelled() or receiving.exception()):
                log.warning("%s: receiving failed in the drain: %s", self.spec.name, self._why_ended(receiving))
        finally:
            await uncancelled(self._close(sending, receiving, stopping))
            self.telemetry.unwatch(self._listeners_changed)
        if self._crash is not None:
            raise self._crash
        if self.telemetry.wants(PipelineStopped):
            event = PipelineStopped(
                consumer=self.spec.name, seconds=drained.seconds, released=drained.released, cancelled=drained.cancelled
            )
            self.telemetry.emit(event)
        return drained

    def _listeners_changed(self) -> None:
        self.processors.listeners_changed(self._spans)

    def _crashed(self, error: BaseException) -> None:
        """A stage crashed: drain what is in hand; then the supervisor starts anew."""
        if self._crash is None:
            self._crash = error if isinstance(error, Exception) else RuntimeError(f"a stage raised {error!r}")
        self.stop()

    def _why_ended(self, stage: asyncio.Task[None]) -> BaseException:
        if stage.cancelled():
            return RuntimeError(f"{stage.get_name()}: something that it awaited was cancelled")
        return stage.exception() or RuntimeError(f"{stage.get_name()} ended by itself")

    def _poked(self) -> None:
        """A settle returned, a processor ran dry, a batch ended: whoever waits for that looks again."""
        self.intake.poke()
        self._quarantine.poke()
        self._drain.poke()
        self._freed.set()

    def _release(self, messages: list[Message[Any]]) -> int:
        for message in messages:
            self.settler.settle(Settlement(message, "release", counted=False))
        return len(messages)

    def _give_back(self, messages: list[Message[Any]]) -> None:
        """What worker processes had and did not enter."""
        self._release(messages)
        if self._stop.is_set():
            self._drain.released += len(messages)

    def _take_unstarted(self) -> list[Message[Any]]:
        unstarted = self.processors.take_unstarted()
        rest = self._preparing() if self.lanes is None else self.lanes.take_waiting()
        return [*unstarted, *rest]

    def _preparing(self) -> list[Message[Any]]:
        """What was received and still waits for `prepare`."""
        return [] if self.intake.prepare is None else self.intake.prepare.waiting()

    async def _close(self, *stages: asyncio.Task[None] | asyncio.Task[Literal[True]]) -> None:
        ending: set[asyncio.Task[Any]] = {*self.processors.close(), *self.batchers.close(), *stages}
        for task in stages:
            task.cancel()
        self.settler.close()
        _, left = await asyncio.wait(ending, timeout=CLOSE_TIMEOUT)
        for watch in self.spec.watches:
            watch.stopped()
        if left:
            log.warning("%s: %d handlers ignore their cancellation; they run on", self.spec.name, len(left))
        await self.leases.stop()
        try:
            await self.source.aclose(keep=[message for message in self.settler.held if self._on_thread(message)])
        except Exception:
            log.exception("%s: closing the source failed; the broker hands out again what it held", self.spec.name)

    def _on_thread(self, message: Message[Any]) -> bool:
        """Whether a thread runs the message's handler or batch handler, or it ignores its end: so nobody else may."""
        if message in self.settler.overdue or self.processors.holds(message):
            return True
        return any(calls.holds(message) for calls in self.spec.threads)

    def _make_processors(self) -> Processors:
        spec = self.spec if self.spec.prepare is None else after_prepare(self.spec)
        parts = (spec, self.settler, self.batchers, self.failures)
        processors: Processors
        if spec.mode == "async":
            processors = AsyncProcessors(*parts)
        elif spec.mode == "thread":
            processors = ThreadProcessors(*parts)
        else:
            from .processes import ProcessProcessors, WrappedProcessProcessors  # few pipelines need what it imports

            if spec.around is None:
                processors = ProcessProcessors(*parts, self._give_back)
            else:
                processors = WrappedProcessProcessors(*parts, spec.around)
        processors.on_exhausted = self._exhausted
        processors.on_crash = self._crashed
        processors.still_on_thread = self._on_thread
        for calls in self.spec.threads:
            calls.on_abandoned = self._thread_abandoned
        return processors

    def _thread_abandoned(self) -> None:
        abandoned = sum(len(calls.abandoned) for calls in self.spec.threads)
        if abandoned >= self.spec.concurrency and not self._stop.is_set():
            self._exhausted()

    def _exhausted(self, who: str | None = None) -> None:
        who = who or f"{self.spec.concurrency} handlers"
        self._exit(
            SystemExit(
                f"{self.spec.name}: {who} never returned and were abandoned; "
                "the process drains and exits so that a fresh one can take over"
            )
        )

    def _exit(self, error: BaseException) -> None:
        self.on_exit(error)


async def uncancelled(work: Coroutine[Any, Any, Any]) -> None:
    """Await `work` to its end also when cancelled meanwhile, however often; only then be cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
