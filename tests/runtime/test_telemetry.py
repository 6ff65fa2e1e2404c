"""Telemetry: every event is told when it happens, spans end once, and listeners harm nobody."""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from sluiceway import App, Batch, Consumer, Message, Pipeline, Reject, Retry
from sluiceway.batch import BatchInfo
from sluiceway.message import Refused, Settlement
from sluiceway.telemetry import (
    BatchEmitted,
    BatchFinished,
    BatchStarted,
    Demanded,
    Event,
    HandleFailedFinished,
    HandleFailedStarted,
    MessageFailed,
    MessageFinished,
    MessageStarted,
    PipelineCrashed,
    PipelineStarted,
    PipelineStopped,
    Published,
    Queued,
    Received,
    RunFinished,
    RunStarted,
    Settled,
    SettleRefused,
    SuspectRuns,
    Telemetry,
    WindowFull,
)
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, bodies, running

virtual_time = pytest.mark.virtual_time

ONCE = Retry(attempts=1)
KINDS = Event.__subclasses__()


def listening(*kinds: type[Event]) -> tuple[Telemetry, list[Any]]:
    telemetry, heard = Telemetry(), list[Any]()
    telemetry.attach(heard.append, *kinds)
    return telemetry, heard


async def an_app_with_all_that_can_happen(telemetry: Telemetry) -> None:
    """Handlers and batches that succeed and fail, dead letters, and messages that are published."""
    app = App(MemoryTransport())
    app.telemetry = telemetry

    @app.consumer("work", retry=ONCE, batch_size=2, batch_timeout=0.5)
    class Work(Consumer[str]):
        async def handle(self, message: Message[str]) -> str:
            if message.payload == "reject":
                raise Reject("no")
            message.publish("done", message.payload)
            return message.payload

        async def handle_batch(self, batch: Batch[str]) -> None:
            for message in batch:
                if message.payload == "fail":
                    message.fail("no")

        async def handle_failed(self, messages: Sequence[Message[str]]) -> None:
            raise ValueError("no")

    async with app.running() as manager:
        await app.publish("work", "good")
        await app.publish_many("work", ["reject", "fail", "good"])
        await manager.idle()


async def a_pipeline_with_all_that_can_go_wrong(telemetry: Telemetry) -> None:
    """A crash, a suspect, a lost lease, and more messages than the window has room for."""
    broker = Broker(*bodies(30))
    broker.put("suspect", suspect=True, deliveries=3)
    broker.lost.add("m5")
    crash = True

    async def receive(demand: int) -> None:
        nonlocal crash
        if crash:
            crash = False
            raise ConnectionError("gone")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.1)

    broker.on_receive = receive
    async with running(Pipeline(broker.open, handle, concurrency=2, max_demand=4, telemetry=telemetry), broker):
        await broker.settled(30)


async def everything(telemetry: Telemetry) -> None:
    await an_app_with_all_that_can_happen(telemetry)
    await a_pipeline_with_all_that_can_go_wrong(telemetry)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field is declared to have."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if get_origin(hint) is Literal:
        return value in arguments
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(one, arguments[0]) for one in value)
    return type(value) is hint or (isinstance(hint, type) and hint not in (int, float) and isinstance(value, hint))


@virtual_time
async def test_every_event_is_told_with_fields_of_the_types_that_it_declares() -> None:
    telemetry, heard = listening()
    await everything(telemetry)
    for event in heard:
        for name, hint in get_type_hints(type(event)).items():
            assert fits(getattr(event, name), hint), f"{type(event).__name__}.{name} is {getattr(event, name)!r}"
    assert {type(event).__name__ for event in heard} == {kind.__name__ for kind in KINDS}


