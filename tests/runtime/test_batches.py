"""Batches: what makes one go, who runs it, and how its messages end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from sluiceway import App, Batch, ForeignMessage, Message, Pipeline, Retry, Split
from sluiceway.assembly import make_spec
from sluiceway.consumer import FunctionConsumer
from sluiceway.signatures import NO_CONTEXT
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time

ONCE = Retry(attempts=1)


async def same(message: Message[bytes]) -> bytes:
    return message.body


def texts(count: int) -> list[str]:
    return [body.decode() for body in bodies(count)]


async def test_a_batch_goes_by_size_then_by_time() -> None:
    broker = Broker(*texts(25))
    seen: list[tuple[str, int, float]] = []

    async def book(batch: Batch[bytes]) -> None:
        seen.append((batch.info.trigger, len(batch), asyncio.get_running_loop().time()))

    async with running(Pipeline(broker.open, same, batch=book, batch_size=10, batch_timeout=2.0), broker):
        await broker.settled(25)
    assert [(trigger, size) for trigger, size, _ in seen] == [("size", 10), ("size", 10), ("timeout", 5)]
    assert 2 <= seen[2][2] < 2.05


async def test_a_batch_holds_what_handlers_returned_in_their_order() -> None:
    broker = Broker(*texts(10))
    got: list[Any] = []

    async def handle(message: Message[bytes]) -> int:
        await asyncio.sleep((10 - int(message.body)) / 10)
        return int(message.body)

    async def book(batch: Batch[int]) -> None:
        got.extend(batch.values)

    async with running(Pipeline(broker.open, handle, batch=book, batch_size=10), broker):
        await broker.settled(10)
    assert got == list(range(10, 0, -1))


async def test_flush_sends_the_batch_with_all_that_is_in_it() -> None:
    broker = Broker(*texts(5))
    seen: list[Any] = []

    async def handle(message: Message[bytes]) -> bytes:
        message.to(flush=message.body == b"5")
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        seen.append((batch.info.trigger, len(batch)))

    async with running(
        Pipeline(broker.open, handle, batch=book, batch_size=10, batch_timeout=100.0, concurrency=1), broker
    ):
        await broker.settled(5)
    assert seen == [("flush", 5)]


async def test_flush_takes_what_was_handled_before_and_not_what_still_runs() -> None:
    broker = Broker(*texts(4))
    seen: list[Any] = []

    async def handle(message: Message[bytes]) -> bytes:
        await asyncio.sleep(int(message.body))
        message.to(flush=message.body == b"3")
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        seen.append((batch.info.trigger, batch.values))

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=10, batch_timeout=20.0, concurrency=4)
    async with running(pipeline, broker):
        await broker.settled(4)
    assert seen == [("flush", [b"1", b"2", b"3"]), ("timeout", [b"4"])]


async def test_flush_takes_the_batch_of_its_key_alone() -> None:
    broker = Broker(*texts(6))
    seen: list[Any] = []

    async def handle(message: Message[bytes]) -> bytes:
        message.to(key=int(message.body) % 2, flush=message.body == b"5")
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        seen.append((batch.info.trigger, batch.values))

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=10, batch_timeout=20.0, concurrency=1)
    async with running(pipeline, broker):
        await broker.settled(6)
    assert seen == [("flush", [b"1", b"3", b"5"]), ("timeout", [b"2", b"4", b"6"])]


async def test_a_split_makes_a_batch_full_by_what_is_in_it() -> None:
    app = App(MemoryTransport())
    seen: list[Any] = []

    @app.consumer("work", concurrency=1)
    async def work(message: Message[int]) -> int:
        message.to(key="odd" if message.payload % 2 else "even")
        return message.payload

    def step(total: int, message: Message[Any]) -> tuple[int, bool]:
        total += message.value
        return (0, True) if total >= 16 else (total, False)

    @work.batch(size=10, timeout=5.0, split=Split(0, step))
    async def book(batch: Batch[int]) -> None:
        seen.append((batch.key, batch.info.trigger, batch.values))

    async with app.running() as manager:
        await app.publish_many("work", [40, 1, 13, 3, 2])
        await manager.idle()
    assert seen == [("even", "split", [40]), ("odd", "split", [1, 13, 3]), ("even", "timeout", [2])]


async def test_a_split_by_bytes_and_the_size_both_make_a_batch_full() -> None:
    broker = Broker("aaaa", "bb", "c", "d", "e", "f")
    seen: list[Any] = []

    async def book(batch: Batch[bytes]) -> None:
        seen.append((batch.info.trigger, len(batch)))

    definition: FunctionConsumer[Any, Any] = FunctionConsumer(same, ("source",), {"payload": bytes, "concurrency": 1})
    definition.batch(size=3, timeout=5.0, split=Split.bytes(6))(book)
    pipeline = Pipeline(broker.open, same)
    pipeline._spec = make_spec(definition, definition.bind(NO_CONTEXT), group="default")
    async with running(pipeline, broker):
        await broker.settled(6)
    assert seen == [("split", 2), ("size", 3), ("timeout", 1)]


async def test_a_split_that_raises_fails_its_message_and_leaves_it_out() -> None:
    transport = MemoryTransport()
    app = App(transport)
    seen: list[int] = []

    def step(count: int, message: Message[Any]) -> tuple[int, bool]:
        return count + 1, 1 / message.value > 1

    @app.consumer("work", concurrency=1, retry=ONCE)
    async def work(message: Message[int]) -> int:
        return message.payload

    @work.batch(size=10, timeout=0.5, split=Split(0, step))
    async def book(batch: Batch[int]) -> None:
        seen.extend(batch.values)

    async with app.running() as manager:
        await app.publish_many("work", [1, 0, 2])
        await manager.idle()
    assert seen == [1, 2]
    assert [one.body async for one in transport.browse("work.default.dead")] == [b"0"]


async def test_a_drain_emits_what_is_forming() -> None:
    broker = Broker(*texts(7))
    seen: list[Any] = []

    async def book(batch: Batch[bytes]) -> None:
        await asyncio.sleep(1)
        seen.append((batch.info.trigger, len(batch)))

    async with running(Pipeline(broker.open, same, batch=book, batch_size=10, batch_timeout=100.0), broker):
        await asyncio.sleep(1)
    assert seen == [("drain", 7)]
    assert len(broker.acked) == 7


async def test_batchers_by_name_have_their_own_size_and_key() -> None:
    transport = MemoryTransport()
    app = App(transport)
    seen: list[Any] = []

    @app.consumer("work")
    async def work(message: Message[int]) -> int:
        message.to("even" if message.payload % 2 == 0 else "odd", key="mine" if message.payload == 3 else None)
        return message.payload

    @work.batch("even", size=2, timeout=1.0, key=lambda value: value % 4)
    async def even(batch: Batch[int]) -> None:
        seen.append(("even", batch.key, batch.values))

    @work.batch("odd", size=3, timeout=1.0)
    async def odd(batch: Batch[int]) -> None:
        seen.append(("odd", batch.key, batch.values))

    async with app.running() as manager:
        await app.publish_many("work", range(12))
        await manager.idle()
    assert ("even", 0, [0, 4]) in seen
    assert ("even", 2, [2, 6]) in seen
    assert ("odd", None, [1, 5, 7]) in seen
    assert ("odd", "mine", [3]) in seen
    assert sorted(value for _, _, values in seen for value in values) == list(range(12))


@pytest.mark.parametrize("key", [lambda value: [], lambda value: 1 / 0], ids=["unhashable", "raising"])
async def test_a_bad_batch_key_fails_its_own_message(key: Any) -> None:
    transport = MemoryTransport()
    app = App(transport)
    seen: list[int] = []

    @app.consumer("work", retry=ONCE)
    async def work(message: Message[int]) -> int:
        return message.payload

    @work.batch(size=10, timeout=0.5, key=lambda value: key(value) if value == 1 else None)
    async def book(batch: Batch[int]) -> None:
        seen.extend(batch.values)

    async with app.running() as manager:
        await app.publish_many("work", range(3))
        await manager.idle()
        assert manager.stats()[0].held == 0
    assert seen == [0, 2]
    assert [one.body async for one in transport.browse("work.default.dead")] == [b"1"]


async def test_concurrency_of_a_batcher_is_reached_and_never_exceeded() -> None:
    app = App(MemoryTransport())
    now = most = 0

    @app.consumer("work")
    async def work(message: Message[int]) -> int:
        return message.payload

    @work.batch(size=2, concurrency=3)
    async def book(batch: Batch[int]) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(1)
        now -= 1

    async with app.running() as manager:
        await app.publish_many("work", range(40))
        await manager.idle()
    assert most == 3


async def test_a_batch_emitted_the_moment_another_ends_is_run() -> None:
    for turns in range(20):
        broker = Broker("1", "2")

        async def handle(message: Message[bytes], *, turns: int = turns) -> bytes:
            if message.body == b"2":
                for _ in range(turns):
                    await asyncio.sleep(0)
            return message.body

        async def book(batch: Batch[bytes]) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        async with running(Pipeline(broker.open, handle, batch=book, batch_size=1), broker):
            await broker.settled(2)


async def test_a_batch_handler_that_raises_fails_the_whole_batch() -> None:
    broker = Broker(*texts(5))

    async def book(batch: Batch[bytes]) -> None:
        raise ValueError("no batch")

    async with running(Pipeline(broker.open, same, batch=book, batch_size=5, retry=ONCE), broker):
        await broker.settled(5)
    assert len(broker.dead) == 5
    assert broker.dead[0].outputs[0].headers["sluiceway-dead-error"] == "no batch"


async def test_failing_some_acks_the_rest() -> None:
    broker = Broker(*texts(5))

    async def book(batch: Batch[bytes]) -> None:
        batch[1].fail("two")
        batch.fail(batch[3], ValueError("four"))

    async with running(Pipeline(broker.open, same, batch=book, batch_size=5, retry=ONCE), broker):
        await broker.settled(5)
    assert sorted(broker.acked) == ["m1", "m3", "m5"]
    assert sorted(one.id for one in broker.dead) == ["m2", "m4"]


async def test_failing_a_foreign_message_fails_the_batch_and_not_the_other() -> None:
    broker = Broker(*texts(4))
    first: list[Message[Any]] = []
    errors: list[BaseException] = []

    async def book(batch: Batch[bytes]) -> None:
        if not first:
            first.append(batch[0])
            await asyncio.sleep(1)
        else:
            try:
                batch.fail(first[0], "not mine")
            except ForeignMessage as error:
                errors.append(error)
                raise

    pipeline = Pipeline(broker.open, same, batch=book, batch_size=2, retry=ONCE)
    async with running(pipeline, broker):
        await broker.settled(4)
    assert len(errors) == 1
    assert len(broker.acked) == len(broker.dead) == 2
    assert first[0].id in broker.acked


async def test_a_batch_cannot_be_changed() -> None:
    broker = Broker(*texts(3))
    kinds: list[str] = []

    async def book(batch: Batch[bytes]) -> None:
        messages: Any = batch
        kinds.extend(
            name for name in ("append", "clear", "pop", "__setitem__", "__delitem__") if hasattr(messages, name)
        )
        kinds.append(type(batch[:]).__name__)
        batch.values.clear()  # a copy

    async with running(Pipeline(broker.open, same, batch=book, batch_size=3), broker):
        await broker.settled(3)
    assert broker.acked == ["m1", "m2", "m3"]
    assert kinds == ["tuple"]


async def test_a_batch_over_the_timeout_is_cancelled_and_fails() -> None:
    broker = Broker(*texts(2))

    async def book(batch: Batch[bytes]) -> None:
        await asyncio.sleep(100)

    async with running(Pipeline(broker.open, same, batch=book, batch_size=2, timeout=3.0, retry=ONCE), broker):
        await broker.settled(2)
        assert asyncio.get_running_loop().time() == pytest.approx(3, abs=0.5)
    assert broker.dead[0].outputs[0].headers["sluiceway-dead-type"] == "sluiceway.errors.HandlerTimeout"


async def test_a_batch_that_ignores_its_cancellation_is_abandoned_and_replaced() -> None:
    broker = Broker(*texts(4))
    stuck = asyncio.Event()

    async def book(batch: Batch[bytes]) -> None:
        while batch[0].body == b"1" and not stuck.is_set():
            try:
                await stuck.wait()
            except asyncio.CancelledError:
                pass

    async with running(Pipeline(broker.open, same, batch=book, batch_size=2, timeout=3.0, retry=ONCE), broker):
        await broker.settled(4)
        assert sorted(one.id for one in broker.dead) == ["m1", "m2"]
        assert broker.acked == ["m3", "m4"]
        stuck.set()
        await asyncio.sleep(1)
    assert len(broker.ended) == 4


async def test_a_batch_that_swallows_one_cancellation_and_returns_is_a_success() -> None:
    broker = Broker(*texts(4))

    async def book(batch: Batch[bytes]) -> None:
        try:
            await asyncio.sleep(10 if batch[0].body == b"1" else 0)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)

    async with running(Pipeline(broker.open, same, batch=book, batch_size=2, timeout=3.0, retry=ONCE), broker):
        await broker.settled(4)
    assert len(broker.acked) == 4


async def test_a_cancelled_inner_task_fails_the_batch_and_the_next_one_runs() -> None:
    broker = Broker(*texts(4))

    async def book(batch: Batch[bytes]) -> None:
        if batch[0].body == b"1":
            inner = asyncio.ensure_future(asyncio.sleep(1))
            inner.cancel()
            await inner

    async with running(Pipeline(broker.open, same, batch=book, batch_size=2, retry=ONCE), broker):
        await broker.settled(4)
    assert broker.acked == ["m3", "m4"]


async def test_a_batch_that_runs_when_the_time_to_drain_is_up_is_released_and_the_next_not_begun() -> None:
    broker = Broker(*texts(6))
    begun: list[int] = []

    async def book(batch: Batch[bytes]) -> None:
        begun.append(len(batch))
        await asyncio.sleep(1000)

    pipeline = Pipeline(broker.open, same, batch=book, batch_size=2, batch_timeout=500.0, shutdown_timeout=5)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
        before = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - before < 5.5
    assert begun == [2]
    assert [one.outcome for one in broker.ended] == ["release"] * 6


async def test_an_exit_in_a_batch_handler_releases_the_batch_and_stops() -> None:
    broker = Broker(*texts(6))

    async def book(batch: Batch[bytes]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await Pipeline(broker.open, same, batch=book, batch_size=2).run()
    broker.check()
    assert len(broker.waiting) == 6
    assert {one.outcome for one in broker.ended} == {"release"}


class TestOnThreads:
    """Plain `def` batch handlers; here time is real."""

    @staticmethod
    def app() -> tuple[App, MemoryTransport]:
        transport = MemoryTransport()
        return App(transport, shutdown_timeout=0.2), transport

    def test_sync_batch_handlers_run_on_as_many_threads_as_concurrency(self) -> None:
        async def main() -> None:
            app, _ = self.app()
            threads: set[int] = set()
            gate = threading.Barrier(8)

            @app.consumer("work")
            async def work(message: Message[int]) -> int:
                return message.payload

            @work.batch(size=1, concurrency=8)
            def book(batch: Batch[int]) -> None:
                threads.add(threading.get_ident())
                gate.wait(5)

            async with app.running() as manager:
                await app.publish_many("work", range(8))
                await manager.idle(0.05)
            assert len(threads) == 8
            assert threading.get_ident() not in threads

        asyncio.run(main())

    def test_an_awaitable_from_a_sync_batch_handler_fails_the_batch(self) -> None:
        async def main() -> None:
            app, transport = self.app()

            @app.consumer("work", retry=ONCE)
            async def work(message: Message[int]) -> int:
                return message.payload

            async def insert(values: list[int]) -> None: ...

            @work.batch(size=2)
            def book(batch: Batch[int]) -> Any:
                return insert(batch.values)

            async with app.running() as manager:
                await app.publish_many("work", range(2))
                await manager.idle(0.05)
            (one, _) = [one async for one in transport.browse("work.default.dead")]
            assert "is a plain `def` and returned an awaitable" in one.headers["sluiceway-dead-error"]

        asyncio.run(main())

    def test_a_thread_that_runs_when_the_time_to_drain_is_up_is_left_unsettled(self) -> None:
        async def main() -> None:
            go = threading.Event()
            broker = Broker("1", "2", "3")

            def book(batch: Batch[bytes]) -> None:
                go.wait(10)

            pipeline = Pipeline(broker.open, same, batch=book, batch_size=2, batch_timeout=60.0, shutdown_timeout=0.1)
            async with running(pipeline, broker):
                await asyncio.sleep(0.05)
            assert sorted(broker.source.keep) == ["m1", "m2"]
            assert broker.outcomes("m3") == ["release"]
            go.set()

        asyncio.run(main())

    def test_a_sync_batch_handler_over_the_timeout_fails_and_another_thread_takes_its_place(self) -> None:
        async def main() -> None:
            app, transport = self.app()
            go = threading.Event()
            booked: list[int] = []

            @app.consumer("work", retry=ONCE, timeout=0.1, concurrency=10)
            async def work(message: Message[int]) -> int:
                return message.payload

            @work.batch(size=1)
            def book(batch: Batch[int]) -> None:
                if batch.values == [0]:
                    go.wait(10)
                booked.extend(batch.values)

            async with app.running() as manager:
                await app.publish_many("work", range(3))
                await manager.idle(0.3)
            assert booked == [1, 2]
            go.set()
            assert [one.body async for one in transport.browse("work.default.dead")] == [b"0"]

        asyncio.run(main())
