"""The contract of a gate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol, runtime_checkable
from weakref import WeakMethod

from ..batch import Batch, BatchHandler
from ..errors import RetryLater
from ..message import Handler, Message

Call = Callable[[], None]


class Gate(Protocol):
    """Something that limits demand. It never holds a message that was received.

    Pipelines of one event loop may share it; `now` is that loop's clock in seconds. Before each receive a pipeline asks
    `allow` and takes what it says. What other pipelines have asked for and not received yet is added to `wanted` and
    taken off the answer; so a gate only says how many there may be, and never lets the same one through twice. A gate
    that opens or closes by itself calls what `on_change` gave it.

    While it is closed, the status of its pipelines shows `str(gate)`; without a `__str__`, the name of its type.

    One that must see how messages end has a method `watch` too; see Watcher.
    """

    def allow(self, now: float, wanted: int) -> int:
        """How many of `wanted` messages may be asked for now; 0 closes the gate. Asking takes nothing."""
        ...

    def took(self, now: float, count: int) -> None:
        """`count` messages were received, 1 or more."""
        ...

    def opens_at(self, now: float) -> float | None:
        """When to ask again for more than it allows now, on the loop's clock; None: when it says that it changed."""
        ...

    def on_change(self, call: Call) -> None:
        """Call this whenever the answer of `allow` may have changed: this and what was given before.

        Each pipeline that has the gate gives one, and another one after a restart. It may be held weakly.
        """
        ...


@runtime_checkable
class Watcher(Gate, Protocol):
    """A gate that sees how messages end."""

    def watch(self, *, batched: bool) -> Watch:
        """What sees the messages of one pipeline. `batched`: they end in batches."""
        ...


class Watch(Protocol):
    """What a gate sees of one pipeline's messages, in the loop.

    `message` and `batch` are middleware, outside all other. `failed` is told of every failure, also of timeouts, which
    no middleware sees; it returns what those messages end with whose failure is not to count. `gone`: these go back, or
    their handlers were given up, and no more is to be heard of them for now. `stopped`: the pipeline has ended, and
    nothing more is to be heard of its messages.
    """

    async def message(self, message: Message[Any], call_next: Handler) -> Any: ...
    async def batch(self, batch: Batch[Any], call_next: BatchHandler) -> Any: ...
    def failed(self, messages: Sequence[Message[Any]]) -> Mapping[Message[Any], RetryLater]: ...
    def gone(self, messages: Collection[Message[Any]]) -> None: ...
    def stopped(self) -> None: ...


def loop_time() -> float:
    """Seconds on the running loop's clock; outside of one on the clock that asyncio's loops have."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


class Changes:
    """Whom a gate tells that it changed."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], Call | None]] = []  # weak: a pipeline that ended is forgotten

    def add(self, call: Call) -> None:
        self._calls = [held for held in self._calls if held() is not None]
        self._calls.append(WeakMethod(call) if isinstance(call, MethodType) else lambda: call)

    def tell(self) -> None:
        for held in list(self._calls):
            call = held()
            if call is not None:
                call()
