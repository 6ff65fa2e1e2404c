"""Processors whose handler runs in worker processes, for handlers that keep a CPU busy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from copy import copy
from typing import Any

from msgspec.structs import replace

from .._decisions.ahead import Ahead
from ..errors import HandlerTimeout, KilledItsProcess, Release
from ..message import QUEUED, RUNNING, Handler, Message
from .batchers import Batchers
from .endings import Endings
from .failures import Failures
from .processors import AsyncProcessors
from .settler import PipelineSettler
from .spans import Span, Spans
from .spec import PipelineSpec
from .unset import no
from .worker import Worker
from .worker_pool import WorkerPool
from .worker_words import NOTHING, More, outgoing_of


class ProcessProcessors(Endings):
    """Up to `concurrency` worker processes, each with one handler at a time.

    What waits in a worker behind the message that it runs counts as unstarted, but cannot be taken back at once: it is
    called back, and `give_back` is called with it when it comes.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        settler: PipelineSettler,
        batchers: Batchers,
        failures: Failures,
        give_back: Callable[[list[Message[Any]]], object],
    ) -> None:
        assert spec.remote is not None
        super().__init__(spec, settler, batchers, failures)
        self.still_on_thread: Callable[[Message[Any]], bool] = no
        self.pool = WorkerPool(spec.name, spec.remote, spec.concurrency, self, ahead=Ahead(), timeout=spec.timeout)
        self._give_back = give_back
        self._span_of_run: Callable[[str], Span] | None = None
        self._span_of_message: Callable[[Message[Any]], Span] | None = None
        self._spans: dict[Message[Any], tuple[Span | None, Span | None]] = {}

    def listeners_changed(self, spans: Spans) -> None:
        self._span_of_run, self._span_of_message = spans.of_runs(), spans.of_messages()

    @property
    def unstarted(self) -> int:
        return self.pool.waiting

    @property
    def running(self) -> int:
        return self.pool.running + len(self._failing)

    @property
    def idle(self) -> bool:
        return self.pool.idle

    def put(self, messages: Sequence[Message[Any]]) -> None:
        self.pool.put(messages)

    def take_unstarted(self) -> list[Message[Any]]:
        return [message for message in self.pool.take_back() if message.state == QUEUED]

    def holds(self, message: Message[Any]) -> bool:
        return False

    def cancel(self) -> int:
        return self.pool.cut_off_all(Release("shutdown")) + self._cancel_failing()

    async def end(self) -> None:
        await self.pool.end()

    def close(self) -> Collection[asyncio.Task[None]]:
        self._cancel_failing()
        return self.pool.close() | self._failing

    # -- what the pool calls -------------------------------------------------------------------------------------

    def claim(self, message: Message[Any]) -> bool:
        if message.state != QUEUED:
            return False
        message.state = RUNNING  # from here on nobody can say that it is not
        return True

    def unclaim(self, message: Message[Any]) -> None:
        if message.state == RUNNING:
            message.state = QUEUED

    def entered(self, worker: Worker, message: Message[Any]) -> None:
        if self._span_of_run is not None or self._span_of_message is not None:
            run = self._span_of_run and self._span_of_run(f"{self.spec.name}: worker process {worker.pid}")
            self._spans[message] = (run, self._span_of_message and self._span_of_message(message))
        self._note_occupancy()

    def ended(self, message: Message[Any], more: More, error: BaseException | None) -> None:
        """Act as if the handler had ended here."""
        if self._spans:
            run, span = self._spans.pop(message, (None, None))
            if span is not None:
                span.end(error)
            if run is not None:
                run.end(None, count=1, failed=int(error is not None))
        try:
            take_over(message, more, self.settler)
            if error is None and message.state == RUNNING:
                if self.spec.batchers:
                    self._decode(message)  # it was, in the worker; the batch handler may look at the payload here
                self._succeed(message, more.value)
        except Exception as raised:
            error = error or raised
        if error is not None:
            self._failed(message, error)

    def given_back(self, messages: list[Message[Any]]) -> None:
        self._give_back([message for message in messages if message.state == QUEUED])

    def changed(self) -> None:
        self._note_occupancy()
        if self.pool.idle:
            self.on_idle()

    def crashed(self, error: BaseException) -> None:
        self.on_crash(error)

    # -- messages ------------------------------------------------------------------------------------------------

    def _failed(self, message: Message[Any], error: BaseException) -> None:
        message.error = error
        hooks = self.spec.on_error is not None or self.spec.on_failed is not None
        if hooks and not isinstance(error, (KilledItsProcess, HandlerTimeout)):  # for decoding may be what did that
            with contextlib.suppress(Exception):
                self._decode(message)
        self._fail((message,))

    def _decode(self, message: Message[Any]) -> None:
        message.payload = message.body if self.spec.decode is None else self.spec.decode(message.body)

    def _note_occupancy(self) -> None:
        running = self.pool.running
        self.settler.occupancy.processing(self._loop.time(), running, self.spec.concurrency - running)


