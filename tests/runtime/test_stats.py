"""What a pipeline says of itself: counts at one moment, rates, and where the time of its messages goes."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sluiceway import Batch, CircuitBreaker, Message, Pause, Pipeline, PipelineStats, RateLimit, Retry
from sluiceway.message import Settlement

from .recording import Broker, bodies, running

virtual_time = pytest.mark.virtual_time


def stats(pipeline: Pipeline) -> PipelineStats:
    found = pipeline.stats()
    assert found is not None
    return found


def spent(pipeline: Pipeline) -> dict[str, float]:
    """Where the time went, without what took none."""
    found = stats(pipeline).spent
    assert found is not None
    return {name: value for name in found.__struct_fields__ if (value := round(getattr(found, name), 2))}


def feed(broker: Broker, count: int, seconds: float) -> asyncio.Task[None]:
    """Publish `count` messages, one every so many seconds."""

    async def put() -> None:
        for number in range(count):
            broker.put(str(number))
            await asyncio.sleep(seconds)

    return asyncio.create_task(put())


@virtual_time
async def test_each_count_is_where_the_messages_are() -> None:
    broker = Broker(*bodies(20))
    finish, hold = asyncio.Event(), asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        if int(message.body) > 7:
            await finish.wait()

    async def book(batch: Batch[None]) -> None:
        await finish.wait()

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        await hold.wait()

    broker.on_settle = settle
    pipeline = Pipeline(broker.open, handle, batch=book, concurrency=2, batch_size=4, batch_timeout=99.0)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
        now = stats(pipeline)
        assert (now.batched, now.forming, now.running, now.unstarted, now.unsettled) == (4, 3, 2, 1, 0)
        assert (now.held, now.window, now.received, now.finished, now.demand) == (10, 10, 10, 0, 0)
        finish.set()
        await asyncio.sleep(1)
        now = stats(pipeline)
        assert (now.batched, now.forming, now.running, now.unstarted, now.unsettled) == (0, 2, 0, 0, 8)
        assert (now.held, now.received, now.finished, now.demand) == (10, 10, 0, 0)
        hold.set()
        await broker.settled(16)


@virtual_time
async def test_a_slow_handler_is_where_the_time_goes() -> None:
    broker = Broker()

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.5)

    pipeline = Pipeline(broker.open, handle, concurrency=2)
    async with running(pipeline, broker):
        feeding = feed(broker, 200, 0.25)
        await asyncio.sleep(30)
        assert spent(pipeline) == {"running": pytest.approx(0.5, rel=0.1)}
        now = stats(pipeline)
        assert (now.receive_rate, now.finish_rate) == pytest.approx((4, 4), rel=0.05)
        await feeding


@virtual_time
async def test_messages_that_come_faster_than_they_are_handled_wait_for_a_processor() -> None:
    broker = Broker(*bodies(2000))

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.5)

    pipeline = Pipeline(broker.open, handle, concurrency=2, max_demand=10)
    async with running(pipeline, broker):
        await asyncio.sleep(60)
        found = spent(pipeline)
        assert found["running"] == pytest.approx(0.5, rel=0.15)
        assert found["unstarted"] == pytest.approx(10 / 4 - 0.5, rel=0.3)  # Little: about ten held, four a second
        assert found.keys() == {"running", "unstarted"}
        broker.waiting.clear()


@virtual_time
async def test_processors_that_wait_for_the_broker_say_so() -> None:
    broker = Broker()

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.1)

    pipeline = Pipeline(broker.open, handle, concurrency=1, max_demand=4)  # a receive waits while one is handled, too
    async with running(pipeline, broker):
        feeding = feed(broker, 100, 0.3)
        await broker.settled(100)
        assert spent(pipeline) == {"running": pytest.approx(0.1), "waiting": pytest.approx(0.2, abs=0.02)}
        await feeding


@virtual_time
async def test_a_slow_settle_is_where_the_time_goes() -> None:
    broker = Broker()

    async def slow(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        await asyncio.sleep(0.5)

    broker.on_settle = slow

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"7":
            raise RuntimeError("no")

    pipeline = Pipeline(broker.open, handle, concurrency=1)
    async with running(pipeline, broker):
        feeding = feed(broker, 20, 1.0)
        await broker.settled(19)
        found = spent(pipeline)
        del found["waiting"]
        assert found == {"unsettled": pytest.approx(0.5, abs=0.01)}
        await feeding


@virtual_time
async def test_batches_tell_the_wait_for_the_batch_from_its_handler() -> None:
    broker = Broker()

    async def handle(message: Message[bytes]) -> None: ...

    async def book(batch: Batch[None]) -> None:
        await asyncio.sleep(0.25)

    pipeline = Pipeline(broker.open, handle, batch=book, concurrency=1, batch_size=5, batch_timeout=99.0)
    async with running(pipeline, broker):
        feeding = feed(broker, 100, 0.5)
        await asyncio.sleep(45.1)
        found = spent(pipeline)
        found.pop("waiting")
        assert found == {"batched": pytest.approx(0.25, abs=0.03), "forming": pytest.approx(1.0, rel=0.15)}
        await feeding


@virtual_time
async def test_an_abandoned_handler_takes_no_more_time() -> None:
    broker = Broker("stuck")
    leave = asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"stuck":
            while not leave.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await leave.wait()
        await asyncio.sleep(0.1)

    pipeline = Pipeline(broker.open, handle, concurrency=2, timeout=1.0, retry=Retry(attempts=1))
    async with running(pipeline, broker):
        await broker.settled(1)
        feeding = feed(broker, 100, 0.3)
        await broker.settled(101)
        assert spent(pipeline)["running"] == pytest.approx(0.1, rel=0.1)
        leave.set()
        await feeding


async def test_handlers_on_threads_are_counted_too() -> None:
    broker = Broker()

    def handle(message: Message[bytes]) -> None:
        time.sleep(0.03)

    pipeline = Pipeline(broker.open, handle, concurrency=2)
    async with running(pipeline, broker):
        for number in range(1, 11):
            broker.put(str(number))
            await broker.settled(number)
        found = stats(pipeline).spent
        assert found is not None
        assert 0.02 < found.running < 0.2
        assert found.forming == found.batched == 0


@virtual_time
async def test_a_pipeline_that_is_down_spends_no_time() -> None:
    broker = Broker(*bodies(5))

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle)
    assert pipeline.stats() is None
    async with running(pipeline, broker):
        await broker.settled(5)
        await asyncio.sleep(1)
        assert stats(pipeline).spent is not None
    last = stats(pipeline)
    assert (last.spent, last.finish_rate, last.finished) == (None, 0.0, 5)


# -- why it is not running ---------------------------------------------------------------------------------------------


class Shut:
    """A gate that never opens. The test's own."""

    def allow(self, now: float, wanted: int) -> int:
        return 0

    def took(self, now: float, count: int) -> None:
        pass

    def opens_at(self, now: float) -> float | None:
        return None

    def on_change(self, call: Callable[[], None]) -> None:
        pass


