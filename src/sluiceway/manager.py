"""The manager starts, stops, lists and restarts the pipelines of an app's consumers."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, Protocol

from ._decisions.backoff import RestartRule
from ._runtime.body import Body
from ._runtime.drain import Drained
from ._runtime.flow import uncancelled
from ._runtime.supervisor import PipelineStats, Supervisor
from .assembly import make_spec, make_subscription, topology_of
from .consumer import ConsumerDef
from .errors import AppError, PipelineFailed, unknown
from .gate import Pause
from .message import PublishHeaders
from .middleware import BatchMiddleware, Middleware
from .signatures import Lifespan
from .source import Backlog, Source, SourceInfo, Subscription
from .telemetry import Telemetry
from .topology import Topology
from .transport import Transport

log = logging.getLogger("sluiceway")


class _Running:
    """One consumer's pipeline and the task that runs it."""

    def __init__(self, supervisor: Supervisor, task: asyncio.Task[None]) -> None:
        self.supervisor = supervisor
        self.task = task


class Managed(Protocol):
    """What the manager needs of an app."""

    consumers: dict[str, ConsumerDef]
    transport: Transport
    telemetry: Telemetry
    group: str
    shutdown_timeout: float
    max_restarts: int
    max_seconds: float
    give_up: Literal["exit", "continue"]
    middleware: Sequence[Middleware]
    batch_middleware: Sequence[BatchMiddleware]
    publish_headers: PublishHeaders | None
    lifespan: Lifespan | None


