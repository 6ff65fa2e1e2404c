"""Virtual time: waiting takes no time, and what is real stays real."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from sluiceway.testing import Deadlock, VirtualClockLoop, external, run

pytestmark = pytest.mark.virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_an_hour_passes_at_once() -> None:
    began = time.monotonic()
    await asyncio.sleep(3600)
    assert now() == 3600
    assert time.monotonic() - began < 1


async def test_timers_run_in_their_order_and_at_their_time() -> None:
    seen: list[tuple[str, float]] = []

    async def note(name: str, delay: float) -> None:
        await asyncio.sleep(delay)
        seen.append((name, now()))

    await asyncio.gather(note("c", 3.5), note("a", 0.1), note("b", 2), note("a2", 0.1))
    assert seen == [("a", 0.1), ("a2", 0.1), ("b", 2), ("c", 3.5)]


async def test_many_odd_delays_end_exactly_when_due() -> None:
    for _ in range(1000):
        due = now() + 0.1
        await asyncio.sleep(0.1)
        assert now() == pytest.approx(due, abs=1e-9)
    assert now() == pytest.approx(100)


async def test_time_stands_still_while_there_is_work() -> None:
    for _ in range(1000):
        await asyncio.sleep(0)
    assert now() == 0


async def test_a_timeout_comes_before_a_longer_wait() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10):
            await asyncio.sleep(11)
    assert now() == 10


async def test_work_on_an_executor_is_waited_for() -> None:
    async with asyncio.timeout(60):
        assert await asyncio.to_thread(threading.Event().wait, 0.02) is False
    assert now() < 10


async def test_a_timer_runs_at_real_speed_while_an_executor_works() -> None:
    release = threading.Event()
    call = asyncio.get_running_loop().run_in_executor(None, release.wait)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(call), 0.02)
    assert time.monotonic() - began >= 0.019
    release.set()
    assert await call


async def test_time_jumps_again_when_the_executor_is_done() -> None:
    await asyncio.to_thread(int)
    began = time.monotonic()
    await asyncio.sleep(3600)
    assert time.monotonic() - began < 1


async def test_work_that_is_said_to_be_external_is_waited_for() -> None:
    loop, answer = asyncio.get_running_loop(), asyncio.Event()
    go = threading.Event()
    thread = threading.Thread(target=lambda: (go.wait(), loop.call_soon_threadsafe(answer.set)))
    thread.start()
    with external():
        loop.call_later(0.01, go.set)
        async with asyncio.timeout(60):
            await answer.wait()
    thread.join()
    assert now() < 10


async def test_a_real_wait_ends_when_its_reason_ends_in_another_thread() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with loop.external():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    assert loop.pending_outside
    threading.Timer(0.02, leave.set).start()
    began = time.monotonic()
    await asyncio.sleep(3600)
    assert time.monotonic() - began < 5
    thread.join()


async def test_a_call_from_a_thread_wakes_a_loop_without_timers() -> None:
    loop, answer = asyncio.get_running_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(answer.set))
    thread.start()
    await answer.wait()
    thread.join()


async def test_sockets_work() -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        loop.call_later(5, theirs.send, b"hello")
        async with asyncio.timeout(10):
            assert await loop.sock_recv(ours, 10) == b"hello"
    assert now() == 5


async def test_streams_work() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        with external():
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            writer.close()
            await writer.wait_closed()


@pytest.fixture
async def born() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def test_fixtures_run_on_the_same_loop(born: asyncio.AbstractEventLoop) -> None:
    assert born is asyncio.get_running_loop()
    assert isinstance(born, VirtualClockLoop)


def test_a_deadlock_is_an_error_that_names_the_waiting_tasks() -> None:
    async def wait_for_nothing() -> None:
        await asyncio.sleep(2)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match="at 2 virtual seconds no timer is set") as caught:
        run(wait_for_nothing(), grace=0.01)
    assert "wait_for_nothing" in str(caught.value)


def test_run_returns_what_the_coroutine_returns() -> None:
    async def main() -> float:
        await asyncio.sleep(60)
        return now()

    assert run(main()) == 60


def test_external_does_nothing_on_a_real_loop() -> None:
    async def main() -> bool:
        with external():
            return True

    assert asyncio.run(main())
