"""Demand: a pipeline asks for what it has room for, and for nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import Batch, Message, Pause, Pipeline
from sluiceway.message import Settlement

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time


async def test_demand_never_exceeds_a_pinned_window() -> None:
    broker = Broker(*bodies(500), limit=20)

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.01 * (int(message.body) % 7))

    async with running(Pipeline(broker.open, handle, concurrency=10, max_demand=20), broker):
        await broker.settled(500)
    assert max(broker.demands) <= 20
    assert broker.max_most <= 20


async def test_the_automatic_window_grows_for_fast_handlers() -> None:
    broker = Broker(*bodies(30_000))

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.0001)

    pipeline = Pipeline(broker.open, handle, concurrency=10)
    async with running(pipeline, broker):
        await broker.settled(30_000)
    assert max(broker.demands) > 100


async def test_the_automatic_window_shrinks_back_for_slow_handlers() -> None:
    broker = Broker(*bodies(20_000))
    slow = False

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1 if slow else 0.0001)

    pipeline = Pipeline(broker.open, handle, concurrency=10)
    async with running(pipeline, broker):
        await broker.settled(15_000)
        before = pipeline.stats()
        slow = True
        await broker.settled(20_000)
        broker.put(*bodies(200))
        await broker.settled(20_200)
        after = pipeline.stats()
    assert before is not None
    assert after is not None
    assert before.window > 100
    assert after.window == 10


@pytest.mark.parametrize("seconds", [0.5, 2.0])
async def test_the_window_holds_what_the_processors_finish_in_buffer_time(seconds: float) -> None:
    broker = Broker(*bodies(3_000))

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.1)  # 10 processors: 100 per second

    pipeline = Pipeline(broker.open, handle, concurrency=10, buffer_time=seconds)
    async with running(pipeline, broker):
        await broker.settled(2_500)
        stats = pipeline.stats()
    assert stats is not None
    assert stats.window == pytest.approx(100 * seconds, rel=0.2)


async def test_a_slow_handler_slows_the_source() -> None:
    broker = Broker(*bodies(10_000))
    released = asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        await released.wait()

    async with running(Pipeline(broker.open, handle, concurrency=5), broker):
        await asyncio.sleep(10)
        assert len(broker.held) == broker.max_most <= 10
        released.set()


async def test_acks_of_one_turn_go_in_one_call() -> None:
    broker = Broker(*bodies(100), limit=100)

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, concurrency=10, max_demand=100), broker):
        await broker.settled(100)
    assert len(broker.calls) <= 10


async def test_at_most_one_ack_call_is_in_flight_and_retries_do_not_hold_it_up() -> None:
    broker = Broker(*bodies(200))

    async def slow(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        await asyncio.sleep(5 if others else 0.1)

    broker.on_settle = slow

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.01)
        if message.body == b"1":
            raise RuntimeError("no")

    async with running(Pipeline(broker.open, handle, concurrency=10), broker):
        await broker.until(lambda: len(broker.acked) >= 190)
        assert asyncio.get_running_loop().time() < 5
        await broker.settled(200)
    assert broker.most_acks_in_flight == broker.most_others_in_flight == 1


async def test_a_slot_of_the_window_is_free_when_its_settle_returned() -> None:
    broker = Broker(*bodies(100), limit=10)
    hold = asyncio.Event()

    async def wait(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        await hold.wait()

    broker.on_settle = wait

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, concurrency=10, max_demand=10), broker):
        await asyncio.sleep(60)
        assert sum(broker.demands) >= 10
        assert len(broker.held) == 10
        hold.set()
        await broker.settled(100)


async def test_large_bodies_shrink_the_window_to_the_byte_limit() -> None:
    broker = Broker(*[b"x" * 1000] * 300)
    held: list[int] = []

    async def handle(message: Message[bytes]) -> None:
        held.append(len(broker.held))
        await asyncio.sleep(0.01)

    async with running(Pipeline(broker.open, handle, concurrency=10, max_buffer_bytes=5000), broker):
        await broker.settled(300)
    assert max(held[20:]) <= 5


async def test_a_closed_gate_takes_back_the_demand_that_waits() -> None:
    broker = Broker()
    pause = Pause()
    handled: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)

    async with running(Pipeline(broker.open, handle, gates=[pause]), broker):
        await broker.until(lambda: broker.source.receiving)
        pause.close()
        await broker.until(lambda: not broker.source.receiving or broker.source.paused)
        broker.put(*bodies(50))
        await asyncio.sleep(100)
        assert handled == []
        assert not broker.source.receiving
        pause.open()
        await broker.settled(50)
    assert len(handled) == 50


async def test_a_gate_that_is_closed_lets_finish_what_is_in_hand() -> None:
    broker = Broker(*bodies(30))
    pause = Pause()

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, handle, concurrency=5, gates=[pause]), broker):
        await asyncio.sleep(0.5)
        pause.close()
        await asyncio.sleep(100)
        assert not broker.held
        left = len(broker.waiting)
        assert left + len(broker.acked) == 30
        for _ in range(5):  # faster than the source can tell
            pause.open()
            pause.close()
        pause.open()
        await broker.settled(30)


async def test_a_gate_that_says_how_many_is_obeyed() -> None:
    class Trickle:
        tokens = 0

        def allow(self, now: float, wanted: int) -> int:
            return min(wanted, self.tokens)

        def took(self, now: float, count: int) -> None:
            self.tokens -= count

        def opens_at(self, now: float) -> float | None:
            return None

        def on_change(self, call: Any) -> None:
            self.call = call

    gate = Trickle()
    broker = Broker(*bodies(50))

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, gates=[gate]), broker):
        for count in range(1, 6):
            gate.tokens = 10
            gate.call()
            await broker.settled(10 * count)
            await asyncio.sleep(10)
            assert len(broker.acked) == 10 * count


async def test_concurrency_is_reached_and_never_exceeded() -> None:
    for concurrency in (1, 3, 50):
        broker = Broker(*bodies(300))
        now = most = 0

        async def handle(message: Message[bytes]) -> None:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(int(message.body) % 5)
            now -= 1

        async with running(Pipeline(broker.open, handle, concurrency=concurrency), broker):
            await broker.settled(300)
        assert most == concurrency


async def test_a_burst_spreads_over_all_processors_at_once() -> None:
    broker = Broker()

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, handle, concurrency=100), broker):
        await broker.until(lambda: broker.source.receiving)
        broker.put(*bodies(100))
        await broker.settled(100)
        assert asyncio.get_running_loop().time() < 1.1


async def test_handlers_that_never_wait_are_run_by_one_processor() -> None:
    broker = Broker(*bodies(1000))
    tasks: set[asyncio.Task[Any] | None] = set()

    async def handle(message: Message[bytes]) -> None:
        tasks.add(asyncio.current_task())

    async with running(Pipeline(broker.open, handle, concurrency=10), broker):
        await broker.settled(1000)
    assert len(tasks) == 1, "waking the others takes longer than what they would do"


async def test_a_handler_that_begins_to_wait_in_the_midst_of_a_run_lets_others_go_on() -> None:
    broker = Broker(*bodies(60), limit=60)
    first = asyncio.Event()
    handled = 0

    async def handle(message: Message[bytes]) -> None:
        nonlocal handled
        if handled == 40 and not first.is_set():
            first.set()
            await asyncio.sleep(3600)
        handled += 1

    async with running(Pipeline(broker.open, handle, concurrency=2, max_demand=60), broker):
        await first.wait()
        await asyncio.sleep(0.001)
        assert handled == 59


async def test_a_thousand_processors_run_a_thousand_handlers() -> None:
    broker = Broker(*bodies(3000))

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, handle, concurrency=1000), broker):
        await broker.settled(3000)
        assert asyncio.get_running_loop().time() < 4


async def test_starved_forming_batches_are_emitted_oldest_first() -> None:
    broker = Broker(*bodies(40), limit=22)
    seen: list[Any] = []

    async def handle(message: Message[bytes]) -> int:
        message.to(key=int(message.body) % 20)  # more keys than the window has room for batches
        return int(message.body)

    async def book(batch: Batch[int]) -> None:
        seen.append((batch.info.trigger, batch.key))

    pipeline = Pipeline(
        broker.open, handle, batch=book, concurrency=2, batch_size=10, batch_timeout=1000.0, max_demand=22
    )
    async with running(pipeline, broker):
        await broker.until(lambda: len(broker.acked) >= 18)
        assert asyncio.get_running_loop().time() < 1
    assert {trigger for trigger, _ in seen} == {"starved", "drain"}
    assert [key for trigger, key in seen if trigger == "starved"][:3] == [1, 2, 3]


async def test_a_source_that_returns_nothing_at_once_does_not_stop_the_loop() -> None:
    broker = Broker()

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle), broker):
        broker.source.paused = True  # receive returns [] without waiting
        await asyncio.sleep(0)
        broker.source.wake()
        await asyncio.sleep(1)
        broker.source.paused = False


async def test_acks_go_out_before_more_is_asked_for() -> None:
    """What a broker is asked first it answers first, and a receive may wait for hours."""
    broker, calls = Broker(*bodies(1)), list[str]()

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        calls.append("ack")

    async def receive(demand: int) -> None:
        calls.append("receive")

    broker.on_settle, broker.on_receive = settle, receive

    async def handle(message: Message[bytes]) -> None:
        return

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)  # its processor has started
        await broker.until(lambda: broker.source.receiving)
        calls.clear()
        broker.put("another")
        await broker.until(lambda: len(calls) == 2)
    assert calls == ["ack", "receive"]
