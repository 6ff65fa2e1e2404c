"""Plain functions that a coroutine awaits: sync batch handlers, and sync handlers inside middleware."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ..batch import Batch
from ..message import Message
from .unset import nothing

Call = tuple[Any, contextvars.Context, asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class ThreadCalls:
    """`await calls(subject)` runs `function(subject)` on one of up to `threads` daemon threads.

    It runs in a copy of its caller's context, so that it sees the context variables that middleware has set.

    Not an executor of the standard library: that one is joined when the interpreter ends, so a function that never
    returns would keep the process for ever. When the caller is cancelled while its function runs, the thread is
    abandoned until it returns: `on_abandoned` is called, and one more may start in its place.
    """

    def __init__(self, function: Callable[[Any], Any], threads: int) -> None:
        self.on_abandoned: Callable[[], None] = nothing
        self.abandoned: set[Any] = set()  # what threads still run and nobody waits for
        self._inside: set[Any] = set()  # what threads run: messages or batches
        self._waiters: list[asyncio.Future[None]] = []  # of `returned`
        self._function = function
        self._limit = threads
        self._started = 0
        self._busy = 0  # calls made and not ended, changed in the loop only
        self._queue: SimpleQueue[Call] = SimpleQueue()

    async def __call__(self, subject: Any) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._busy += 1
        if self._started < min(self._busy, self._limit) + len(self.abandoned):
            self._started += 1
            name = f"{getattr(self._function, '__name__', 'handler')}: thread {self._started}"
            threading.Thread(target=self._work, name=name, daemon=True).start()
        self._queue.put((subject, contextvars.copy_context(), loop, future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled() and subject in self._inside:
                self.abandoned.add(subject)
                if subject not in self._inside:
                    self.abandoned.discard(subject)  # it returned this very moment
                self.on_abandoned()
            raise
        finally:
            self._busy -= 1

    def holds(self, message: Message[Any]) -> bool:
        """Whether a thread runs this message, or a batch or a receive that it is in."""
        return any(
            subject is message or (isinstance(subject, (Batch, tuple)) and message in subject)
            for subject in list(self._inside)
        )

    async def returned(self, message: Message[Any]) -> None:
        """Return when no thread runs this message any more."""
        while self.holds(message):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _answer(self, future: asyncio.Future[Any], value: Any, failure: BaseException | None) -> None:
        _answer(future, value, failure)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _work(self) -> None:
        while True:
            subject, context, loop, future = self._queue.get()
            self._inside.add(subject)  # first, so that whoever cancels afterwards knows of it
            value: Any = None
            failure: BaseException | None = None
            if not future.cancelled():
                try:
                    value = context.run(self._function, subject)
                    if inspect.isawaitable(value):
                        raise returned_awaitable(self._function, value)
                except BaseException as error:
                    failure = error
            self._inside.discard(subject)
            self.abandoned.discard(subject)
            try:
                loop.call_soon_threadsafe(self._answer, future, value, failure)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            # Nothing of a message stays alive while the thread waits.
            del subject, context, loop, future, value, failure


def returned_awaitable(function: Any, value: Any) -> TypeError:
    """The error for a plain `def` that returned an awaitable; it names the line."""
    if inspect.iscoroutine(value):
        value.close()  # or it would warn that it was never awaited
    code = getattr(function, "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    name = getattr(function, "__qualname__", repr(function))
    return TypeError(f"{name}{where} is a plain `def` and returned an awaitable; declare it `async def`")


def _answer(future: asyncio.Future[Any], value: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(value)
    elif isinstance(failure, StopIteration):
        future.set_exception(RuntimeError(f"the function raised StopIteration: {failure!r}"))
    else:
        future.set_exception(failure)
