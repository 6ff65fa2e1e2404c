"""What kills a processor, a batch processor or another stage: the others go on or start anew, and nothing is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import Batch, Message, Pause, Pipeline, PipelineFailed, Retry
from sluiceway.message import Settlement

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time

QUICK = Retry(attempts=2, base_delay=1, jitter=0)


def kill_my_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def same(message: Message[bytes]) -> bytes:
    return message.body


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_handler_that_cancels_its_own_task_fails_its_message_alone(concurrency: int) -> None:
    broker = Broker(*bodies(8))

    async def handle(message: Message[bytes]) -> None:
        if message.id == "m3" and message.attempt == 1:
            kill_my_task()
        await asyncio.sleep(0.1)

    async with running(Pipeline(broker.open, handle, concurrency=concurrency, retry=QUICK), broker):
        await broker.settled(8)
    assert broker.outcomes("m3") == ["retry", "ack"]
    assert len(broker.acked) == 8
    assert len(broker.ended) == 9
    assert len(broker.sources) == 1  # the pipeline did not crash


async def test_a_processor_that_is_cancelled_between_two_messages_is_replaced() -> None:
    broker = Broker(*bodies(200))

    async def handle(message: Message[bytes]) -> None:
        if int(message.body) % 64 == 0:  # the last of a run: the cancellation hits the processor outside of a handler
            kill_my_task()

    async with running(Pipeline(broker.open, handle, concurrency=1, max_demand=200), broker):
        await broker.settled(200)
    assert len(broker.acked) == 200
    assert len(broker.ended) == 200


async def test_a_batch_handler_that_cancels_its_own_task_fails_its_batch_alone() -> None:
    broker = Broker(*bodies(7))

    async def book(batch: Batch[bytes]) -> None:
        if batch[0].id == "m3" and batch[0].attempt == 1:
            kill_my_task()
        await asyncio.sleep(0.1)

    pipeline = Pipeline(broker.open, same, batch=book, batch_size=2, batch_timeout=0.5, concurrency=1, retry=QUICK)
    async with running(pipeline, broker):
        await broker.settled(7)
    assert broker.outcomes("m3") == broker.outcomes("m4") == ["retry", "ack"]
    assert len(broker.acked) == 7
    assert len(broker.ended) == 9
    assert len(broker.sources) == 1


class _Broken(type):
    """Its classes raise when the retry policy asks whether an error is one of them: a fault within a stage."""

    times = 0

    def __instancecheck__(cls, instance: object) -> bool:
        if _Broken.times:
            _Broken.times -= 1
            raise RuntimeError("a fault of the stage")
        return False


class Never(Exception, metaclass=_Broken):
    pass


@pytest.mark.parametrize("stage", ["processor", "batch processor"])
@pytest.mark.parametrize("order_by", [None, "key"])
async def test_a_fault_in_a_stage_starts_the_pipeline_anew_and_loses_nothing(stage: str, order_by: Any) -> None:
    broker = Broker()
    for body in bodies(20):
        broker.put(body, key=str(int(body) % 3))
    _Broken.times = 1

    async def work(message: Message[bytes]) -> None:
        await asyncio.sleep(0.1)
        if message.id == "m7" and len(broker.sources) == 1:
            raise ValueError("what the broken policy is asked about")

    async def book(batch: Batch[bytes]) -> None:
        for message in batch:
            await work(message)

    retry = Retry(attempts=2, base_delay=1, jitter=0, never=(Never,))
    options: Any = {"retry": retry, "order_by": order_by, "concurrency": 3}
    if stage == "processor":
        pipeline = Pipeline(broker.open, work, **options)
    else:
        pipeline = Pipeline(broker.open, same, batch=book, batch_size=4, batch_timeout=0.2, **options)
    async with running(pipeline, broker):
        await broker.settled(20)
    assert len(broker.sources) == 2
    assert sorted(broker.acked) == sorted(f"m{number}" for number in range(1, 21))


async def test_a_fault_that_does_not_go_away_is_given_up_and_leaves_all_messages_at_the_broker() -> None:
    broker = Broker(*bodies(5))
    _Broken.times = 1000

    async def handle(message: Message[bytes]) -> None:
        raise ValueError

    with pytest.raises(PipelineFailed, match="a fault of the stage"):
        await Pipeline(broker.open, handle, retry=Retry(never=(Never,))).run()
    _Broken.times = 0
    broker.check()
    assert len(broker.waiting) == 5


class Odd(BaseException):
    """Neither an error nor an exit."""


@pytest.mark.parametrize("call", ["receive", "settle"])
async def test_a_source_that_raises_what_is_no_error_is_replaced_and_nothing_is_lost(call: str) -> None:
    broker = Broker(*bodies(20))

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        if len(broker.sources) == 1 and len(broker.acked) >= 5:
            raise Odd

    async def receive(demand: int) -> None:
        if len(broker.sources) == 1 and len(broker.demands) == 3:
            raise Odd

    broker.on_settle = settle if call == "settle" else None
    broker.on_receive = receive if call == "receive" else None

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.1)

    async with running(Pipeline(broker.open, handle, concurrency=5), broker):
        await broker.settled(20)
    assert len(broker.sources) == 2
    assert sorted(broker.acked) == sorted(f"m{number}" for number in range(1, 21))


async def test_a_handler_that_raises_what_is_no_error_fails_its_message_alone() -> None:
    broker = Broker(*bodies(3))

    async def handle(message: Message[bytes]) -> None:
        if message.id == "m2":
            raise Odd

    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=1)), broker):
        await broker.settled(3)
    assert [one.id for one in broker.dead] == ["m2"]
    assert len(broker.sources) == 1


async def test_a_gate_that_raises_when_a_pipeline_comes_leaves_no_source_open() -> None:
    class Broken(Pause):
        def on_change(self, call: Any) -> None:
            raise RuntimeError("no more listeners")

    broker = Broker(*bodies(3))
    with pytest.raises(PipelineFailed, match="no more listeners"):
        await Pipeline(broker.open, same, gates=[Broken()], max_restarts=2).run()
    assert len(broker.sources) == 3
    broker.check()


async def test_when_no_thread_can_be_started_for_the_leases_the_source_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Renews:
        def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
            return ()

        def close(self) -> None: ...

    start = threading.Thread.start

    def full(thread: threading.Thread) -> None:
        if thread.name.endswith("leases"):
            raise RuntimeError("can't start new thread")
        start(thread)

    broker = Broker(*bodies(3))
    broker.lease, broker.renewer = 30.0, Renews
    monkeypatch.setattr(threading.Thread, "start", full)
    with pytest.raises(PipelineFailed, match="can't start new thread"):
        await Pipeline(broker.open, same, max_restarts=2).run()
    assert len(broker.sources) == 3
    broker.check()