def closed() -> Pause:
    pause = Pause()
    pause.close()
    return pause


@virtual_time
@pytest.mark.parametrize(
    ("gates", "reason"),
    [
        ([closed()], "closed by hand"),
        ([Pause(), RateLimit(2, 60)], "rate limit of 2 in 60 s"),
        ([Shut()], "Shut"),
        ([closed(), Pause(), Shut()], "closed by hand, Shut"),
        ([CircuitBreaker(failures=1)], "circuit breaker is open"),
    ],
)
async def test_a_paused_pipeline_says_which_gates_are_closed(gates: list[Any], reason: str) -> None:
    broker = Broker(*bodies(10))

    async def handle(message: Message[bytes]) -> None:
        raise ConnectionError("down")

    pipeline = Pipeline(broker.open, handle, gates=gates)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
        now = stats(pipeline)
        assert (now.state, now.reason) == ("paused", reason)


@virtual_time
async def test_a_pipeline_whose_gates_are_open_has_no_reason() -> None:
    broker = Broker()

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle, gates=[Pause(), RateLimit(2, 60), CircuitBreaker()])
    async with running(pipeline, broker):
        await asyncio.sleep(1)
        now = stats(pipeline)
        assert (now.state, now.reason) == ("running", None)


# -- from other threads ----------------------------------------------------------------------------------------------


async def test_another_thread_that_asks_makes_no_gate_answer_there() -> None:
    asked: set[int] = set()

    class Watched(Shut):
        def allow(self, now: float, wanted: int) -> int:
            asked.add(threading.get_ident())
            return 0

    broker = Broker(*bodies(10))

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle, gates=[Watched()])
    async with running(pipeline, broker):
        await asyncio.sleep(0.01)
        now = await asyncio.to_thread(stats, pipeline)
    assert (now.state, now.reason) == ("paused", "a gate")
    assert asked == {threading.get_ident()}


async def test_other_threads_may_ask_while_batches_come_and_go() -> None:
    broker = Broker()
    done = threading.Event()

    async def handle(message: Message[bytes]) -> None:
        message.to(key=message.body)

    async def book(batch: Batch[Any]) -> None: ...

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=2, batch_timeout=0.001)

    def ask() -> int:
        times = 0
        while not done.is_set():
            stats(pipeline)
            times += 1
        return times

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the threads take turns within what one of them does
    try:
        async with running(pipeline, broker):
            asking = [asyncio.create_task(asyncio.to_thread(ask)) for _ in range(2)]
            for round_ in range(60):
                broker.put(*bodies(100))
                await broker.settled(100 * (round_ + 1))
            done.set()
            assert min(await asyncio.gather(*asking)) > 100
    finally:
        done.set()
        sys.setswitchinterval(interval)
