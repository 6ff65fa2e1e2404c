"""Messages that failed before a processor had them: oversized ones, and those that a source or a transform failed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

import pytest

from sluiceway import App, CircuitBreaker, Message, Pipeline, RateLimit, Retry, RetryLater
from sluiceway.options import ConsumerOptions
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, RecordingSource, bodies, running

pytestmark = pytest.mark.virtual_time

LONG = "x" * 100
TEN: ConsumerOptions = {"max_payload": 10}
ONCE = Retry(attempts=1)


class FailingSource(RecordingSource):
    """Fails each message with a long body."""

    returns_failed = True

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        messages = await super().receive(demand)
        for message in messages:
            if len(message.body) > 10:
                message.error = ValueError("too long for me")
        return messages


class FailingBroker(Broker):
    async def open(self) -> FailingSource:
        source = FailingSource(self)
        self.sources.append(source)
        self.changed()
        return source


def fail_long(message: Message[Any]) -> Message[Any]:
    if len(message.body) > 10:
        raise RetryLater(5)
    return message


async def prepare_nothing(messages: Sequence[Message[Any]]) -> None: ...


@pytest.mark.parametrize("mode", ["async", "thread"])
@pytest.mark.parametrize("prepared", [False, True])
async def test_an_oversized_message_that_is_retried_keeps_the_order_of_its_key(mode: str, prepared: bool) -> None:
    app = App(MemoryTransport())
    log: list[Any] = []

    def note(message: Message[Any]) -> None:
        log.append(message.payload)

    async def note_async(message: Message[Any]) -> None:
        log.append(message.payload)

    work = app.consumer("work", order_by="key", concurrency=4, max_payload=10)(note if mode == "thread" else note_async)
    if prepared:
        work.prepare(prepare_nothing)

    @work.handle_error
    def on_error(message: Message[Any], error: BaseException) -> Any:
        log.append(f"failed at attempt {message.attempt}")
        return RetryLater(5) if message.attempt < 3 else "ack"

    await app.publish_many("work", ["a", LONG, "b", "c"], key=lambda payload: "k")
    async with app.running() as manager:
        await manager.idle()
    assert log == ["a", *(f"failed at attempt {number}" for number in (1, 2, 3)), "b", "c"]


async def test_an_oversized_message_waits_its_turn_behind_the_running_one_of_its_key() -> None:
    broker = Broker()
    broker.put("1", LONG, "3", key="k")
    broker.put("4", key="o")
    pipeline = Pipeline(broker.open, slow, order_by="key", retry=ONCE, **TEN)
    async with running(pipeline, broker):
        await asyncio.sleep(0.5)
        assert broker.ended == []
        await broker.settled(4)
    assert [one.id for one in broker.ended] == ["m1", "m4", "m2", "m3"]
    assert {one.id: one.outcome for one in broker.ended} == {"m1": "ack", "m2": "dead_letter", "m3": "ack", "m4": "ack"}


async def slow(message: Message[Any]) -> None:
    await asyncio.sleep(1)


@pytest.mark.parametrize("how", ["source", "transform"])
async def test_what_came_failed_and_is_retried_keeps_the_order_of_its_key(how: Literal["source", "transform"]) -> None:
    broker = FailingBroker() if how == "source" else Broker()
    broker.put("1", LONG, "3", key="k")
    broker.put("4", key="o")
    retry = Retry(attempts=3, base_delay=5, jitter=0)
    transform = fail_long if how == "transform" else None
    pipeline = Pipeline(broker.open, slow, order_by="key", retry=retry, transform=transform)
    async with running(pipeline, broker):
        await broker.settled(4)
    order = [one.id for one in broker.ended if one.outcome in ("ack", "retry", "dead_letter")]
    assert order == ["m1", "m4", "m2", "m2", "m2", "m3"]
    assert [one.id for one in broker.ended if one.outcome == "park"] == ["m3"] * 2


async def test_a_slow_handle_failed_holds_up_neither_the_others_nor_those_at_a_shared_gate() -> None:
    app = App(MemoryTransport())
    limit, handled = RateLimit(100, 1000), []

    async def note(message: Message[Any]) -> None:
        handled.append(message.payload)

    failing = app.consumer("failing", name="failing", gates=[limit], max_payload=10, concurrency=60)(note)
    app.consumer("other", name="other", gates=[limit], concurrency=60)(note)

    @failing.handle_failed
    async def on_failed(messages: Any) -> None:
        await asyncio.sleep(50)

    await app.publish_many("failing", [LONG, 1, 2])
    async with app.running() as manager:
        await asyncio.sleep(1)
        await app.publish_many("other", range(3, 90))
        await asyncio.sleep(5)
        assert sorted(handled) == list(range(1, 90))
        await manager.idle()


async def test_while_its_handle_failed_runs_a_message_counts_as_running_and_a_drain_waits_for_it() -> None:
    told: list[int] = []
    app = App(MemoryTransport(), shutdown_timeout=100)
    work = app.consumer("work", max_payload=10)(slow)

    @work.handle_failed
    async def on_failed(messages: Any) -> None:
        await asyncio.sleep(20)
        told.append(len(messages))

    await app.publish("work", LONG)
    async with app.running() as manager:
        await asyncio.sleep(1)
        assert manager.stats()[0].running == 1
        assert manager.stats()[0].held == 1
    assert told == [1]


@pytest.mark.parametrize("mode", ["async", "thread"])
async def test_a_drain_whose_time_is_up_cuts_its_hook_off_and_it_ends_as_decided(mode: str) -> None:
    transport = MemoryTransport()
    app = App(transport, shutdown_timeout=2)

    def plain(message: Message[Any]) -> None: ...

    work = app.consumer("work", max_payload=10)(plain if mode == "thread" else slow)

    @work.handle_failed
    async def on_failed(messages: Any) -> None:
        await asyncio.Event().wait()

    await app.publish("work", LONG)
    async with app.running() as manager:
        await asyncio.sleep(1)
    assert manager.drained()["plain" if mode == "thread" else "slow"].unsettled == 0
    dead = [one async for one in transport.browse("work.default.dead")]
    assert len(dead) == 1


async def test_what_waits_behind_in_its_lane_goes_back_in_a_drain_unfailed() -> None:
    broker = Broker()
    broker.put("1", LONG, key="k")
    pipeline = Pipeline(broker.open, slow, order_by="key", **TEN)
    async with running(pipeline, broker):
        await asyncio.sleep(0.5)
        pipeline.stop()
    assert [(one.id, one.outcome) for one in broker.ended] == [("m2", "release"), ("m1", "ack")]


async def test_an_oversized_suspect_keeps_its_place_too() -> None:
    broker = Broker()
    broker.put("1", key="k", deliveries=2, suspect=True)
    broker.put(LONG, key="k", deliveries=2, suspect=True)
    broker.put("3", key="k")
    async with running(Pipeline(broker.open, slow, order_by="key", retry=ONCE, **TEN), broker):
        await broker.settled(3)
    assert [one.id for one in broker.ended if one.outcome in ("ack", "dead_letter")] == ["m1", "m2", "m3"]


async def test_oversized_ones_do_not_trip_a_circuit_breaker_and_are_no_probe() -> None:
    broker, breaker = Broker(*[LONG] * 20, *bodies(5)), CircuitBreaker(failures=1)
    async with running(Pipeline(broker.open, slow, gates=[breaker], **TEN), broker):
        await broker.settled(25)
        assert breaker.state == "closed"


async def test_with_prepare_the_hook_does_not_see_what_failed_before_it() -> None:
    broker = Broker("1", LONG, "3")
    seen: list[str] = []

    async def prepare(messages: Sequence[Message[Any]]) -> None:
        seen.extend(message.id for message in messages)

    async with running(Pipeline(broker.open, slow, prepare=prepare, **TEN), broker):
        await broker.settled(3)
    assert seen == ["m1", "m3"]
    assert [one.id for one in broker.dead] == ["m2"]
