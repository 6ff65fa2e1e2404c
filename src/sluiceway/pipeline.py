"""A pipeline over any source and a handler, without an app."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self, Unpack

from msgspec.structs import replace

from ._decisions.backoff import RestartRule
from ._runtime.body import Body
from ._runtime.flow import uncancelled
from ._runtime.supervisor import PipelineStats, Supervisor
from .assembly import make_spec
from .batch import Batch
from .consumer import FunctionConsumer
from .errors import AppError, OptionError
from .message import Message, PublishHeaders
from .options import ConsumerOptions
from .signatures import NO_CONTEXT, check_call, is_async
from .source import Source, SourceInfo
from .telemetry import Telemetry
from .topology import Topology

SHUTDOWN_TIMEOUT = 25.0  # seconds, below the 30 that Kubernetes gives


class Pipeline:
    """A pipeline over any source: a file, an HTTP feed, a broker of your own.

    `open_source` is awaited for a new source at each start, and for each of `sources`; it takes nothing, or the
    SourceInfo that says which one. `options` are a consumer's. The handler gets each message; `batch` is the default
    batcher's handler; `prepare` sees all messages of a receive before their handlers run.

    With `transform` a source may return anything: `transform(event)` makes a Message of each event. Its `token` is the
    event unless `transform` sets one, so that the source finds its own in what it is told to settle. An event that is
    a Message is changed in place and returned. What `transform` raises fails that event alone: it is dead-lettered with
    the reason, as what cannot be decoded is, and the others flow.

    Raises OptionError for what is not allowed.

        pipeline = Pipeline(open_feed, handle, concurrency=20)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pipeline.run())
            ...
            pipeline.stop()
    """

    def __init__(
        self,
        open_source: Callable[[], Awaitable[Source]] | Callable[[SourceInfo], Awaitable[Source]],
        handler: Callable[[Message[Any]], Any],
        *,
        batch: Callable[[Batch[Any]], Any] | None = None,
        prepare: Callable[[Sequence[Message[Any]]], Any] | None = None,
        transform: Callable[[Any], Message[Any]] | None = None,
        telemetry: Telemetry | None = None,
        shutdown_timeout: float = SHUTDOWN_TIMEOUT,
        max_restarts: int = 3,
        max_seconds: float = 60.0,
        publish_headers: PublishHeaders | None = None,
        **options: Unpack[ConsumerOptions],
    ) -> None:
        definition: FunctionConsumer[Any, Any] = FunctionConsumer(handler, ("source",), options)
        if batch is not None:
            definition.batch()(batch)
        if prepare is not None:
            definition.prepare(prepare)
        check_run(definition.name, shutdown_timeout, max_restarts, max_seconds, publish_headers)
        if not (telemetry is None or isinstance(telemetry, Telemetry)):
            raise OptionError(f"{definition.name}: telemetry must be a Telemetry or None; got {telemetry!r}")
        self.telemetry = telemetry or Telemetry()
        spec = make_spec(
            definition,
            definition.bind(NO_CONTEXT),
            group=definition.value("group") or "default",
            publish_headers=publish_headers,
            stats=self.stats,
        )
        self._spec = replace(spec, transform=_checked_transform(definition.name, transform))
        self._open = _with_info(definition.name, open_source)
        self._max_restarts, self._max_seconds = max_restarts, max_seconds
        self._shutdown_timeout = shutdown_timeout
        self._supervisor: Supervisor | None = None
        self._exit: BaseException | None = None
        self._running = False

    async def run(self) -> None:
        """Run until `stop()`, then drain. Cancelled, it drains too; cancelled again, it ends at once: what is unsettled
        goes back to the source, and what had begun is repeated.

        Raises PipelineFailed when it crashes too often, what a handler that exits raised, and AppError when it runs
        already.
        """
        async with self._supervised() as task:
            await asyncio.wait((task,))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Run while the body runs: the source is open when it begins, and all is drained after it.

        Raises what `run` does, when the body has ended. When the pipeline fails before, the body is cancelled, as by
        asyncio.timeout: once, and what it raises itself comes first. `stop()` does not cancel it.
        """
        async with self._supervised() as task:
            if self._supervisor is not None:
                await self._supervisor.opened(task)
            with Body() as body:
                task.add_done_callback(lambda ended: body.cut_off() if self._error_of(ended) is not None else None)
                yield self

    @asynccontextmanager
    async def _supervised(self) -> AsyncIterator[asyncio.Task[None]]:
        if self._running:
            raise AppError(f"{self._spec.name}: this pipeline is running already")
        rule = RestartRule(self._max_restarts, self._max_seconds)
        supervisor = Supervisor(self._spec, self._open, self.telemetry, rule, lambda: self._shutdown_timeout)
        supervisor.on_exit = self._on_exit
        self._supervisor, self._running, self._exit = supervisor, True, None
        task = asyncio.create_task(supervisor.run(), name=f"{self._spec.name}: pipeline")
        try:
            yield task
        finally:
            supervisor.stop()
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                task.cancel()
                await uncancelled(asyncio.wait((task,)))
                raise
            finally:
                self._running = False
                error = self._error_of(task)
        if error is not None:
            raise error

    def _error_of(self, task: asyncio.Task[None]) -> BaseException | None:
        return self._exit or (None if task.cancelled() else task.exception())

    def _on_exit(self, error: BaseException) -> None:
        self._exit = self._exit or error
        self.stop()

    def stop(self) -> None:
        """Begin the drain. Idempotent; before `run` it does nothing."""
        if self._supervisor is not None:
            self._supervisor.stop()

    def stats(self) -> PipelineStats | None:
        """The pipeline at this moment; None before `run`."""
        return self._supervisor.stats() if self._supervisor is not None else None

    def topology(self) -> Topology:
        """Its stages, what they are called, and how many of each work side by side."""
        return self._spec.topology


def check_run(
    where: str, shutdown_timeout: Any, max_restarts: Any, max_seconds: Any, publish_headers: PublishHeaders | None
) -> None:
    """Raise OptionError for what a pipeline or an app cannot run with."""
    whole = isinstance(max_restarts, int) and not isinstance(max_restarts, bool)
    makes = "a function that takes nothing and returns headers"
    for name, value, allowed, what in (
        ("shutdown_timeout", shutdown_timeout, _is_number(shutdown_timeout), "0 or more seconds"),
        ("max_restarts", max_restarts, whole and max_restarts >= 0, "a whole number, 0 or more"),
        ("max_seconds", max_seconds, _is_number(max_seconds) and max_seconds > 0, "seconds, more than 0"),
        ("publish_headers", publish_headers, publish_headers is None or callable(publish_headers), makes),
    ):
        if not allowed:
            raise OptionError(f"{where}: {name} must be {what}; got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _with_info(name: str, open_source: Callable[..., Awaitable[Source]]) -> Callable[[SourceInfo], Awaitable[Source]]:
    check_call(name, open_source, "open_source takes nothing or (info)", 0, 1)
    try:
        inspect.signature(open_source).bind()
    except TypeError:
        return open_source
    return lambda info: open_source()


def _checked_transform(name: str, transform: Any) -> Callable[[Any], Message[Any]] | None:
    if transform is None:
        return None
    check_call(name, transform, "transform takes (event)", 1)
    if is_async(transform):
        raise OptionError(f"{name}: transform is a plain function; what has to wait belongs in the source")
    checked: Callable[[Any], Message[Any]] = transform
    return checked
