"""Drain: a stop loses nothing and repeats nothing that finished, in bounded time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import App, Batch, Message, Pipeline, PipelineFailed, Retry
from sluiceway.message import Settlement
from sluiceway.telemetry import PipelineStopped, Telemetry
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_unstarted_messages_go_back_at_once_and_running_ones_finish() -> None:
    broker = Broker(*bodies(20))
    released_at: list[float] = []

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(10)

    telemetry = Telemetry()
    stopped: list[PipelineStopped] = []
    telemetry.attach(stopped.append, PipelineStopped)
    pipeline = Pipeline(broker.open, handle, concurrency=3, max_demand=8, telemetry=telemetry)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
    released_at = [one.at for one in broker.ended if one.outcome == "release"]
    assert released_at == [pytest.approx(1, abs=0.01)] * 5
    assert sorted(broker.acked) == ["m1", "m2", "m3"]
    assert broker.source.flushed == 1
    assert [(round(one.seconds), one.released, one.cancelled) for one in stopped] == [(9, 5, 0)]


async def test_settles_on_their_way_arrive_before_the_source_is_closed() -> None:
    broker = Broker(*bodies(10))

    async def slow(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        await asyncio.sleep(3)

    broker.on_settle = slow

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle), broker):
        await asyncio.sleep(0.1)
    assert len(broker.acked) == 10


async def test_what_runs_when_the_time_is_up_is_cancelled_and_released() -> None:
    broker = Broker(*bodies(3))
    cleaned: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.5)
            cleaned.append(message.id)

    async with running(Pipeline(broker.open, handle, shutdown_timeout=5), broker):
        await asyncio.sleep(1)
        before = now()
    assert 5 <= now() - before < 6
    assert sorted(cleaned) == ["m1", "m2", "m3"]
    assert [one.outcome for one in broker.ended] == ["release"] * 3
    assert not any(one.counted for one in broker.ended)


async def test_a_handler_that_ignores_its_cancellation_does_not_hold_up_the_drain() -> None:
    broker = Broker("a")
    end = asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                pass

    async with running(Pipeline(broker.open, handle, shutdown_timeout=5), broker):
        await asyncio.sleep(1)
        before = now()
    assert now() - before < 15
    assert [entry.id for entry in broker.waiting] == ["m1"]
    end.set()
    await asyncio.sleep(0)


async def test_a_broker_that_takes_no_settles_does_not_hold_up_the_drain_for_ever() -> None:
    broker = Broker(*bodies(3))

    async def never(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        raise OSError("away")

    broker.on_settle = never

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, shutdown_timeout=5), broker):
        await asyncio.sleep(1)
        before = now()
    assert now() - before < 10
    assert len(broker.waiting) == 3


async def test_a_broker_that_cannot_be_reached_does_not_hold_up_a_stop() -> None:
    broker = Broker()
    never = asyncio.Event()

    async def unreachable() -> None:
        await never.wait()

    broker.on_open = unreachable

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle)
    task = asyncio.create_task(pipeline.run())
    await asyncio.sleep(5)
    pipeline.stop()
    await task
    assert now() == 5


async def test_a_receive_that_raises_in_the_drain_does_not_cut_handlers_off() -> None:
    broker = Broker(*bodies(2))
    asked = 0

    async def receive(demand: int) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            await broker.until(lambda: broker.source.stopped)
            raise ConnectionError("reset by the stop")

    broker.on_receive = receive

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(3)

    async with running(Pipeline(broker.open, handle), broker):
        await asyncio.sleep(1)
    assert sorted(broker.acked) == ["m1", "m2"]


async def test_a_source_that_cannot_flush_or_close_still_ends_the_drain(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker("a")

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle)
    async with running(pipeline, broker):
        await broker.settled(1)
        source = broker.source
        close = source.aclose

        async def aclose(*, keep: Sequence[Message[Any]] = ()) -> None:
            await close(keep=keep)
            raise OSError("close")

        source.aclose = aclose  # type: ignore[method-assign]
    assert "closing the source failed" in caplog.text


class Slow:
    """An app whose handler takes its time."""

    def __init__(self, seconds: float, *, shutdown_timeout: float = 25) -> None:
        self.transport = MemoryTransport()
        self.app = App(self.transport, shutdown_timeout=shutdown_timeout)
        self.done: list[int] = []
        self.cancelled: list[int] = []

        @self.app.consumer("work", concurrency=2)
        async def work(message: Message[int]) -> None:
            try:
                await asyncio.sleep(seconds)
                self.done.append(message.payload)
            except asyncio.CancelledError:
                self.cancelled.append(message.payload)
                raise


async def test_sigterm_drains_and_a_second_one_cuts_the_drain_short() -> None:
    slow = Slow(1000)
    await slow.app.publish_many("work", range(5))
    run = asyncio.create_task(slow.app.run())
    await asyncio.sleep(1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(5)
    assert not run.done()
    for _ in range(3):  # each more is harmless
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
    before = now()
    await run
    assert now() - before < 1
    assert sorted(slow.cancelled) == [0, 1]
    backlog = slow.transport.held("default")
    assert backlog == 0


async def test_hurry_at_any_turn_of_a_drain_is_harmless() -> None:
    for turns in range(40):
        slow = Slow(0.5)
        stop = asyncio.Event()
        await slow.app.publish_many("work", range(5))
        run = asyncio.create_task(slow.app.run(stop=stop))
        await asyncio.sleep(0.2)
        stop.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        slow.app.manager.hurry()
        slow.app.manager.hurry()
        await asyncio.sleep(0)
        slow.app.manager.hurry()
        await run
        assert slow.transport.held("default") == 0


async def test_a_cancel_of_run_drains_and_a_second_one_closes_at_once() -> None:
    for cancels in (1, 2, 3):
        slow = Slow(20)
        await slow.app.publish_many("work", range(5))
        run = asyncio.create_task(slow.app.run())
        await asyncio.sleep(1)
        before = now()
        for _ in range(cancels):
            run.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await run
        assert slow.transport.held("default") == 0
        assert (now() - before > 10) == (cancels == 1)
        assert len(slow.done) == (2 if cancels == 1 else 0)
        assert {one.state for one in slow.app.manager.stats()} == {"stopped"}


async def test_a_stop_in_the_very_turn_of_the_start_closes_the_source() -> None:
    broker = Broker(*bodies(3))

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle)
    task = asyncio.create_task(pipeline.run())
    pipeline.stop()  # before run: nothing
    await asyncio.sleep(0)
    pipeline.stop()
    await task
    broker.check()
    assert len(broker.waiting) + len(broker.done) == 3


async def test_an_exhausted_restart_rule_fails_the_pipeline_with_the_last_crash_as_its_cause() -> None:
    broker = Broker(*bodies(3))

    async def receive(demand: int) -> None:
        raise ConnectionError("cannot be mended")

    broker.on_receive = receive

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle, max_restarts=2, max_seconds=60)
    with pytest.raises(PipelineFailed, match="2 restarts in 60 s") as raised:
        await pipeline.run()
    assert isinstance(raised.value.__cause__, ConnectionError)
    assert len(broker.sources) == 3
    broker.check()
    found = pipeline.stats()
    assert found is not None
    assert found.state == "failed"


async def test_crashes_that_are_far_apart_do_not_add_up() -> None:
    broker = Broker()
    crash = asyncio.Event()

    async def receive(demand: int) -> None:
        await crash.wait()
        crash.clear()
        raise ConnectionError("cannot be mended")

    broker.on_receive = receive

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, max_restarts=2, max_seconds=60), broker) as task:
        for _ in range(6):
            crash.set()
            await asyncio.sleep(40)
        assert not task.done()
        assert len(broker.sources) == 7


async def test_what_runs_in_a_crash_finishes_and_is_settled_before_the_restart() -> None:
    broker = Broker(*bodies(5), limit=5)
    asked = 0

    async def receive(demand: int) -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise ConnectionError("cannot be mended")

    broker.on_receive = receive
    runs: list[str] = []

    async def handle(message: Message[bytes]) -> bytes:
        await asyncio.sleep(1)
        runs.append(message.id)
        return message.body

    async def book(batch: Batch[Any]) -> None: ...

    pipeline = Pipeline(broker.open, handle, concurrency=1, batch=book, batch_size=2, max_demand=5)
    async with running(pipeline, broker):
        await broker.settled(5)
    assert sorted(runs) == sorted(broker.acked) == ["m1", "m2", "m3", "m4", "m5"]
    assert len(broker.sources) == 2


async def test_a_receive_that_is_cancelled_from_inside_is_a_crash_like_any_other() -> None:
    broker = Broker("a")
    first = True

    async def receive(demand: int) -> None:
        nonlocal first
        if first:
            first = False
            raise asyncio.CancelledError("the client cancelled what it waited for")

    broker.on_receive = receive

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=1)), broker):
        await broker.settled(1)
    assert len(broker.sources) == 2
