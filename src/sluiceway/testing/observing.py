"""Put an app over another broker for a while, and watch what its consumers do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

from msgspec.structs import replace

from ..app import App
from ..batch import Batch
from ..consumer import Bound, ConsumerDef
from ..message import Message
from ..signatures import NO_CONTEXT, is_async
from ..transport import Transport
from .record import Recorder


def as_app(target: Any) -> App:
    """The app itself, or one of a single consumer. Raises AppError for anything else."""
    return target if isinstance(target, App) else App("memory://", consumers=[target])


@contextmanager
def instead(
    app: App, transport: Transport, recorder: Recorder, context: Any, *, restarts: int | None
) -> Iterator[None]:
    """Give the app another broker, context and restart rule for a while."""
    before = {name: getattr(app, name) for name in ("transport", "url", "lifespan", "consumers", "max_restarts")}
    app.use(transport)
    app.consumers = {name: _observed(one, app.group, recorder) for name, one in app.consumers.items()}
    if context is not NO_CONTEXT:
        app.lifespan = lambda: nullcontext(context)
    if restarts is not None:
        app.max_restarts = restarts
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(app, name, value)


def _observed(definition: ConsumerDef, group: str, recorder: Recorder) -> ConsumerDef:
    """The consumer, with its batches told to the recorder."""
    observed = copy.copy(definition)
    group = definition.value("group") or group

    def bind(context: Any) -> Bound:
        bound = definition.bind(context)
        others = [bound.prepare, *(handle for handle, _ in bound.batchers.values())]
        in_loop = bound.is_async and all(one is None or is_async(one) for one in others)
        if not in_loop or definition.value("executor") == "process":
            recorder.outside.add((definition.topics, group))
        told = {name: (_told(handle, recorder), batching) for name, (handle, batching) in bound.batchers.items()}
        keeps = bound.handle if definition.value("executor") == "process" else _keeping(bound.handle, bound.is_async)
        return replace(bound, handle=keeps, batchers=told)

    observed.bind = bind  # type: ignore[method-assign]
    return observed


def _told(handle: Callable[[Batch[Any]], Any], recorder: Recorder) -> Callable[[Batch[Any]], Any]:
    @wraps(handle)
    def handle_batch(batch: Batch[Any]) -> Any:
        recorder.formed(batch)
        return handle(batch)

    return handle_batch


def _keeping(handle: Callable[[Message[Any]], Any], is_async: bool) -> Callable[[Message[Any]], Any]:
    """The handler, with what it returns left in its message, where otherwise only a batcher leaves it."""

    @wraps(handle)
    async def handle_in_loop(message: Message[Any]) -> Any:
        message.value = await handle(message)
        return message.value

    @wraps(handle)
    def handle_on_thread(message: Message[Any]) -> Any:
        message.value = handle(message)
        return message.value

    return handle_in_loop if is_async else handle_on_thread
