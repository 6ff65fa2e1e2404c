"""What the runtime needs to know of a consumer, with every option resolved."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

from msgspec import Struct

from .._decisions.policy import FailureRules
from ..acknowledger import Acknowledger
from ..batch import BatchHandler, Split
from ..errors import Directive
from ..gate import Gate, Watch
from ..message import Handler, Message, PublishHeaders
from ..topology import Topology
from .thread_calls import ThreadCalls

ErrorChoice = Literal["ack"] | Directive | None
ErrorHook = Callable[[Message[Any], BaseException], Awaitable[ErrorChoice] | ErrorChoice]
FailedHook = Callable[[Sequence[Message[Any]]], Awaitable[None] | None]
PrepareHook = Callable[[Sequence[Message[Any]]], Awaitable[object]]


class BatcherSpec(Struct, frozen=True, kw_only=True):
    """One batcher: `size` messages, what `split` says or `timeout` seconds; `key` of a handler's value; `concurrency`
    batch processors."""

    name: str
    handle: BatchHandler
    size: int
    timeout: float
    key: Callable[[Any], Hashable] | None
    split: Split[Any] | None
    concurrency: int


class OpenedHandler(Struct, frozen=True):
    """A consumer's handler in a worker process, with what it needs there. `batchers`: the names of the consumer's."""

    consumer: str
    handle: Callable[[Message[Any]], Any]
    is_async: bool
    decode: Callable[[bytes], Any] | None
    encode: Callable[[Any], bytes]
    batchers: tuple[str, ...]


OpenHandler = Callable[[], AbstractAsyncContextManager[OpenedHandler]]


class RemoteHandler(Struct, frozen=True):
    """What a worker process is given to find its handler by: a pickled `OpenHandler`."""

    pickled: bytes
    is_async: bool


class PipelineSpec(Struct, frozen=True, kw_only=True):
    """One pipeline.

    `handle` is called per message: awaited in the loop, or called on a thread with `mode="thread"`. `decode` makes the
    payload of a body; None gives the body itself. `floor` and `ceiling` bound the window; equal, they pin it. `threads`
    are those that plain functions run on: batch handlers, and handlers inside middleware. `sources` are opened side by
    side; `transform` makes a message of each event that they return. `options` are the consumer's, by name.
    With `mode="process"` worker processes find the handler by `remote`, `around` puts the middleware round the call of
    one, and `handle` is not called.
    """

    name: str
    topics: tuple[str, ...]
    group: str
    mode: Literal["async", "thread", "process"]
    handle: Handler | Callable[[Message[Any]], Any]
    decode: Callable[[bytes], Any] | None
    encode: Callable[[Any], bytes]
    rules: FailureRules
    batchers: Mapping[str, BatcherSpec]
    concurrency: int
    timeout: float | None
    floor: int
    ceiling: int
    buffer_time: float
    max_bytes: int
    max_payload: int | None
    ordered: bool
    topology: Topology
    gates: tuple[Gate, ...] = ()
    watches: tuple[Watch, ...] = ()
    on_error: ErrorHook | None = None
    on_failed: FailedHook | None = None
    threads: tuple[ThreadCalls, ...] = ()
    prepare: PrepareHook | None = None
    acknowledgers: tuple[Acknowledger, ...] = ()
    publish_headers: PublishHeaders | None = None
    sources: int = 1
    transform: Callable[[Any], Message[Any]] | None = None
    options: Mapping[str, Any] = {}
    remote: RemoteHandler | None = None
    around: Callable[[Handler], Handler] | None = None