class WrappedProcessProcessors(AsyncProcessors):
    """Tasks in the loop that run middleware, whose innermost step runs the handler in a worker process.

    Nothing is sent ahead: middleware decides for each message whether its handler runs at all. A task that is cancelled
    kills the worker that it waits for. `timeout` bounds the handler, not what middleware does beside it.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        settler: PipelineSettler,
        batchers: Batchers,
        failures: Failures,
        around: Callable[[Handler], Handler],
    ) -> None:
        assert spec.remote is not None
        inner = replace(spec, handle=around(self._call), timeout=None)  # the pool knows when a handler is entered
        super().__init__(inner, settler, batchers, failures)
        self.pool = WorkerPool(spec.name, spec.remote, spec.concurrency, self, ahead=None, timeout=spec.timeout)
        self._waiting: dict[Message[Any], tuple[Message[Any], asyncio.Future[Any]]] = {}

    async def _call(self, message: Message[Any]) -> Any:
        future: asyncio.Future[Any] = self._loop.create_future()
        # A copy for each call: middleware may call again while the worker of a call that was cut off still dies.
        called = copy(message)
        self._waiting[called] = message, future
        self.pool.put((called,))
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():
                self.pool.drop(called, Release("cancelled"))
            raise
        finally:
            self._waiting.pop(called, None)

    async def end(self) -> None:
        await self.pool.end()

    def close(self) -> Collection[asyncio.Task[None]]:
        return {*super().close(), *self.pool.close()}

    # -- what the pool calls -------------------------------------------------------------------------------------

    def claim(self, message: Message[Any]) -> bool:
        return message in self._waiting

    def unclaim(self, message: Message[Any]) -> None:
        pass

    def entered(self, worker: Worker, message: Message[Any]) -> None:
        pass

    def ended(self, message: Message[Any], more: More, error: BaseException | None) -> None:
        waiting, future = self._waiting.get(message, (None, None))
        if waiting is None or future is None or future.done():
            return
        try:
            take_over(waiting, more, self.settler)
        except Exception as raised:
            error = error or raised
        if error is None:
            future.set_result(more.value)
        elif isinstance(error, StopIteration):  # no future takes that
            future.set_exception(RuntimeError(f"the handler raised StopIteration: {error!r}"))
        else:
            future.set_exception(error)

    def given_back(self, messages: list[Message[Any]]) -> None:
        for message in messages:
            self.ended(message, NOTHING, Release("shutdown"))

    def changed(self) -> None:
        self.on_idle()

    def crashed(self, error: BaseException) -> None:
        self.on_crash(error)


def take_over(message: Message[Any], more: More, settler: PipelineSettler) -> None:
    """What the handler said of its message, as if it had said it here."""
    message.settler = settler
    message.routing = more.routing or message.routing
    message.ending = more.ending or message.ending
    if more.outputs is not None:
        message.outputs = message.outputs or []
        for fields in more.outputs:
            outgoing = outgoing_of(fields)
            headers = settler.with_headers(outgoing.headers)
            message.outputs.append(outgoing if headers is outgoing.headers else replace(outgoing, headers=headers))
