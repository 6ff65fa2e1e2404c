"""Spans: what takes a while, told at its start and at its end, while somebody listens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..batch import BatchInfo
from ..message import Handler, Message
from ..telemetry import (
    BatchFinished,
    BatchStarted,
    Event,
    HandleFailedFinished,
    HandleFailedStarted,
    MessageFinished,
    MessageStarted,
    RunFinished,
    RunStarted,
    Telemetry,
)
from .spec import PipelineSpec


class Span:
    """One span: made when it starts. `end` makes the event that finishes it."""

    __slots__ = ("_began", "_emit", "_finished", "_time")

    def __init__(
        self, emit: Callable[[Event], None], time: Callable[[], float], started: Event, finished: Callable[..., Event]
    ) -> None:
        self._emit = emit
        self._time = time
        self._finished: Callable[..., Event] | None = finished
        self._began = time()
        emit(started)

    def end(self, error: BaseException | None, **counts: int) -> None:
        """Tell the end. Idempotent: the first one counts."""
        if self._finished is not None:
            finished, self._finished = self._finished, None
            self._emit(finished(seconds=self._time() - self._began, error=error, **counts))


class Spans:
    """The spans of one pipeline. A processor asks `handler` and `of_runs` anew when the listeners change."""

    def __init__(self, spec: PipelineSpec, telemetry: Telemetry) -> None:
        self.consumer = spec.name
        self.telemetry = telemetry
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def of_runs(self) -> Callable[[str], Span] | None:
        """Makes the span of a processor's run, given its name; None when nobody listens."""
        return self._run if self.telemetry.wants(RunStarted, RunFinished) else None

    def of_messages(self) -> Callable[[Message[Any]], Span] | None:
        """Makes the span of a message whose handler runs elsewhere; None when nobody listens."""
        return self._message if self.telemetry.wants(MessageStarted, MessageFinished) else None

    def handler(self, handle: Handler) -> Handler:
        """A processor's handler, which tells of each message when somebody listens."""
        return handle if self.of_messages() is None else self._telling(handle)

    def handler_on_thread(self, handle: Callable[[Message[Any]], Any]) -> Callable[[Message[Any]], Any]:
        """The same for a handler on a thread, where each message is a run. The events are told in the loop."""
        if self.of_messages() is None and self.of_runs() is None:
            return handle
        return self._telling_on_thread(handle)

    def batch(self, info: BatchInfo, messages: Sequence[Message[Any]]) -> Span | None:
        """The span of a batch handler; None when nobody listens."""
        if not self.telemetry.wants(BatchStarted, BatchFinished):
            return None
        ids = tuple(message.id for message in messages)
        started = BatchStarted(consumer=self.consumer, info=info, ids=ids)
        return self._span(started, partial(BatchFinished, consumer=self.consumer, info=info, ids=ids))

    def handle_failed(self, messages: Sequence[Message[Any]]) -> Span | None:
        """The span of `handle_failed`; None when nobody listens."""
        if not self.telemetry.wants(HandleFailedStarted, HandleFailedFinished):
            return None
        ids = tuple(message.id for message in messages)
        started = HandleFailedStarted(consumer=self.consumer, ids=ids)
        return self._span(started, partial(HandleFailedFinished, consumer=self.consumer, ids=ids))

    def _run(self, processor: str) -> Span:
        started = RunStarted(consumer=self.consumer, processor=processor)
        return self._span(started, partial(RunFinished, consumer=self.consumer, processor=processor))

    def _message(self, message: Message[Any]) -> Span:
        started = MessageStarted(consumer=self.consumer, topic=message.topic, id=message.id, attempt=message.attempt)
        finished = partial(
            MessageFinished, consumer=self.consumer, topic=message.topic, id=message.id, attempt=message.attempt
        )
        return self._span(started, finished)

    def _span(self, started: Event, finished: Callable[..., Event]) -> Span:
        return Span(self._emit, self._loop.time, started, finished)

    def _emit(self, event: Event) -> None:
        """Tell an event in the loop, also from a thread."""
        if threading.get_ident() == self._thread:
            self.telemetry.emit(event)
            return
        try:
            self._loop.call_soon_threadsafe(self.telemetry.emit, event)
        except RuntimeError:
            return  # the loop is closed: a handler that was abandoned has ended at last, and nobody listens any more

    def _telling(self, handle: Handler) -> Handler:
        async def handle_and_tell(message: Message[Any]) -> Any:
            span = self._message(message)
            try:
                value = await handle(message)
            except BaseException as error:
                span.end(error)
                raise
            span.end(message.error)
            return value

        return handle_and_tell

    def _telling_on_thread(self, handle: Callable[[Message[Any]], Any]) -> Callable[[Message[Any]], Any]:
        def handle_and_tell(message: Message[Any]) -> Any:
            run, span = self._run(threading.current_thread().name), self._message(message)
            failure: BaseException | None = None
            try:
                return handle(message)
            except BaseException as error:
                failure = error
                raise
            finally:
                failure = failure or message.error
                span.end(failure)
                run.end(None, count=1, failed=int(failure is not None))
                failure = None  # an exception that its own traceback leads to is a circle

        return handle_and_tell
