"""From a declared consumer to what the runtime needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from ._decisions.policy import FailureRules
from ._runtime.spec import BatcherSpec, PipelineSpec, RemoteHandler
from ._runtime.supervisor import PipelineStats
from ._runtime.thread_calls import ThreadCalls
from .batch import BatchHandler
from .codec import Decode, Format, encode, make_decoder, make_encoder
from .consumer import Bound, ConsumerDef
from .errors import OptionError, Unsupported
from .gate import Gate, Watcher
from .message import PublishHeaders
from .middleware import BatchMiddleware, ConsumerInfo, Middleware, compose, decodes, made_for
from .options import Batching
from .signatures import Lifespan, is_async
from .source import OnRevoke, Subscription
from .topology import BatcherStage, Stage, Topology
from .transport import Features

AUTOMATIC_CEILING = 1_000  # messages; more brings no speed (measured: 100: 1.05 M/s, 1,000: 1.6-2.2 M/s)


def window_floor(concurrency: int, batchings: Mapping[str, Batching]) -> int:
    """The least window that lets every processor work and every batch fill."""
    return concurrency + sum(one.size * (one.concurrency + 1) for one in batchings.values())


def window_bounds(definition: ConsumerDef, batchings: Mapping[str, Batching]) -> tuple[int, int]:
    """Floor and ceiling of a consumer's window; equal when `max_demand` pins it. Raises OptionError.

    The ceiling leaves room for one waiting message per processor: without one, a thousand processors each wait for a
    turn of the loop after every message (a tenth of what they do, with handlers of 10 ms).
    """
    floor = window_floor(definition.value("concurrency"), batchings)
    pinned = definition.value("max_demand")
    if pinned is None:
        return floor, max(floor + definition.value("concurrency"), AUTOMATIC_CEILING)
    if pinned < floor:
        raise OptionError(
            f"{definition.name}: max_demand must be at least {floor} (concurrency + size x (concurrency + 1) of each "
            f"batcher), or batches can never fill; got {pinned}"
        )
    return pinned, pinned


def make_spec(
    definition: ConsumerDef,
    bound: Bound,
    *,
    group: str,
    features: Features | None = None,
    gates: Sequence[Gate] = (),
    middleware: Sequence[Middleware] = (),
    batch_middleware: Sequence[BatchMiddleware] = (),
    publish_headers: PublishHeaders | None = None,
    stats: Callable[[], PipelineStats | None] = lambda: None,
    lifespan: Lifespan | None = None,
) -> PipelineSpec:
    """Everything the runtime needs to know of a consumer. Raises OptionError or Unsupported, before any message.

    The app's `middleware` and `batch_middleware` go round the consumer's own, and what gates watch with round both.
    Worker processes enter `lifespan`, the app's.
    """
    value = definition.value
    batchings = {name: batching for name, (_, batching) in bound.batchers.items()}
    if not batchings:
        _refuse_options_of_batches(definition)
    floor, ceiling = window_bounds(definition, batchings)
    if features is not None:
        check_features(definition, features)
    info = _info(definition, group, stats)
    gates = tuple({id(gate): gate for gate in (*gates, *value("gates"))}.values())  # each once
    watches = tuple(gate.watch(batched=bool(batchings)) for gate in gates if isinstance(gate, Watcher))
    middleware = (*(one.message for one in watches), *middleware, *value("middleware"))
    batch_middleware = (*(one.batch for one in watches), *batch_middleware, *value("batch_middleware"))
    remote = _remote(definition, bound, features, lifespan, decodes(middleware))
    around = (lambda inner: compose(made_for(info, middleware), inner)) if middleware else None
    composed = _composed(bound, info, value("concurrency"), around if remote is None else None, batch_middleware)
    return PipelineSpec(
        name=definition.name,
        topics=definition.topics,
        group=group,
        mode="process" if remote is not None else "async" if bound.is_async or middleware else "thread",
        handle=composed.handle,
        decode=None if decodes(middleware) else _decoder(definition.name, bound.payload_type),
        encode=encode if features is None else make_encoder(features.max_payload),
        rules=_rules(definition, group),
        batchers=composed.batchers,
        concurrency=value("concurrency"),
        timeout=value("timeout"),
        floor=floor,
        ceiling=ceiling,
        buffer_time=value("buffer_time"),
        max_bytes=value("max_buffer_bytes"),
        max_payload=value("max_payload"),
        ordered=value("order_by") is not None,
        gates=gates,
        watches=watches,
        on_error=bound.on_error,
        on_failed=bound.on_failed,
        prepare=composed.prepare,
        acknowledgers=tuple(value("acknowledgers")),
        publish_headers=publish_headers,
        topology=topology_of(definition, group),
        sources=value("sources"),
        options={name: one.value for name, one in definition.options.items()},
        remote=remote,
        around=around,
        threads=composed.threads,
    )


class _Composed(NamedTuple):
    """The functions of a consumer as the stages call them, and the threads that they run on."""

    handle: Any
    prepare: Any
    batchers: dict[str, BatcherSpec]
    threads: tuple[ThreadCalls, ...]


def _composed(
    bound: Bound,
    info: ConsumerInfo,
    concurrency: int,
    around: Callable[[Any], Any] | None,
    batch_middleware: Sequence[BatchMiddleware],
) -> _Composed:
    """Put middleware round the handlers. A plain `def` runs on threads of its own where its stage has none for it."""
    threads: list[ThreadCalls] = []

    def on_threads(function: Callable[[Any], Any], count: int) -> ThreadCalls:
        threads.append(ThreadCalls(function, count))
        return threads[-1]

    handle: Any = bound.handle
    if around is not None:
        handle = around(handle if bound.is_async else on_threads(handle, concurrency))
    prepare: Any = bound.prepare
    if prepare is not None and not is_async(prepare):
        prepare = on_threads(prepare, 1)
    batchers: dict[str, BatcherSpec] = {}
    for name, (function, batching) in bound.batchers.items():
        inner: Any = function if is_async(function) else on_threads(function, batching.concurrency)
        wrapped = compose(made_for(replace(info, batcher=name), batch_middleware), inner)
        batchers[name] = _batcher(name, wrapped, batching)
    return _Composed(handle, prepare, batchers, tuple(threads))


def check_start(
    definition: ConsumerDef,
    *,
    group: str,
    features: Features,
    lifespan: Lifespan | None = None,
    middleware: Sequence[Middleware] = (),
    batch_middleware: Sequence[BatchMiddleware] = (),
) -> None:
    """Raise what `make_spec` would, without the context that the handlers are bound to: nothing has to run for it.

    Each middleware is made for the consumer, as at a start.
    """
    if lifespan is None:
        definition.check_without_context()
    batchings = definition.batchings()
    if not batchings:
        _refuse_options_of_batches(definition)
    window_bounds(definition, batchings)
    check_features(definition, features)
    middleware = (*middleware, *definition.value("middleware"))
    batch_middleware = (*batch_middleware, *definition.value("batch_middleware"))
    if definition.value("executor") == "process":
        _check_crosses(definition, decodes(middleware))
    if not decodes(middleware):
        _decoder(definition.name, definition.payload_type)
    info = _info(definition, group, lambda: None)
    made_for(info, middleware)
    for name in batchings:
        made_for(replace(info, batcher=name), batch_middleware)


def _refuse_options_of_batches(definition: ConsumerDef) -> None:
    for option in ("batch_size", "batch_timeout", "batch_middleware"):
        if option in definition.given:
            raise OptionError(
                f"{definition.name}: {option} has no effect without a batch handler: declare one or leave it out"
            )


def _rules(definition: ConsumerDef, group: str) -> FailureRules:
    return FailureRules(
        consumer=definition.name,
        group=group,
        retry=definition.value("retry"),
        dead_letter_topic=definition.value("dead_letter_topic"),
        exhausted=definition.value("exhausted"),
    )


def _batcher(name: str, handle: BatchHandler, batching: Batching) -> BatcherSpec:
    return BatcherSpec(
        name=name,
        handle=handle,
        size=batching.size,
        timeout=batching.timeout,
        key=batching.key,
        split=batching.split,
        concurrency=batching.concurrency,
    )


def _remote(
    definition: ConsumerDef,
    bound: Bound,
    features: Features | None,
    lifespan: Lifespan | None,
    decoded_by_middleware: bool,
) -> RemoteHandler | None:
    """What worker processes are given with `executor="process"`. Raises OptionError."""
    if definition.value("executor") != "process":
        return None
    _check_crosses(definition, decoded_by_middleware)
    from .remote import remote_handler  # here: few consumers need what it imports

    max_payload = None if features is None else features.max_payload
    return remote_handler(definition, lifespan=lifespan, max_payload=max_payload, is_async=bound.is_async)


def _check_crosses(definition: ConsumerDef, decoded_by_middleware: bool) -> None:
    """Raise OptionError for what is done to a message here and does not reach worker processes."""
    stays = "prepare" if definition.has_prepare else "a middleware that decodes" if decoded_by_middleware else None
    if stays is not None:
        raise OptionError(
            f"{definition.name}: executor='process' and {stays} exclude each other: what that leaves in a message does "
            "not reach the worker processes; do it in the handler"
        )


def _info(definition: ConsumerDef, group: str, stats: Callable[[], PipelineStats | None]) -> ConsumerInfo:
    return ConsumerInfo(
        name=definition.name,
        group=group,
        batchers=tuple(definition.batchers),
        is_async=definition.is_async,
        payload_type=definition.payload_type,
        decoder=lambda format: _decoder(definition.name, definition.payload_type, format) or bytes,
        stats=stats,
    )


def _decoder(name: str, payload_type: Any, format: Format = "json") -> Decode | None:
    try:
        return make_decoder(payload_type, format)
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


def topology_of(definition: ConsumerDef, group: str) -> Topology:
    """The stages that a consumer has or would have."""
    name = definition.name
    return Topology(
        pipeline=name,
        topics=definition.topics,
        group=group,
        sources=Stage(name=f"{name}: source", concurrency=definition.value("sources")),
        processors=Stage(name=f"{name}: processor", concurrency=definition.value("concurrency")),
        batchers=tuple(
            BatcherStage(
                batcher=batcher,
                batch_processors=Stage(name=f"{name}: batcher {batcher}", concurrency=batching.concurrency),
            )
            for batcher, batching in definition.batchings().items()
        ),
    )


def check_features(definition: ConsumerDef, features: Features) -> None:
    name, value = definition.name, definition.value
    if value("order_by") is not None and features.order == "none":
        raise Unsupported(f"{name}: order_by needs a broker that keeps order, and this one does not")
    if features.delay == "none" and value("retry").attempts > 1 and value("retry").base_delay > 0:
        raise Unsupported(f"{name}: retry with a delay needs a broker that delays messages; use base_delay=0")
    if not features.wildcards and any(word in ("*", "#") for topic in definition.topics for word in topic.split(".")):
        raise Unsupported(f"{name}: this broker has no topic patterns; name each topic of {definition.topics}")
