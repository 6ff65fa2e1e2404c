"""Traces by OpenTelemetry: needs the extra `otel`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..message import Message
from . import ConsumerInfo
from ._ends import end_of

try:
    from opentelemetry import propagate, trace
except ImportError as error:
    raise ImportError("tracing needs opentelemetry-api: pip install 'sluiceway[otel]'") from error

Step = Callable[[Any], Awaitable[Any]]


def trace_headers() -> dict[str, str]:
    """The headers that carry the current trace on, for `App(publish_headers=trace_headers)`.

    They are what OpenTelemetry's propagators say: W3C `traceparent`, `tracestate` and `baggage` unless set otherwise.
    """
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


class Tracing:
    """A consumer span per message, which goes on with the trace that the message's headers carry.

    It is a child of the producer's span, or, with `link=True`, the start of a trace that is linked to it. As batch
    middleware it makes a span per batch, linked to the trace of each of its messages. `tracer_provider` is
    OpenTelemetry's global one unless given. The span is current while the handler runs, on threads too. A failure is
    recorded as an exception with status error; a Reject, RetryLater or Release is an outcome, not an error.
    """

    def __init__(self, tracer_provider: trace.TracerProvider | None = None, *, link: bool = False) -> None:
        self._tracer = trace.get_tracer("sluiceway", tracer_provider=tracer_provider)
        self._link = link

    def for_consumer(self, consumer: ConsumerInfo) -> Callable[[Any, Step], Awaitable[Any]]:
        common = {"messaging.operation.type": "process", "messaging.consumer.group.name": consumer.group}
        if consumer.batcher is None:
            return self._messages(common)
        return self._batches(f"process {consumer.name}", {**common, "sluiceway.batcher": consumer.batcher})

    def _messages(self, common: dict[str, str]) -> Callable[[Any, Step], Awaitable[Any]]:
        async def traced(message: Message[Any], call_next: Step) -> Any:
            parent = propagate.extract(message.headers)
            attributes: dict[str, Any] = {
                **common,
                "messaging.destination.name": message.topic,
                "messaging.message.id": message.id,
                "messaging.message.body.size": len(message.body),
                "sluiceway.attempt": message.attempt,
            }
            links = _links((message,)) if self._link else []
            with self._span(f"process {message.topic}", None if self._link else parent, attributes, links) as span:
                value = await call_next(message)
                _end(span, message.error)
                return value

        return traced

    def _batches(self, name: str, common: dict[str, str]) -> Callable[[Any, Step], Awaitable[Any]]:
        async def traced(batch: Any, call_next: Step) -> Any:
            attributes = {**common, "messaging.batch.message_count": len(batch)}
            with self._span(name, None, attributes, _links(batch)) as span:
                value = await call_next(batch)
                _end(span, None)
                return value

        return traced

    @contextmanager
    def _span(
        self, name: str, parent: Any, attributes: dict[str, Any], links: list[trace.Link]
    ) -> Iterator[trace.Span]:
        # A trace of its own has an empty context for its parent: whatever span is current here is not its cause.
        context = trace.set_span_in_context(trace.INVALID_SPAN) if parent is None else parent
        with self._tracer.start_as_current_span(
            name,
            context=context,
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes,
            links=links,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                _end(span, error)
                raise


def _links(messages: Iterable[Message[Any]]) -> list[trace.Link]:
    contexts = (trace.get_current_span(propagate.extract(message.headers)).get_span_context() for message in messages)
    return [trace.Link(context) for context in contexts if context.is_valid]


def _end(span: trace.Span, error: BaseException | None) -> None:
    outcome = end_of(error)
    span.set_attribute("sluiceway.outcome", outcome)
    if error is not None and outcome in ("failed", "cancelled"):
        span.record_exception(error)
        span.set_status(trace.Status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}"))
