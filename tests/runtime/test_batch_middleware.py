"""Batch middleware: round every batch handler, in the order of message middleware."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sluiceway import App, Batch, Message, OptionError, Pipeline, Retry
from sluiceway.batch import BatchHandler
from sluiceway.middleware import ConsumerInfo
from sluiceway.transports.memory import MemoryTransport
from tests.runtime.recording import Broker, running

pytestmark = pytest.mark.virtual_time
ONCE = Retry(attempts=1)


def traced(name: str, trace: list[str]) -> Any:
    async def middleware(batch: Batch[Any], call_next: BatchHandler) -> Any:
        trace.append(f"{name} in, {len(batch)}")
        try:
            await call_next(batch)
        finally:
            trace.append(f"{name} out")

    return middleware


async def handle(message: Message[bytes]) -> bytes:
    return message.body


async def test_the_apps_goes_round_the_consumers_and_the_first_is_the_outermost() -> None:
    trace: list[str] = []
    app = App(MemoryTransport(), batch_middleware=[traced("app", trace)])

    @app.consumer("t", batch_middleware=[traced("own 1", trace), traced("own 2", trace)])
    async def consume(message: Message[int]) -> int:
        return message.payload

    @consume.batch(size=2)
    async def take(batch: Batch[int]) -> None:
        trace.append(f"handler {batch.values}")

    @app.consumer("other")
    async def without_batches(message: Message[int]) -> None: ...

    async with app.running() as manager:
        await app.publish_many("t", [1, 2])
        await manager.idle()
    assert trace == [
        "app in, 2", "own 1 in, 2", "own 2 in, 2", "handler [1, 2]", "own 2 out", "own 1 out", "app out"
    ]  # fmt: skip


async def test_what_a_batch_handler_raises_passes_through_and_fails_the_batch() -> None:
    trace: list[str] = []
    broker = Broker("a", "b")

    async def fail(batch: Batch[Any]) -> None:
        raise ValueError("no")

    pipeline = Pipeline(
        broker.open, handle, batch=fail, batch_size=2, batch_middleware=[traced("it", trace)], retry=ONCE, payload=bytes
    )
    async with running(pipeline, broker):
        await broker.settled(2)
    assert trace == ["it in, 2", "it out"]
    assert [one.id for one in broker.dead] == ["m1", "m2"]


async def test_one_that_does_not_call_on_skips_the_batch_handler_and_its_messages_are_acked() -> None:
    broker = Broker("a", "b")

    async def skip(batch: Batch[Any], call_next: BatchHandler) -> None: ...

    async def fail(batch: Batch[Any]) -> None:
        raise AssertionError("not reached")

    pipeline = Pipeline(broker.open, handle, batch=fail, batch_size=2, batch_middleware=[skip], payload=bytes)
    async with running(pipeline, broker):
        await broker.settled(2)
    assert broker.acked == ["m1", "m2"]


async def test_it_may_hand_on_fewer_messages_and_fail_those_that_it_leaves_out() -> None:
    broker = Broker("old", "bad", "new")
    taken: list[bytes] = []

    async def sift(batch: Batch[Any], call_next: BatchHandler) -> None:
        for message in batch:
            if message.body == b"bad":
                message.fail("bad one")
        await call_next(Batch([message for message in batch if message.body == b"new"], batch.info))

    async def take(batch: Batch[Any]) -> None:
        taken.extend(batch.values)

    pipeline = Pipeline(
        broker.open, handle, batch=take, batch_size=3, batch_middleware=[sift], retry=ONCE, payload=bytes
    )
    async with running(pipeline, broker):
        await broker.settled(3)
    assert taken == [b"new"]
    assert broker.acked == ["m1", "m3"]
    assert [one.id for one in broker.dead] == ["m2"]


async def test_it_is_made_for_each_batcher_and_told_of_it() -> None:
    made: list[tuple[str, str | None]] = []

    class PerBatcher:
        def for_consumer(self, consumer: ConsumerInfo) -> Any:
            made.append((consumer.name, consumer.batcher))
            return traced("any", [])

    app = App(MemoryTransport(), batch_middleware=[PerBatcher()])

    @app.consumer("t")
    async def consume(message: Message[int]) -> None: ...

    @consume.batch()
    async def small(batch: Batch[Any]) -> None: ...

    @consume.batch("big")
    async def big(batch: Batch[Any]) -> None: ...

    async with app.running():
        pass
    assert made == [("consume", "default"), ("consume", "big")]


def test_a_sync_batch_handler_inside_it_runs_on_a_thread() -> None:
    import threading

    threads: list[bool] = []

    def take(batch: Batch[Any]) -> None:
        threads.append(threading.current_thread() is threading.main_thread())

    async def main() -> None:  # threads: in real time
        trace: list[str] = []
        broker = Broker("a", "b")
        pipeline = Pipeline(
            broker.open, handle, batch=take, batch_size=2, batch_middleware=[traced("it", trace)], payload=bytes
        )
        async with running(pipeline, broker):
            await broker.settled(2)
        assert trace == ["it in, 2", "it out"]

    asyncio.run(main())
    assert threads == [False]


def test_without_a_batch_handler_it_is_an_option_error() -> None:
    broker = Broker()
    with pytest.raises(OptionError, match="handle: batch_middleware has no effect without a batch handler"):
        Pipeline(broker.open, handle, batch_middleware=[traced("it", [])])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"middleware": [5]},
            "App: middleware must be a sequence of functions (message, call_next), like [Logging()]; got [5]",
        ),
        (
            {"batch_middleware": handle},
            "App: batch_middleware must be a sequence of functions (batch, call_next), like [Metrics()]; got ",
        ),
        (
            {"middleware": handle},
            "App: middleware must be a sequence of functions (message, call_next), like [Logging()]; got ",
        ),
        ({"publish_headers": {}}, "App: publish_headers must be a function that takes nothing and returns headers; "),
    ],
)
def test_what_an_app_cannot_use_is_an_option_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        App("memory://", **options)
    assert str(caught.value).startswith(said)