class ConsumerManager:
    """The pipelines of one app. It works inside `app.running()` and `app.run()`."""

    def __init__(self, app: Managed) -> None:
        self._app = app
        self._context: Any = None
        self._running: dict[str, _Running] = {}
        self._ended: dict[str, PipelineStats] = {}
        self._pauses: defaultdict[str, Pause] = defaultdict(Pause)
        self._drained: dict[str, Drained] = {}
        self._failure: BaseException | None = None
        self._body = Body()
        self._active = False
        self._stopping = False
        self._hurry = False
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    # -- what users call -----------------------------------------------------------------------------------------

    async def start(self, name: str) -> None:
        """Start a consumer; returns when its source is open. Idempotent. Raises what opening it raises."""
        async with self._locks[name]:
            self._check_startable(name)
            if name not in self._running:
                await self._launch([name])
            running = self._running[name]
        await running.supervisor.opened(running.task)

    async def _launch(self, names: Iterable[str]) -> None:
        """Start pipelines side by side, after all that they need is at the broker."""
        planned = {name: self._plan(name) for name in names}
        subscriptions = [subscription for _, subscription in planned.values()]
        findings = await self._app.transport.ensure(subscriptions, create=True)
        if errors := [finding.text for finding in findings if finding.level == "error"]:
            raise AppError("; ".join(errors))
        for finding in findings:
            log.log(logging.WARNING if finding.level == "warning" else logging.INFO, "%s", finding.text)
        for name, (supervisor, _) in planned.items():
            self._check_startable(name)  # the app may have begun to stop meanwhile
            task = asyncio.create_task(supervisor.run(), name=f"{name}: pipeline")
            self._running[name] = _Running(supervisor, task)
            task.add_done_callback(partial(self._on_ended, name))

    def _plan(self, name: str) -> tuple[Supervisor, Subscription]:
        definition = self._app.consumers[name]
        transport = self._app.transport
        spec = make_spec(
            definition,
            definition.bind(self._context),
            group=definition.value("group") or self._app.group,
            features=transport.features,
            gates=(self._pauses[name],),
            middleware=self._app.middleware,
            batch_middleware=self._app.batch_middleware,
            publish_headers=self._app.publish_headers,
            stats=lambda: self._stats(name),
            lifespan=self._app.lifespan,
        )

        async def open_source(info: SourceInfo) -> Source:
            return await transport.subscribe(subscription)

        rule = RestartRule(self._app.max_restarts, self._app.max_seconds)
        supervisor = Supervisor(spec, open_source, self._app.telemetry, rule, self._shutdown_timeout)
        supervisor.on_exit = self._fail
        subscription = make_subscription(definition, spec, supervisor.revoked)
        return supervisor, subscription

    async def stop(self, name: str) -> Drained | None:
        """Drain a consumer and stop it; it has ended on return. Idempotent.

        Returns how the drain went; None when it did not run.
        """
        self._check(name)
        running = self._running.get(name)
        if running is None:
            return None
        running.supervisor.stop()
        await asyncio.wait((running.task,))
        return running.supervisor.drained

    async def restart(self, name: str) -> None:
        """Drain a consumer and start it again, with its options as they are now."""
        await self.stop(name)
        await self.start(name)

    def pause(self, name: str) -> None:
        """Stop a consumer's demand; what is in hand is handled. It lasts over restarts, until `resume`. Idempotent."""
        self._check_known(name)
        self._pauses[name].close()

    def resume(self, name: str) -> None:
        """Let a paused consumer's demand flow again. Idempotent."""
        self._check_known(name)
        self._pauses[name].open()

    def flush(self, name: str) -> None:
        """Emit a consumer's forming batches now, full or not. Does nothing when it does not run."""
        self._check_known(name)
        if name in self._running:
            self._running[name].supervisor.flush()

    def stats(self) -> list[PipelineStats]:
        """Every consumer of the app at this moment, in the order of declaration."""
        return [self._stats(name) for name in self._app.consumers]

    def topology(self) -> list[Topology]:
        """The stages of every consumer of the app, whether it runs or not, in the order of declaration."""
        return [
            topology_of(definition, definition.value("group") or self._app.group)
            for definition in self._app.consumers.values()
        ]

    def all_running(self) -> list[str]:
        """The names of the consumers that run, in the order of declaration.

        One runs from when its source is open until it has drained; also while a crash of it is mended.
        """
        return [name for name in self._app.consumers if self._runs(name)]

    def _runs(self, name: str) -> bool:
        running = self._running.get(name)
        return running is not None and running.supervisor.started.is_set() and not running.task.done()

    def drained(self) -> dict[str, Drained]:
        """How the drain of each consumer went that has stopped."""
        return dict(self._drained)

    async def backlog(self, name: str) -> Backlog | None:
        """What waits at the broker for a consumer that runs; None when it cannot be said."""
        self._check(name)
        running = self._running.get(name)
        return None if running is None else await running.supervisor.backlog()

    async def idle(self, seconds: float = 0.2) -> None:
        """Return when nothing has waited at the broker and nothing was in hand for `seconds`.

        Messages that wait for a delayed retry count as waiting. Raises what made the app stop.
        """
        quiet = 0.0
        while quiet < seconds:
            if self._failure is not None:
                raise self._failure
            backlogs = [await self.backlog(name) for name in list(self._running)]
            waiting = any(one is not None and one.messages for one in backlogs)
            busy = waiting or any(one.held or one.state == "starting" for one in self.stats())
            quiet = 0.0 if busy else quiet + seconds / 4
            await asyncio.sleep(seconds / 4)

    def hurry(self) -> None:
        """Cut drains short: what still runs is cancelled."""
        self._hurry = True
        for running in self._running.values():
            running.supervisor.hurry()

    # -- what the app calls --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def supervise(self, context: Any, names: Sequence[str]) -> AsyncIterator[None]:
        """Run pipelines while the body runs; drain them all at its end. When one is given up, or a handler exits the
        app, the body is cancelled, and that is raised."""
        if self._active:
            raise AppError("this app is running already")
        for name in names:
            self._check_known(name)
        self._active, self._context, self._hurry, self._stopping = True, context, False, False
        self._locks.clear()
        self._failure, self._body = None, Body()
        self._ended.clear()
        self._drained.clear()
        try:
            await self._launch(names or self._app.consumers)
            for running in list(self._running.values()):
                await running.supervisor.opened(running.task)
            if self._failure is None:  # else one failed while others started
                with self._body:
                    yield
        finally:
            try:
                await self._stop_all()
            finally:  # also when it is cancelled a second time: the app can run again
                self._active = self._stopping = False
        if self._failure is not None:
            raise self._failure

    async def _stop_all(self) -> None:
        self._stopping = True
        tasks = [running.task for running in self._running.values()]
        for running in list(self._running.values()):
            running.supervisor.stop()
        try:
            if tasks:
                await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await uncancelled(asyncio.wait(tasks))
            raise

    def _on_ended(self, name: str, task: asyncio.Task[None]) -> None:
        running = self._running.pop(name)
        self._ended[name] = running.supervisor.stats()
        if running.supervisor.drained is not None:
            self._drained[name] = running.supervisor.drained
        if task.cancelled():
            if not self._stopping:
                self._fail(PipelineFailed(f"{name}: its task was cancelled"))
            return
        error = task.exception()
        if error is None:
            return
        if isinstance(error, PipelineFailed) and self._app.give_up == "continue":
            log.error("%s; the app goes on without it", error)
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._body.cut_off()
        for running in self._running.values():
            running.supervisor.stop()

    def _stats(self, name: str) -> PipelineStats:
        running = self._running.get(name)  # in one step: a thread that scrapes metrics may ask
        if running is not None:
            return running.supervisor.stats()
        if name in self._ended:
            return self._ended[name]
        definition = self._app.consumers[name]
        group = definition.value("group") or self._app.group
        return PipelineStats(consumer=name, topics=definition.topics, group=group, state="stopped")

    def _shutdown_timeout(self) -> float:
        return 0.0 if self._hurry else self._app.shutdown_timeout

    def _check(self, name: str) -> None:
        self._check_known(name)
        if not self._active:
            raise AppError("the app is not running; use `async with app.running() as manager:`")

    def _check_startable(self, name: str) -> None:
        self._check(name)
        if self._stopping:
            raise AppError(f"the app is stopping; {name!r} is not started any more")

    def _check_known(self, name: str) -> None:
        if name not in self._app.consumers:
            raise unknown("app", name, self._app.consumers, "consumer")
