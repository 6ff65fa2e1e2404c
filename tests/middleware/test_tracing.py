"""The tracing middleware: a consumer span per message, which goes on with the producer's trace."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from sluiceway import Batch, Message, Reject
from sluiceway.middleware.tracing import Tracing, trace_headers
from tests.middleware.kit import ONCE, Shop

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}


class Traces:
    """A tracer provider, and the spans that ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()


@pytest.fixture
def traces() -> Iterator[Traces]:
    traces = Traces()
    yield traces
    traces.provider.shutdown()


def trace_id(span: Any) -> str:
    return f"{(span.context if isinstance(span, ReadableSpan) else span).trace_id:032x}"


async def test_a_message_is_a_consumer_span_that_is_a_child_of_its_producers(traces: Traces) -> None:
    shop = Shop(middleware=[Tracing(traces.provider)])
    ids: list[str] = []
    current: list[Any] = []

    @shop.app.consumer("t")
    async def pay(message: Message[str]) -> None:
        ids.append(message.id)
        current.append(get_current_span().get_span_context())

    await shop.run("abc", headers=PARENT)
    (span,) = traces.spans
    assert (span.name, span.kind) == ("process t", SpanKind.CONSUMER)
    assert trace_id(span) == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == SPAN
    assert span.context is not None
    assert span.context.trace_state.get("vendor") == "1"
    assert span.links == ()
    assert dict(span.attributes or {}) == {
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": "shop",
        "messaging.destination.name": "t",
        "messaging.message.id": ids[0],
        "messaging.message.body.size": 5,
        "sluiceway.attempt": 1,
        "sluiceway.outcome": "handled",
    }
    assert current == [span.context]


async def test_with_link_it_begins_a_trace_of_its_own_that_is_linked(traces: Traces) -> None:
    shop = Shop(middleware=[Tracing(traces.provider, link=True)])

    @shop.app.consumer("t")
    async def pay(message: Message[str]) -> None: ...

    with traces.provider.get_tracer("test").start_as_current_span("whoever runs the app"):
        await shop.run("abc", headers=PARENT)
    span, other = traces.spans
    assert span.parent is None
    assert trace_id(span) not in (TRACE, trace_id(other))
    assert [trace_id(link.context) for link in span.links] == [TRACE]


@pytest.mark.parametrize("headers", [{}, {"traceparent": "rubbish"}], ids=["none", "rubbish"])
async def test_a_message_without_a_trace_begins_one(headers: dict[str, str], traces: Traces) -> None:
    shop = Shop(middleware=[Tracing(traces.provider)])

    @shop.app.consumer("t")
    async def pay(message: Message[str]) -> None: ...

    await shop.run("a", "b", headers=headers)
    first, second = traces.spans
    assert first.parent is None
    assert trace_id(first) != trace_id(second)


async def test_a_failure_is_recorded_as_an_error_and_a_reject_as_an_outcome(traces: Traces) -> None:
    shop = Shop(middleware=[Tracing(traces.provider)])

    @shop.app.consumer("t", retry=ONCE, concurrency=1)
    async def pay(message: Message[str]) -> None:
        if message.payload == "bad":
            raise ValueError("no")
        if message.payload == "told":
            message.fail("told")
        if message.payload == "rejected":
            raise Reject("never")

    await shop.run("bad", "told", "rejected")
    found = [
        (span.attributes["sluiceway.outcome"], span.status.status_code, [event.name for event in span.events])
        for span in traces.spans
        if span.attributes is not None
    ]
    assert found == [
        ("failed", StatusCode.ERROR, ["exception"]),
        ("failed", StatusCode.ERROR, ["exception"]),
        ("rejected", StatusCode.UNSET, []),
    ]


async def test_a_batch_is_a_span_linked_to_the_trace_of_each_message(traces: Traces) -> None:
    shop = Shop(batch_middleware=[Tracing(traces.provider)])

    @shop.app.consumer("t")
    async def pay(message: Message[str]) -> None: ...

    @pay.batch(size=2)
    async def book(batch: Batch[Any]) -> None: ...

    await shop.run("a", "b", headers=PARENT)
    (span,) = traces.spans
    assert span.name == "process pay"
    assert [trace_id(link.context) for link in span.links] == [TRACE, TRACE]
    assert span.attributes is not None
    assert span.attributes["messaging.batch.message_count"] == 2
    assert span.attributes["sluiceway.batcher"] == "default"


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_trace_goes_on_through_what_a_handler_and_the_app_publish(kind: str, traces: Traces) -> None:
    shop = Shop(middleware=[Tracing(traces.provider)], publish_headers=trace_headers)

    def pass_on(message: Message[str]) -> None:
        message.publish("next", message.payload)

    async def pass_on_async(message: Message[str]) -> None:
        pass_on(message)
        await shop.app.publish("next", "from the app")

    shop.app.consumer("t", name="first")(pass_on if kind == "sync" else pass_on_async)

    @shop.app.consumer("next")
    async def second(message: Message[str]) -> None: ...

    with traces.provider.get_tracer("test").start_as_current_span("request") as request:
        await shop.run("abc")
    *others, _ = sorted(traces.spans, key=lambda span: span.name)
    assert [span.name for span in others] == ["process next"] * (1 if kind == "sync" else 2) + ["process t"]
    first = others[-1]
    assert {trace_id(span) for span in others} == {f"{request.get_span_context().trace_id:032x}"}
    assert first.context is not None
    assert {span.parent.span_id for span in others[:-1] if span.parent} == {first.context.span_id}


async def test_spans_of_messages_handled_at_once_do_not_mix(traces: Traces) -> None:
    shop = Shop(middleware=[Tracing(traces.provider)])
    seen: dict[str, str] = {}

    @shop.app.consumer("t", concurrency=3)
    async def pay(message: Message[str]) -> None:
        await asyncio.sleep(0.01)
        seen[message.id] = trace_id(get_current_span().get_span_context())

    await shop.run("a", "b", "c")
    assert len(set(seen.values())) == 3
    for span in traces.spans:
        assert span.attributes is not None
        assert seen[str(span.attributes["messaging.message.id"])] == trace_id(span)
