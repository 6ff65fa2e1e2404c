"""Threads: plain `def` handlers run on several, and settle like any other. Here time is real."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from typing import Any

import pytest

from sluiceway import Message, Pipeline, Reject, Retry

from .recording import Broker, bodies, running

ONCE = Retry(attempts=1)


async def test_sync_handlers_run_on_several_threads_and_none_is_the_loops() -> None:
    broker = Broker(*bodies(4))
    together = threading.Barrier(4)
    threads: set[int] = set()

    def handle(message: Message[bytes]) -> None:
        threads.add(threading.get_ident())
        together.wait(5)

    async with running(Pipeline(broker.open, handle, concurrency=4), broker):
        await broker.settled(4)
    assert len(threads) == 4
    assert threading.get_ident() not in threads


async def test_concurrency_is_reached_and_never_exceeded() -> None:
    broker = Broker(*bodies(100))
    lock = threading.Lock()
    now = most = 0

    def handle(message: Message[bytes]) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1

    async with running(Pipeline(broker.open, handle, concurrency=5), broker):
        await broker.settled(100)
    assert most == 5


async def test_one_thread_settles_in_order() -> None:
    broker = Broker(*bodies(200))

    def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, concurrency=1), broker):
        await broker.settled(200)
    assert broker.acked == [f"m{number}" for number in range(1, 201)]


async def test_exceptions_on_threads_fail_their_own_message() -> None:
    broker = Broker(*bodies(8))

    def handle(message: Message[bytes]) -> None:
        match int(message.body):
            case 1:
                raise ValueError("broken")
            case 2:
                raise Reject("no")
            case 3:
                message.fail("said so")
            case 4:
                raise asyncio.CancelledError
            case 5:
                raise StopIteration

    async with running(Pipeline(broker.open, handle, concurrency=3, retry=ONCE), broker):
        await broker.settled(8)
    assert sorted(one.id for one in broker.dead) == ["m1", "m2", "m3", "m4", "m5"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
async def test_an_exit_on_a_thread_stops_the_pipeline(error: BaseException) -> None:
    broker = Broker(*bodies(20))

    def handle(message: Message[bytes]) -> None:
        if message.body == b"5":
            raise error

    with pytest.raises(type(error)):
        await Pipeline(broker.open, handle, concurrency=3).run()
    broker.check()
    assert "m5" not in broker.acked
    assert len(broker.acked) + len(broker.waiting) + len(broker.delayed) == 20


async def test_an_awaitable_from_def_is_a_type_error_that_names_the_line() -> None:
    broker = Broker("a")

    async def later() -> None: ...

    def handle(message: Message[bytes]) -> Any:
        return later()

    async with running(Pipeline(broker.open, handle, retry=ONCE), broker):
        await broker.settled(1)
    error = broker.dead[0].outputs[0].headers["sluiceway-dead-error"]
    assert f"{__file__}:" in error
    assert "is a plain `def` and returned an awaitable; declare it `async def`" in error


async def test_an_awaitable_from_def_inside_middleware_is_a_type_error_too() -> None:
    broker = Broker("a")

    async def through(message: Message[Any], call_next: Any) -> Any:
        return await call_next(message)

    async def later() -> None: ...

    def handle(message: Message[bytes]) -> Any:
        return later()

    async with running(Pipeline(broker.open, handle, retry=ONCE, middleware=[through]), broker):
        await broker.settled(1)
    assert "returned an awaitable" in broker.dead[0].outputs[0].headers["sluiceway-dead-error"]


async def test_a_sync_handler_inside_middleware_reaches_its_concurrency() -> None:
    broker = Broker(*bodies(12))
    together = threading.Barrier(12)

    async def through(message: Message[Any], call_next: Any) -> Any:
        return await call_next(message)

    def handle(message: Message[bytes]) -> None:
        together.wait(5)

    async with running(Pipeline(broker.open, handle, concurrency=12, middleware=[through], retry=ONCE), broker):
        await broker.settled(12)
    assert len(broker.acked) == 12


async def test_ack_from_sync_code_settles_nothing_and_says_why() -> None:
    broker = Broker("a", "b")

    def handle(message: Message[bytes]) -> Any:
        if message.body == b"a":
            asyncio.run(message.ack())
        else:
            return message.ack()

    async with running(Pipeline(broker.open, handle, retry=ONCE), broker):
        await broker.settled(2)
    said = {one.id: one.outputs[0].headers["sluiceway-dead-error"] for one in broker.dead}
    assert "ack() works in the pipeline's own loop" in said["m1"]
    assert "returned an awaitable" in said["m2"]


async def test_an_ack_that_nobody_awaited_warns() -> None:
    broker = Broker("a")

    def handle(message: Message[bytes]) -> None:
        message.ack()  # type: ignore[unused-coroutine]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with running(Pipeline(broker.open, handle, retry=ONCE), broker):
            await broker.settled(1)
    assert any("was never awaited" in str(one.message) for one in caught)


async def test_a_drain_waits_for_threads_and_releases_what_has_not_started() -> None:
    broker = Broker(*bodies(30))
    started = threading.Semaphore(0)
    go = threading.Event()
    done: list[str] = []

    def handle(message: Message[bytes]) -> None:
        started.release()
        go.wait(5)
        done.append(message.id)

    async with running(Pipeline(broker.open, handle, concurrency=2), broker):
        await asyncio.to_thread(lambda: [started.acquire(timeout=5) for _ in range(2)])
        asyncio.get_running_loop().call_later(0.05, go.set)
    assert sorted(done) == sorted(broker.acked) == ["m1", "m2"]
    assert len(broker.waiting) == 28


async def test_a_thread_that_runs_at_the_deadline_is_left_unsettled() -> None:
    broker = Broker(*bodies(5))
    go = threading.Event()

    def handle(message: Message[bytes]) -> None:
        go.wait(5)

    async with running(Pipeline(broker.open, handle, concurrency=2, max_demand=5, shutdown_timeout=0.05), broker):
        await broker.until(lambda: broker.held)
        await asyncio.sleep(0.05)
    assert sorted(broker.source.keep) == ["m1", "m2"]
    assert {one.outcome for one in broker.ended} == {"release"}
    assert len(broker.waiting) == 3
    go.set()


async def test_a_thread_inside_middleware_that_runs_at_the_deadline_is_left_unsettled() -> None:
    broker = Broker(*bodies(2))
    go = threading.Event()

    async def through(message: Message[Any], call_next: Any) -> Any:
        if message.body == b"2":
            await asyncio.sleep(60)  # not on a thread yet: released
        return await call_next(message)

    def handle(message: Message[bytes]) -> None:
        go.wait(5)

    pipeline = Pipeline(broker.open, handle, concurrency=2, shutdown_timeout=0.05, middleware=[through])
    async with running(pipeline, broker):
        await broker.until(lambda: broker.held)
        await asyncio.sleep(0.05)
    assert broker.source.keep == ["m1"]
    assert broker.outcomes("m2") == ["release"]
    go.set()


async def test_batches_of_sync_handlers_hold_all_values() -> None:
    broker = Broker(*bodies(100))
    got: list[int] = []

    def handle(message: Message[bytes]) -> int:
        return int(message.body)

    def book(batch: Any) -> None:
        got.extend(batch.values)

    async with running(Pipeline(broker.open, handle, batch=book, batch_size=7, batch_timeout=0.05), broker):
        await broker.settled(100)
    assert sorted(got) == list(range(1, 101))
