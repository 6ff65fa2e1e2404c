"""The supervisor keeps one pipeline running: it opens the source, runs the flow, and starts anew after a crash."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from msgspec import Struct

from .._decisions.backoff import RestartRule
from .._decisions.occupancy import TimeSpent
from ..errors import OptionError, PipelineFailed
from ..message import Scope
from ..source import Backlog, Source, SourceInfo
from ..telemetry import PipelineCrashed, PipelineStarted, Telemetry
from .chance import draw
from .drain import Drained
from .flow import Flow, uncancelled
from .opening import not_wanted, open_sources
from .spec import PipelineSpec
from .unset import raise_it

log = logging.getLogger("sluiceway")


class PipelineStats(Struct, frozen=True, kw_only=True):
    """A pipeline at one moment.

    `state`: starting, running, paused, blocked, draining, stopped or failed. `reason` says why it is not running: which
    gates are closed, what the broker refuses, or the last crash. Counts are messages: `held`
    are received and unsettled, of which `unstarted` wait for a processor, `running` are in a handler, `forming` in a
    batch whose handler was not entered, `batched` in a batch handler and `unsettled` on their way to the broker;
    `window` is the most that may be held; `demand` what the source is asked for now. `received` and `finished` count
    since the pipeline started, over restarts.

    Over the last seconds, where what happened 5 s ago weighs 1/e: `receive_rate` and `finish_rate` are messages per
    second, `spent` says where their time went (None before the first has finished, and while the pipeline is down).
    """

    consumer: str
    topics: tuple[str, ...]
    group: str
    state: str
    reason: str | None = None
    restarts: int = 0
    received: int = 0
    finished: int = 0
    held: int = 0
    unstarted: int = 0
    running: int = 0
    forming: int = 0
    batched: int = 0
    unsettled: int = 0
    window: int = 0
    demand: int = 0
    receive_rate: float = 0.0
    finish_rate: float = 0.0
    spent: TimeSpent | None = None


class Supervisor:
    """One pipeline, over all its restarts."""

    def __init__(
        self,
        spec: PipelineSpec,
        open_source: Callable[[SourceInfo], Awaitable[Source]],
        telemetry: Telemetry,
        rule: RestartRule,
        shutdown_timeout: Callable[[], float],
    ) -> None:
        self.spec = spec
        self.telemetry = telemetry
        self.drained: Drained | None = None
        self.started = asyncio.Event()  # the source was open once
        self.on_exit: Callable[[BaseException], None] = raise_it
        self._open = open_source
        self._rule = rule
        self._timeout = shutdown_timeout
        self._flow: Flow | None = None
        self._stopping = asyncio.Event()
        self._state = "starting"
        self._reason: str | None = None
        self._restarts = 0
        self._before = (0, 0)  # received and finished by the flows before this one

    async def run(self) -> None:
        """Run until `stop()`. Raises PipelineFailed when it crashes more often than the restart rule allows."""
        try:
            while not self._stopping.is_set():
                try:
                    await self._run_once()
                except OptionError:
                    self._state = "failed"
                    raise
                except Exception as error:
                    await self._crashed(error)
        finally:
            if self._state != "failed":
                self._state = "stopped"

    async def opened(self, running: asyncio.Task[None]) -> None:
        """Return when a source was open once. Raises what `running`, the task of `run`, raised before that."""
        opened = asyncio.create_task(self.started.wait())
        try:
            await asyncio.wait((opened, running), return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
        if running.done() and not self.started.is_set():
            running.result()

    def stop(self) -> None:
        """Begin the drain. Idempotent."""
        self._stopping.set()
        if self._state not in ("stopped", "failed"):
            self._state = "draining"
        if self._flow is not None:
            self._flow.stop()

    def hurry(self) -> None:
        """Cut a drain short: what still runs is cancelled. Idempotent; does nothing before the drain."""
        if self._flow is not None:
            self._flow.hurry()

    def flush(self) -> None:
        """Emit what forms, full or not."""
        if self._flow is not None:
            self._flow.batchers.emit_all("flush")

    async def revoked(self, scopes: frozenset[Scope], seconds: float | None) -> None:
        """The source says that scopes are taken away, in so many seconds; None: they are gone."""
        if self._flow is not None:
            await self._flow.revoked(scopes, seconds)

    def stats(self) -> PipelineStats:
        """The pipeline at this moment."""
        spec, flow = self.spec, self._flow
        if flow is None:
            return PipelineStats(
                consumer=spec.name, topics=spec.topics, group=spec.group, state=self._state, reason=self._reason,
                restarts=self._restarts, received=self._before[0], finished=self._before[1],
            )  # fmt: skip
        state, reason = self._condition(flow)
        occupancy, now = flow.settler.occupancy, flow.time()
        receive_rate, finish_rate = occupancy.rates(now)
        return PipelineStats(
            consumer=spec.name,
            topics=spec.topics,
            group=spec.group,
            state=state,
            reason=reason,
            restarts=self._restarts,
            received=self._before[0] + flow.intake.received,
            finished=self._before[1] + flow.settler.finished,
            held=len(flow.settler.held),
            unstarted=flow.processors.unstarted + flow.intake.waiting_in_lanes(),
            running=flow.processors.running,
            forming=flow.batchers.forming + flow.batchers.emitted,
            batched=occupancy.batched.count,
            unsettled=flow.settler.unsent,
            window=flow.window.size,
            demand=flow.intake.asking,
            receive_rate=receive_rate,
            finish_rate=finish_rate,
            spent=occupancy.spent(now),
        )

    async def backlog(self) -> Backlog | None:
        """What waits at the broker for this consumer; None when it cannot say."""
        return await self._flow.source.backlog() if self._flow is not None else None

    def _condition(self, flow: Flow) -> tuple[str, str | None]:
        if self._state != "running":
            return self._state, self._reason
        if flow.settler.trouble:
            return "blocked", flow.settler.trouble
        if closed_by := flow.intake.closed_by:
            return "paused", closed_by
        status = flow.source.status()
        return status.state, status.error

    async def _run_once(self) -> None:
        source = await self._open_unless_stopped()
        if source is None:
            return
        try:
            flow = self._flow = Flow(self.spec, source, self.telemetry)
        except BaseException:  # a gate of the user's raised, perhaps
            await uncancelled(source.aclose())
            raise
        flow.on_exit = self.on_exit
        if self._stopping.is_set():
            flow.stop()
        else:
            self._state = "running"
        self.started.set()
        if self.telemetry.wants(PipelineStarted):
            event = PipelineStarted(consumer=self.spec.name, topology=self.spec.topology, restarts=self._restarts)
            self.telemetry.emit(event)
        try:
            self.drained = await flow.run(self._timeout)
        finally:
            self._before = (self._before[0] + flow.intake.received, self._before[1] + flow.settler.finished)
            self._flow = None

    async def _open_unless_stopped(self) -> Source | None:
        """A new source; None when `stop()` came first: a broker that cannot be reached must not hold up a drain."""
        opening = asyncio.ensure_future(open_sources(self.spec, self._open))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await uncancelled(not_wanted(opening))
            raise
        finally:
            stopping.cancel()
        if not opening.done():
            await uncancelled(not_wanted(opening))
            return None
        if opening.cancelled():
            raise RuntimeError("opening the source was cancelled")
        return opening.result()

    async def _crashed(self, error: Exception) -> None:
        delay = self._rule.crashed(asyncio.get_running_loop().time(), draw())
        if self.telemetry.wants(PipelineCrashed):
            self.telemetry.emit(PipelineCrashed(consumer=self.spec.name, error=error, delay=delay))
        self._reason = f"{type(error).__name__}: {error}"
        if delay is None:
            self._state = "failed"
            log.error("%s: the pipeline crashed once more than allowed; it is given up", self.spec.name, exc_info=error)
            rule = f"{self._rule.max_restarts} restarts in {self._rule.max_seconds:g} s"
            raise PipelineFailed(
                f"{self.spec.name}: crashed more often than {rule} allow; last: {self._reason}"
            ) from error
        log.error("%s: the pipeline crashed; it starts again in %.2f s", self.spec.name, delay, exc_info=error)
        self._restarts += 1
        self._state = "starting"
        try:
            await asyncio.wait_for(self._stopping.wait(), delay)
        except TimeoutError:
            return