@virtual_time
async def test_nothing_is_told_to_listeners_of_other_events() -> None:
    told = 0
    for kind in KINDS:
        telemetry, heard = listening(kind)
        await an_app_with_all_that_can_happen(telemetry)
        assert {type(event) for event in heard} <= {kind}
        told += bool(heard)
    assert told > 15


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@virtual_time
async def test_a_listener_that_raises_is_detached_once_and_no_message_suffers(
    kind: type[Event], caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def broken(event: Any) -> None:
        nonlocal calls
        calls += 1
        raise ValueError("no")

    telemetry, heard = listening()
    telemetry.attach(broken, kind)
    telemetry.attach(broken, kind)
    with caplog.at_level(logging.ERROR, "sluiceway.telemetry"):
        await everything(telemetry)
    assert calls == 1
    said = [one.getMessage() for one in caplog.records if one.name == "sluiceway.telemetry"]
    assert said == [f"a telemetry listener raised on {kind.__name__} and is detached"]
    assert kind in {type(event) for event in heard}
    settled: dict[str, int] = {}
    for one in heard:
        if isinstance(one, Settled):
            settled[one.outcome] = settled.get(one.outcome, 0) + one.count
    assert (settled["ack"], settled["dead_letter"]) == (2 + 30, 2)


# -- the way of one message ------------------------------------------------------------------------------------------


@virtual_time
async def test_a_message_is_told_from_demand_to_settle() -> None:
    broker = Broker("1")
    telemetry, heard = listening()

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(2)

    async with running(Pipeline(broker.open, handle, concurrency=1, max_demand=1, telemetry=telemetry), broker):
        await broker.settled(1)
        await broker.until(lambda: broker.source.receiving)
    assert [type(event) for event in heard] == [
        PipelineStarted, Demanded, Received, Queued, WindowFull, RunStarted, MessageStarted, MessageFinished,
        RunFinished, Settled, Demanded, PipelineStopped,
    ]  # fmt: skip
    started, _, received, queued, full, run, _, finished, run_finished, settled, *_ = heard
    assert (started.topology.processors.concurrency, started.restarts) == (1, 0)
    assert (received.demand, received.count, queued.count, full.window) == (1, 1, 1, 1)
    assert (finished.id, finished.attempt, finished.seconds, finished.error) == ("m1", 1, 2.0, None)
    assert (run_finished.count, run_finished.failed, run_finished.seconds) == (1, 0, 2.0)
    assert run.processor == run_finished.processor == "handle: processor 1"
    assert (settled.outcome, settled.count) == ("ack", 1)


@virtual_time
async def test_a_failure_is_told_by_its_message_its_run_and_what_becomes_of_it() -> None:
    broker = Broker("raise", "fail", "fine")
    telemetry, heard = listening(MessageFinished, MessageFailed, RunFinished)

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"raise":
            raise KeyError("no")
        if message.body == b"fail":
            message.fail("no")

    pipeline = Pipeline(broker.open, handle, concurrency=1, max_demand=3, retry=ONCE, telemetry=telemetry)
    async with running(pipeline, broker):
        await broker.settled(3)
        await asyncio.sleep(1)
    kinds = [type(event) for event in heard]
    assert kinds == [MessageFinished, MessageFailed, MessageFinished, MessageFailed, MessageFinished, RunFinished]
    raised, decided, failed, _, fine, run = heard
    assert isinstance(raised.error, KeyError)
    assert (decided.error, decided.outcome, decided.delay) == (raised.error, "dead_letter", 0.0)
    assert str(failed.error) == "no"
    assert fine.error is None
    assert (run.count, run.failed, run.error) == (3, 2, None)


@virtual_time
async def test_a_body_that_cannot_be_decoded_fails_and_never_starts() -> None:
    app = App(MemoryTransport())
    heard: list[Any] = []
    app.telemetry.attach(heard.append, MessageStarted, MessageFailed)

    @app.consumer("work")
    async def work(message: Message[int]) -> None: ...

    async with app.running() as manager:
        await app.publish("work", "no number")
        await manager.idle()
    assert [type(event) for event in heard] == [MessageFailed]


@virtual_time
async def test_batches_are_told_from_their_batcher_to_the_end_of_their_handler() -> None:
    broker = Broker(*bodies(5))
    telemetry, heard = listening(BatchEmitted, BatchStarted, BatchFinished)

    async def handle(message: Message[bytes]) -> None: ...

    async def book(batch: Batch[None]) -> None:
        await asyncio.sleep(1)
        if len(batch) == 1:
            raise KeyError("all")
        batch[0].fail("one")

    pipeline = Pipeline(
        broker.open, handle, batch=book, batch_size=4, batch_timeout=2.0, retry=ONCE, telemetry=telemetry
    )
    async with running(pipeline, broker):
        await broker.settled(5)
    by_size, by_time = BatchInfo("default", None, 4, "size"), BatchInfo("default", None, 1, "timeout")
    assert [(type(one), one.info) for one in heard] == [
        (BatchEmitted, by_size), (BatchStarted, by_size), (BatchFinished, by_size),
        (BatchEmitted, by_time), (BatchStarted, by_time), (BatchFinished, by_time),
    ]  # fmt: skip
    assert (heard[2].ids, heard[2].failed, heard[2].seconds, heard[2].error) == (("m1", "m2", "m3", "m4"), 1, 1.0, None)
    assert (heard[5].ids, heard[5].failed) == (("m5",), 1)
    assert isinstance(heard[5].error, KeyError)


@virtual_time
async def test_handle_failed_is_told_with_its_messages_and_what_it_raised() -> None:
    telemetry, heard = listening(HandleFailedStarted, HandleFailedFinished)
    await an_app_with_all_that_can_happen(telemetry)
    assert [type(event) for event in heard] == [HandleFailedStarted, HandleFailedFinished] * 2
    assert all(len(event.ids) == 1 for event in heard)
    assert isinstance(heard[1].error, ValueError)


@virtual_time
async def test_what_is_published_is_told_once_the_broker_has_it() -> None:
    telemetry, heard = listening(Published)
    await an_app_with_all_that_can_happen(telemetry)
    told = [(event.consumer, event.topic, event.count) for event in heard]
    assert told[:2] == [("", "work", 1), ("", "work", 3)]
    assert sum(count for consumer, topic, count in told if (consumer, topic) == ("Work", "done")) == 2
    assert {topic for _, topic, _ in told} == {"work", "done"}


@virtual_time
async def test_a_refused_settle_and_a_suspect_are_told_by_their_ids() -> None:
    telemetry, heard = listening(SettleRefused, SuspectRuns, PipelineCrashed)
    await a_pipeline_with_all_that_can_go_wrong(telemetry)
    assert {(type(event), getattr(event, "id", "")) for event in heard} == {
        (PipelineCrashed, ""), (SettleRefused, "m5"), (SuspectRuns, "m31"),
    }  # fmt: skip


@virtual_time
async def test_what_the_broker_rejects_is_told_as_rejected() -> None:
    broker = Broker("1")
    telemetry, heard = listening(SettleRefused)

    async def reject_once(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        broker.on_settle = None
        return [Refused(message, "rejected", "full") for message in acks]

    broker.on_settle = reject_once

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, telemetry=telemetry), broker):
        await broker.settled(1)
    assert [(event.kind, event.detail) for event in heard] == [("rejected", "full")]


