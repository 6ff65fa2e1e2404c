"""From a declared consumer, or from any source and a handler, to a running pipeline."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Unpack

from ._decisions.backoff import RestartRule
from ._decisions.policy import FailureRules
from ._runtime.spec import BatcherSpec, PipelineSpec
from ._runtime.supervisor import PipelineStats, Supervisor
from ._runtime.thread_calls import ThreadCalls
from .codec import Decode, encode, make_decoder, make_encoder
from .consumer import Bound, ConsumerDef, FunctionConsumer
from .errors import OptionError, Unsupported
from .gate import Gate
from .message import Batch, Message
from .middleware import compose
from .options import Batching, ConsumerOptions
from .signatures import NO_CONTEXT, is_async
from .source import OnRevoke, Source, Subscription
from .telemetry import Telemetry
from .transport import Features

AUTOMATIC_CEILING = 1_000  # messages; more brings no speed (measured: 100: 1.05 M/s, 1,000: 1.6-2.2 M/s)
SHUTDOWN_TIMEOUT = 25.0  # seconds, below the 30 that Kubernetes gives


def window_floor(concurrency: int, batchings: Mapping[str, Batching]) -> int:
    """The least window that lets every processor work and every batch fill."""
    return concurrency + sum(one.size * (one.concurrency + 1) for one in batchings.values())


def window_bounds(definition: ConsumerDef, batchings: Mapping[str, Batching]) -> tuple[int, int]:
    """Floor and ceiling of a consumer's window; equal when `max_demand` pins it. Raises OptionError."""
    floor = window_floor(definition.value("concurrency"), batchings)
    pinned = definition.value("max_demand")
    if pinned is None:
        return floor, max(floor, AUTOMATIC_CEILING)
    if pinned < floor:
        raise OptionError(
            f"{definition.name}: max_demand must be at least {floor} (concurrency + size x (concurrency + 1) of each "
            f"batcher), or batches can never fill; got {pinned}"
        )
    return pinned, pinned


def make_spec(
    definition: ConsumerDef, bound: Bound, *, group: str, features: Features | None = None, gates: Sequence[Gate] = ()
) -> PipelineSpec:
    """Everything the runtime needs to know of a consumer. Raises OptionError or Unsupported, before any message."""
    value = definition.value
    batchings = {name: batching for name, (_, batching) in bound.batchers.items()}
    idle = next((one for one in ("batch_size", "batch_timeout") if one in definition.given and not batchings), None)
    if idle is not None:
        raise OptionError(
            f"{definition.name}: {idle} has no effect without a batch handler: declare one or leave it out"
        )
    floor, ceiling = window_bounds(definition, batchings)
    if features is not None:
        check_features(definition, features)
    middleware = value("middleware")
    threads: list[ThreadCalls] = []

    def on_threads(function: Callable[[Any], Any], count: int) -> ThreadCalls:
        threads.append(ThreadCalls(function, count))
        return threads[-1]

    handle: Any = bound.handle
    if middleware:
        handle = compose(middleware, handle if bound.is_async else on_threads(handle, value("concurrency")))
    return PipelineSpec(
        name=definition.name,
        topics=definition.topics,
        group=group,
        mode="async" if bound.is_async or middleware else "thread",
        handle=handle,
        decode=_decoder(definition.name, bound.payload_type),
        encode=encode if features is None else make_encoder(features.max_payload),
        rules=FailureRules(
            consumer=definition.name,
            group=group,
            retry=value("retry"),
            dead_letter_topic=value("dead_letter_topic"),
            exhausted=value("exhausted"),
        ),
        batchers={
            name: BatcherSpec(
                name=name,
                handle=function if is_async(function) else on_threads(function, batching.concurrency),
                size=batching.size,
                timeout=batching.timeout,
                key=batching.key,
                split=batching.split,
                concurrency=batching.concurrency,
            )
            for name, (function, batching) in bound.batchers.items()
        },
        concurrency=value("concurrency"),
        timeout=value("timeout"),
        floor=floor,
        ceiling=ceiling,
        buffer_time=value("buffer_time"),
        max_bytes=value("max_buffer_bytes"),
        max_payload=value("max_payload"),
        ordered=value("order_by") is not None,
        gates=(*gates, *value("gates")),
        on_error=bound.on_error,
        on_failed=bound.on_failed,
        threads=tuple(threads),  # evaluated last: the batchers above have added theirs
    )


def _decoder(name: str, payload_type: Any) -> Decode | None:
    try:
        return make_decoder(payload_type)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from error


def make_subscription(definition: ConsumerDef, spec: PipelineSpec, on_revoke: OnRevoke) -> Subscription:
    """What the transport is asked to open."""
    return Subscription(
        topics=definition.topics,
        group=spec.group,
        window=spec.ceiling,
        max_bytes=spec.max_bytes,
        start=definition.value("start"),
        order_by=definition.value("order_by"),
        on_revoke=on_revoke,
    )


class Pipeline:
    """A pipeline over any source: a file, an HTTP feed, a broker of your own.

    `open_source` is awaited for a new source at each start. `options` are a consumer's. The handler gets each message;
    `batch` is the default batcher's handler.

        pipeline = Pipeline(open_feed, handle, concurrency=20)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pipeline.run())
            ...
            pipeline.stop()
    """

    def __init__(
        self,
        open_source: Callable[[], Awaitable[Source]],
        handler: Callable[[Message[Any]], Any],
        *,
        batch: Callable[[Batch[Any]], Any] | None = None,
        telemetry: Telemetry | None = None,
        shutdown_timeout: float = SHUTDOWN_TIMEOUT,
        max_restarts: int = 3,
        max_seconds: float = 60.0,
        **options: Unpack[ConsumerOptions],
    ) -> None:
        definition: FunctionConsumer[Any, Any] = FunctionConsumer(handler, ("source",), options)
        if batch is not None:
            definition.batch()(batch)
        self.telemetry = telemetry or Telemetry()
        self._spec = make_spec(definition, definition.bind(NO_CONTEXT), group=definition.value("group") or "default")
        self._open = open_source
        self._rule = RestartRule(max_restarts, max_seconds)
        self._shutdown_timeout = shutdown_timeout
        self._supervisor: Supervisor | None = None
        self._exit: BaseException | None = None

    async def run(self) -> None:
        """Run until `stop()`, then drain. Raises PipelineFailed when it crashes too often."""
        self._supervisor = Supervisor(
            self._spec, self._open, self.telemetry, self._rule, lambda: self._shutdown_timeout
        )
        self._exit = None
        self._supervisor.on_exit = self._on_exit
        await self._supervisor.run()
        if self._exit is not None:
            raise self._exit

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


def check_features(definition: ConsumerDef, features: Features) -> None:
    name, value = definition.name, definition.value
    if value("order_by") is not None and features.order == "none":
        raise Unsupported(f"{name}: order_by needs a broker that keeps order, and this one does not")
    if features.delay == "none" and value("retry").attempts > 1 and value("retry").base_delay > 0:
        raise Unsupported(f"{name}: retry with a delay needs a broker that delays messages; use base_delay=0")
    if not features.wildcards and any(word in ("*", "#") for topic in definition.topics for word in topic.split(".")):
        raise Unsupported(f"{name}: this broker has no topic patterns; name each topic of {definition.topics}")
