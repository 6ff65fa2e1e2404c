"""What the runtime needs to know of a consumer, with every option resolved."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from .._decisions.policy import FailureRules
from ..errors import Directive
from ..gate import Gate
from ..message import Batch, Handler, Message, Split
from .thread_calls import ThreadCalls

ErrorChoice = Literal["ack"] | Directive | None
ErrorHook = Callable[[Message[Any], BaseException], Awaitable[ErrorChoice] | ErrorChoice]
FailedHook = Callable[[Sequence[Message[Any]]], Awaitable[None] | None]
BatchHandler = Callable[[Batch[Any]], Awaitable[Any]]


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


class PipelineSpec(Struct, frozen=True, kw_only=True):
    """One pipeline.

    `handle` is called per message: awaited in the loop, or called on a thread with `mode="thread"`. `decode` makes the
    payload of a body; None gives the body itself. `floor` and `ceiling` bound the window; equal, they pin it. `threads`
    are those that plain functions run on: batch handlers, and handlers inside middleware.
    """

    name: str
    topics: tuple[str, ...]
    group: str
    mode: Literal["async", "thread"]
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
    gates: tuple[Gate, ...] = ()
    on_error: ErrorHook | None = None
    on_failed: FailedHook | None = None
    threads: tuple[ThreadCalls, ...] = ()