# -- spans end once, whatever ends them ------------------------------------------------------------------------------


def check_spans(heard: Sequence[Any]) -> None:
    """Each started event has one finished event of the same fields, after it."""
    open_spans: list[tuple[str, tuple[Any, ...]]] = []
    for event in heard:
        name = type(event).__name__
        if name.endswith("Started") and name != "PipelineStarted":
            fields = tuple(getattr(event, one) for one in event.__struct_fields__)
            open_spans.append((name.removesuffix("Started"), fields))
        elif name.endswith("Finished"):
            started = {"Run": RunStarted, "Message": MessageStarted, "Batch": BatchStarted}
            kind = started.get(name.removesuffix("Finished"), HandleFailedStarted)
            fields = tuple(getattr(event, one) for one in kind.__struct_fields__)
            open_spans.remove((name.removesuffix("Finished"), fields))
            assert event.seconds >= 0
    assert open_spans == []


@virtual_time
async def test_every_span_that_starts_ends_once() -> None:
    telemetry, heard = listening()
    await everything(telemetry)
    check_spans(heard)


@virtual_time
async def test_handlers_that_are_cut_off_end_their_spans() -> None:
    broker = Broker(*bodies(8))
    telemetry, heard = listening()

    async def handle(message: Message[bytes]) -> None:
        if int(message.body) > 4:
            await asyncio.sleep(100)

    async def book(batch: Batch[None]) -> None:
        await asyncio.sleep(100)

    pipeline = Pipeline(
        broker.open, handle, batch=book, batch_size=4, concurrency=2, telemetry=telemetry, shutdown_timeout=1.0
    )
    async with running(pipeline, broker):
        await asyncio.sleep(1)
    check_spans(heard)
    assert {type(event.error).__name__ for event in heard if isinstance(event, MessageFinished)} == {
        "NoneType", "CancelledError",
    }  # fmt: skip
    assert [str(event.error) for event in heard if isinstance(event, BatchFinished)] == ["shutdown"]


@virtual_time
async def test_a_task_that_is_cancelled_from_outside_ends_the_spans_of_its_pipeline() -> None:
    broker = Broker(*bodies(8))
    telemetry, heard = listening()

    async def handle(message: Message[bytes]) -> None:
        if int(message.body) > 4:
            await asyncio.sleep(100)

    async def book(batch: Batch[None]) -> None:
        await asyncio.sleep(100)

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=4, concurrency=2, telemetry=telemetry)
    task = asyncio.create_task(pipeline.run())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait((task,))
    assert sum(isinstance(event, (MessageStarted, BatchStarted)) for event in heard) == 7
    check_spans(heard)


