"""Timeouts: handlers that take too long are cancelled, and those that ignore it are abandoned and replaced."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from sluiceway import Message, Pipeline, Retry

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time

ONCE = Retry(attempts=1)


async def test_a_handler_over_the_timeout_is_cancelled_and_fails() -> None:
    broker = Broker("slow", "fast")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(100 if message.body == b"slow" else 0)

    async with running(Pipeline(broker.open, handle, timeout=2.0, retry=ONCE), broker):
        await broker.settled(2)
    (dead,) = broker.dead[0].outputs
    assert dead.headers["sluiceway-dead-type"] == "sluiceway.errors.HandlerTimeout"
    assert dead.headers["sluiceway-dead-error"] == "handle: message m1 ran over 2.0 s"


async def test_a_timeout_is_never_early_and_late_by_a_twentieth_at_most() -> None:
    broker = Broker()
    lasted: list[float] = []

    async def handle(message: Message[bytes]) -> None:
        began = asyncio.get_running_loop().time()
        try:
            await asyncio.sleep(100)
        finally:
            lasted.append(asyncio.get_running_loop().time() - began)

    async with running(Pipeline(broker.open, handle, timeout=10.0, retry=ONCE, concurrency=50), broker):
        for count in range(40):
            broker.put(str(count))
            await asyncio.sleep(0.13)
        await broker.settled(40)
    assert min(lasted) >= 10 - 1e-4
    assert max(lasted) <= 10 * 1.1


async def test_a_handler_just_below_the_timeout_is_left_alone() -> None:
    broker = Broker(*bodies(20))

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(9.99)

    async with running(Pipeline(broker.open, handle, timeout=10.0, retry=ONCE, concurrency=3), broker):
        await broker.settled(20)
    assert len(broker.acked) == 20


async def test_a_handler_that_swallows_its_cancellation_and_returns_is_a_success() -> None:
    broker = Broker(*bodies(3))

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"1":
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                await asyncio.sleep(1)
        if message.body == b"2":
            inner = asyncio.ensure_future(asyncio.sleep(1))
            inner.cancel()
            await inner  # must not be taken for the timeout of the message before

    async with running(Pipeline(broker.open, handle, timeout=2.0, retry=ONCE, concurrency=1), broker):
        await broker.settled(3)
    assert sorted(broker.acked) == ["m1", "m3"]
    assert broker.dead[0].outputs[0].headers["sluiceway-dead-type"] == "asyncio.exceptions.CancelledError"


async def test_a_handler_that_ignores_its_cancellation_is_abandoned_and_replaced() -> None:
    broker = Broker(*bodies(20))
    go = asyncio.Event()
    now = most = 0

    async def handle(message: Message[bytes]) -> None:
        nonlocal now, most
        if message.body == b"1":
            while not go.is_set():
                try:
                    await go.wait()
                except asyncio.CancelledError:
                    pass
            return
        now += 1
        most = max(most, now)
        await asyncio.sleep(1)
        now -= 1

    async with running(Pipeline(broker.open, handle, timeout=2.0, retry=ONCE, concurrency=2), broker):
        await broker.settled(20)
        assert [one.id for one in broker.dead] == ["m1"]
        assert "ignored its cancellation" in broker.dead[0].outputs[0].headers["sluiceway-dead-error"]
        go.set()
        broker.put(*[b"x"] * 200)  # the abandoned one must not take any of these
        await broker.settled(220)
    assert most == 2
    assert len(broker.ended) == 220


async def test_as_many_abandoned_as_processors_stop_the_pipeline() -> None:
    broker = Broker(*["stuck"] * 5)

    async def handle(message: Message[bytes]) -> None:
        while True:
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                if stop.is_set():
                    raise

    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(20, stop.set)
    with pytest.raises(SystemExit, match="2 handlers never returned and were abandoned"):
        await Pipeline(broker.open, handle, timeout=2.0, retry=ONCE, concurrency=2, shutdown_timeout=5).run()
    stop.set()
    broker.check()
    assert len(broker.dead) >= 2
    assert len(broker.waiting) + len(broker.dead) == 5


class TestOnThreads:
    """Plain `def` handlers; here time is real."""

    def test_a_thread_over_the_timeout_is_abandoned_and_replaced(self) -> None:
        async def main() -> None:
            go = threading.Event()
            broker = Broker("stuck", *bodies(5))
            late: list[str] = []

            def handle(message: Message[bytes]) -> None:
                if message.body == b"stuck":
                    go.wait(10)
                    late.append(message.id)

            pipeline = Pipeline(broker.open, handle, timeout=0.1, retry=ONCE, concurrency=2)
            async with running(pipeline, broker):
                await broker.settled(6)
                assert broker.outcomes("m1") == ["dead_letter"]
                go.set()
                await asyncio.sleep(0.05)
                broker.put("more")
                await broker.settled(7)
            assert late == ["m1"]
            assert len(broker.ended) == 7  # what the abandoned thread returned is dropped

        asyncio.run(main())

    def test_threads_that_never_return_end_the_pipeline_after_as_many_as_there_are_processors(self) -> None:
        async def main() -> None:
            go = threading.Event()
            broker = Broker(*["stuck"] * 6)

            def handle(message: Message[bytes]) -> None:
                go.wait(30)

            began = time.monotonic()
            pipeline = Pipeline(broker.open, handle, timeout=0.05, retry=ONCE, concurrency=2, shutdown_timeout=0.3)
            with pytest.raises(SystemExit, match="2 handlers never returned"):
                await pipeline.run()
            assert time.monotonic() - began < 3
            broker.check()
            ended = [one.id for one in broker.dead] + [entry.id for entry in broker.waiting] + broker.kept
            assert len(ended) == len(set(ended)) == 6
            go.set()

        asyncio.run(main())

    def test_a_thread_that_returns_late_does_not_count_for_ever(self) -> None:
        async def main() -> None:
            broker = Broker()

            def handle(message: Message[bytes]) -> None:
                time.sleep(0.12)

            pipeline = Pipeline(broker.open, handle, timeout=0.05, retry=ONCE, concurrency=2)
            async with running(pipeline, broker):
                for count in range(1, 5):
                    broker.put("slow")
                    await broker.settled(count)
                    await asyncio.sleep(0.15)
            assert len(broker.dead) == 4

        asyncio.run(main())

    def test_an_abandoned_thread_inside_middleware_is_replaced_too(self) -> None:
        async def through(message: Message[Any], call_next: Any) -> Any:
            return await call_next(message)

        async def main() -> None:
            go = threading.Event()
            broker = Broker("stuck", *bodies(5))

            def handle(message: Message[bytes]) -> None:
                if message.body == b"stuck":
                    go.wait(10)

            pipeline = Pipeline(broker.open, handle, timeout=0.1, retry=ONCE, concurrency=2, middleware=[through])
            async with running(pipeline, broker):
                await broker.settled(6)
            assert [one.id for one in broker.dead] == ["m1"]
            go.set()

        asyncio.run(main())
