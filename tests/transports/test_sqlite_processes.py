"""Several processes on one SQLite file: death, stops, leases, wake-ups, forks."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sluiceway.errors import ConnectError, TransportError
from sluiceway.message import Message, Outgoing, Settlement
from sluiceway.transports.sqlite import SQLiteSource, SQLiteTransport
from tests.transports.sqlite_kit import Worker, bodies, connected, get, numbered, publish, subscribe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


@pytest.mark.crash
async def test_what_a_killed_process_held_comes_back_long_before_its_lease_ends(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(4))
        worker = await Worker.start("hold", path, 3)
        assert await worker.line() == ["held", "0", "1", "2"]
        rest = await get(source, 1)
        waiting = asyncio.create_task(source.receive(10))
        started = time.monotonic()
        await worker.kill()
        again = await asyncio.wait_for(waiting, 5)
        assert time.monotonic() - started < 3
        assert bodies(again) == [b"0", b"1", b"2"]
        assert all(message.suspect and message.attempt == 1 and message.deliveries == 2 for message in again)
        assert bodies(rest) == [b"3"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["shop.db"]


@pytest.mark.crash
async def test_a_dead_process_is_noticed_while_its_heir_is_busy(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", b"orphan")
        worker = await Worker.start("hold", path, 1)
        assert await worker.line() == ["held", "orphan"]
        await worker.kill()
        async with asyncio.timeout(5):
            while True:
                await publish(transport, "t", b"busy")
                messages = await source.receive(1)
                await source.settle(messages, [])
                if messages[0].body == b"orphan":
                    break


@pytest.mark.crash
async def test_a_process_stopped_past_its_lease_loses_what_it_held_and_settles_nothing(path: Path) -> None:
    async with connected(path, lease=0.6) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(2))
        worker = await Worker.start("hold", path, 2, lease=0.6)
        assert await worker.line() == ["held", "0", "1"]
        worker.signal(signal.SIGSTOP)
        again = await get(source, 2)
        assert all(message.suspect for message in again)
        worker.signal(signal.SIGCONT)
        worker.tell()
        assert await worker.line() == ["refused", "0", "1"]
        assert not await source.settle(again, [])
        await worker.kill()


async def test_a_stopped_process_that_holds_nothing_is_left_alone(path: Path) -> None:
    async with connected(path, lease=0.3) as transport:
        source = await subscribe(transport, "t")
        idle = await Worker.start("consume", path, 10, lease=0.3)
        assert await idle.line() == ["ready"]
        idle.signal(signal.SIGSTOP)
        await asyncio.sleep(0.7)
        idle.signal(signal.SIGCONT)
        source.stop()  # so that only the other can receive
        await publish(transport, "t", b"a")
        assert await idle.line() == ["got", "a"]
        assert await idle.line() == ["acked", "a"]
        await idle.kill()


async def test_a_publish_wakes_a_sleeping_receiver_in_another_process(path: Path) -> None:
    async with connected(path) as transport:
        worker = await Worker.start("consume", path, 10)
        assert await worker.line() == ["ready"]
        await asyncio.sleep(0.5)  # its poll is slow by now
        waits = []
        for number in range(20):
            started = time.perf_counter()
            await publish(transport, "t", b"%d" % number)
            assert await worker.line() == ["got", str(number)]
            waits.append(time.perf_counter() - started)
            assert await worker.line() == ["acked", str(number)]
        assert sorted(waits)[10] < 0.04  # a poll would take half a second in the mean
        await worker.kill()


async def test_a_receiver_that_cannot_be_rung_finds_the_message_by_polling(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(path) as transport, connected(path) as publisher:
        source = await subscribe(transport, "t")
        waiting = asyncio.create_task(source.receive(1))
        monkeypatch.setattr("sluiceway.transports.sqlite.doorbell.Doorbell.ring", lambda self, names: None)
        await publish(publisher, "t", b"a")
        assert bodies(await asyncio.wait_for(waiting, 5)) == [b"a"]


async def test_a_retry_in_another_process_wakes_a_receiver_when_it_is_due(path: Path) -> None:
    async with connected(path) as one, connected(path) as two:
        first, second = await subscribe(one, "t"), await subscribe(two, "t")
        await publish(one, "t", b"a")
        (message,) = await get(first, 1)
        waiting = asyncio.create_task(second.receive(1))
        await first.settle([], [Settlement(message, "retry", delay=0.3)])
        started = time.monotonic()
        assert bodies(await asyncio.wait_for(waiting, 5)) == [b"a"]
        assert 0.2 < time.monotonic() - started < 1.0


@pytest.mark.crash
async def test_kills_of_consumers_and_publishers_at_any_instant_lose_nothing(path: Path) -> None:
    """Published calls are there in full, each message is acked, and a kill repeats no more than a window."""
    seed = random.randrange(1_000_000)
    print("seed", seed)
    rng = random.Random(seed)
    window, size, kills = 20, 25, 10
    published: set[int] = set()
    acked: Counter[int] = Counter()
    in_hand: set[int] = set()  # of a consumer that died: it may have acked them and not come to say so

    async def listen(worker: Worker) -> None:
        while line := await worker.line():
            if line[0] == "got":
                in_hand.update(map(int, line[1:]))
            elif line[0] == "acked":
                in_hand.difference_update(map(int, line[1:]))
                acked.update(map(int, line[1:]))
            elif line[0] == "published":
                published.update(range(int(line[1]), int(line[1]) + size))

    async with connected(path) as transport:
        await (await subscribe(transport, "t")).aclose()
        for round_ in range(kills):
            workers = [
                await Worker.start("publish", path, round_ * 1_000_000, size),
                await Worker.start("consume", path, window),
            ]
            for worker in workers:
                assert await worker.line() == ["ready"]
            ears = [asyncio.create_task(listen(worker)) for worker in workers]
            for worker in rng.sample(workers, 2):
                await asyncio.sleep(rng.uniform(0, 0.15))
                worker.process.kill()
            await asyncio.gather(*ears)
            for worker in workers:
                await worker.process.wait()
        source = await subscribe(transport, "t")
        while messages := await _rest(source):
            assert not await source.settle(messages, [])
            acked.update(int(message.body) for message in messages)
    assert published - acked.keys() <= in_hand, "lost"
    whole = Counter(number // size for number in acked.keys() | in_hand)
    assert set(whole.values()) == {size}, "a call of publish is there in part"
    assert sum(acked.values()) - len(acked) <= kills * window


async def _rest(source: SQLiteSource) -> list[Message[Any]]:
    """What can be received within the time in which a dead process is noticed; nothing at the end."""
    waiting = asyncio.create_task(source.receive(1000))
    done, _ = await asyncio.wait([waiting], timeout=2.5)
    if not done:
        source.stop()
    return list(await waiting)


# -- forks


def _in_fork(report: int, transport: SQLiteTransport, path: Path) -> None:
    """In the child: no loop runs here, so drive one coroutine at a time by hand."""
    texts = []
    for attempt in (transport.publish([Outgoing("t", b"x")]), SQLiteTransport(path).connect()):
        try:
            asyncio.new_event_loop().run_until_complete(attempt)
            texts.append("no error")
        except (TransportError, ConnectError) as error:
            texts.append(str(error))
    os.write(report, "\n".join(texts).encode())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of any fork beside threads
async def test_a_forked_child_is_told_that_the_connection_is_not_its_own(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", b"a")
        (message,) = await get(source, 1)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            asyncio._set_running_loop(None)
            try:
                _in_fork(write, transport, path)
            finally:
                os._exit(0)
        os.close(write)
        await asyncio.to_thread(os.waitpid, pid, 0)
        used, opened = os.read(read, 10_000).decode().split("\n")
        os.close(read)
        assert f"was connected in process {os.getpid()} and is used in {pid}" in used
        assert "spawn or forkserver" in used
        assert f"it was forked from process {os.getpid()} while that had the database open" in opened
        assert not await source.settle([message], [])