async def test_a_batch_that_a_drain_leaves_on_its_thread_ends_its_span() -> None:
    broker = Broker("1", "2")
    telemetry, heard = listening(BatchStarted, BatchFinished)
    inside, leave = threading.Event(), threading.Event()

    async def handle(message: Message[bytes]) -> None: ...

    def book(batch: Batch[None]) -> None:
        inside.set()
        leave.wait(10)

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=2, telemetry=telemetry, shutdown_timeout=0.01)
    async with running(pipeline, broker):
        await asyncio.to_thread(inside.wait, 10)
    leave.set()
    assert sorted(broker.kept) == ["m1", "m2"]
    check_spans(heard)
    assert [type(event) for event in heard] == [BatchStarted, BatchFinished]


@virtual_time
async def test_handlers_that_ignore_their_cancellation_end_their_spans_when_they_end() -> None:
    broker = Broker(*bodies(4))
    telemetry, heard = listening()
    ended = 0

    async def ignore(subject: object) -> None:
        nonlocal ended
        end = asyncio.get_running_loop().time() + 10
        while (left := end - asyncio.get_running_loop().time()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                pass
        ended += 1

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"1":
            await ignore(message)

    pipeline = Pipeline(
        broker.open, handle, batch=ignore, batch_size=3, concurrency=4, retry=ONCE, timeout=1.0, telemetry=telemetry
    )
    async with running(pipeline, broker):
        await broker.settled(4)
        await asyncio.sleep(20)
        assert ended == 2
    check_spans(heard)
    finished = {event.id: event for event in heard if isinstance(event, MessageFinished)}
    assert finished["m1"].seconds == pytest.approx(10)
    (batch,) = [event for event in heard if isinstance(event, BatchFinished)]
    assert (type(batch.error).__name__, batch.seconds, batch.failed) == ("HandlerTimeout", pytest.approx(2), 3)


# -- listeners come and go -------------------------------------------------------------------------------------------


@virtual_time
async def test_a_listener_hears_the_messages_that_start_after_it_was_attached_also_amid_a_run() -> None:
    broker = Broker(*bodies(10))
    telemetry, heard = Telemetry(), list[Any]()

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, handle, concurrency=1, max_demand=10, telemetry=telemetry), broker):
        await asyncio.sleep(3.5)
        with telemetry.attach(heard.append, MessageStarted, MessageFinished):
            await asyncio.sleep(3)
        await broker.settled(10)
    assert [(type(event), event.id) for event in heard] == [
        (MessageStarted, "m5"), (MessageFinished, "m5"), (MessageStarted, "m6"), (MessageFinished, "m6"),
        (MessageStarted, "m7"),
    ]  # fmt: skip


@virtual_time
async def test_when_the_last_listener_goes_handlers_are_called_as_if_there_had_been_none() -> None:
    broker = Broker()
    telemetry = Telemetry()
    stacks: list[int] = []

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0)
        stacks.append(sum(1 for _ in traceback.walk_stack(None)))

    async with running(Pipeline(broker.open, handle, telemetry=telemetry), broker):
        broker.put("1")
        await broker.settled(1)
        attached = telemetry.attach(lambda event: None, MessageFinished)
        broker.put("2")
        await broker.settled(2)
        attached.detach()
        broker.put("3")
        await broker.settled(3)
    assert stacks[0] == stacks[2] == stacks[1] - 1


async def test_a_pipeline_that_has_ended_hears_no_more_of_listeners() -> None:
    telemetry = Telemetry()
    broker = Broker("1")

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle, telemetry=telemetry)
    async with running(pipeline, broker):
        await broker.settled(1)
        assert len(telemetry._watchers) == 1
    assert telemetry._watchers == []


async def test_handlers_on_threads_are_told_in_the_loop() -> None:
    broker = Broker(*bodies(6), "raise")
    heard: list[Any] = []
    threads: set[int] = set()
    telemetry = Telemetry()

    def listen(event: Any) -> None:
        threads.add(threading.get_ident())
        heard.append(event)

    telemetry.attach(listen)

    def handle(message: Message[bytes]) -> None:
        if message.body == b"raise":
            raise KeyError("no")

    async with running(Pipeline(broker.open, handle, concurrency=3, retry=ONCE, telemetry=telemetry), broker):
        await broker.settled(7)
    assert threads == {threading.get_ident()}
    check_spans(heard)
    finished = [event for event in heard if isinstance(event, MessageFinished)]
    assert len(finished) == 7
    assert [type(event.error) for event in finished if event.error] == [KeyError]
    runs = [event for event in heard if isinstance(event, RunFinished)]
    assert (sum(run.count for run in runs), sum(run.failed for run in runs)) == (7, 1)
    assert all(run.processor.startswith("handle: processor ") for run in runs)
