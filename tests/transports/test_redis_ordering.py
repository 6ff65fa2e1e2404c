"""Order by key on Redis: over processes that are killed and drained, beside hot keys, strangers and lost answers."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from sluiceway.errors import TransportError
from sluiceway.message import Message, Outgoing, Settlement
from sluiceway.transports.redis import RedisSource, RedisTransport
from tests.servers.redis import RedisServer
from tests.transports.redis_kit import bodies, connected, get, numbered, publish, redis_server, subscribe

__all__ = ["redis_server"]


@pytest.fixture(autouse=True)
def empty(redis_server: RedisServer) -> None:
    redis_server.ask("FLUSHALL")


async def ordered(transport: RedisTransport, *topics: str) -> RedisSource:
    return await subscribe(transport, *(topics or ("t",)), order_by="key")


def lanes(server: RedisServer) -> list[bytes]:
    """The names of all that keeps keys in order."""
    return sorted(name for name in server.ask("KEYS", "sluiceway:lane:*") if not name.endswith(b"#seen"))


async def nothing(source: RedisSource, seconds: float = 0.2) -> None:
    call = asyncio.create_task(source.receive(10))
    done, _ = await asyncio.wait([call], timeout=seconds)
    source.resize(0)
    assert await call == [], done
    source.resize(1000)


def check_ledger(text: str, dead: set[int]) -> dict[str, list[int]]:
    """Fails where a handler began before all earlier messages of its key had succeeded, or beside another of its key in
    a process that was not killed. Returns which messages of each key succeeded."""
    ended: dict[str, set[int]] = defaultdict(set)
    running: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        word, pid, key, body = line.split(" ")
        if word == "start":
            missing = set(range(int(body))) - ended[key]
            assert not missing, f"{line}: before {sorted(missing)}"
            assert key not in running or running[key][0] in dead, f"{line}: beside {running[key]}"
            running[key] = (int(pid), int(body))
        else:
            assert running.pop(key) == (int(pid), int(body))
            if word == "end":
                ended[key].add(int(body))
    return {key: sorted(numbers) for key, numbers in ended.items()}


async def test_keys_stay_in_order_over_processes_that_fail_and_drain_and_are_killed(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    ledger.touch()
    keys, each = [f"key-{number}" for number in range(8)], 60

    def worker() -> subprocess.Popen[bytes]:
        url = f"{redis_server.url()}?lease=1"
        return subprocess.Popen([sys.executable, "-m", "tests.transports.redis_order_worker", url, str(ledger)])

    processes = [worker(), worker()]
    killed: set[int] = set()

    async def until(count: int) -> None:
        deadline = time.monotonic() + 60
        while ledger.read_text().count("end ") < count:
            assert time.monotonic() < deadline, "it stands still"
            await asyncio.sleep(0.02)

    try:
        async with connected(redis_server) as transport:
            for number in range(each):
                await transport.publish([Outgoing("t", b"%d" % number, key) for key in keys])
            for share in (60, 160, 260):
                await until(share)
                victim = processes.pop(0)
                killed.add(victim.pid)
                victim.kill()
                victim.wait()
                processes.append(worker())
                await until(share + 50)
                leaving = processes.pop(0)
                leaving.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(leaving.wait, 30) == 0
                processes.append(worker())
            deadline = time.monotonic() + 60
            while check_ledger(ledger.read_text(), killed) != {key: list(range(each)) for key in keys}:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
        for process in processes:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 30) == 0
        assert redis_server.ask("XPENDING", "t", "g")[0] == 0
        assert lanes(redis_server) == []
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def test_other_keys_flow_past_a_long_lane_whose_head_awaits_its_retry(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await ordered(transport)
        await publish(transport, "t", *numbered(3000), key="hot")
        (failed,) = await source.receive(1)
        await source.settle([], [Settlement(failed, "retry", delay=1.0)])
        began = time.monotonic()
        await publish(transport, "t", *numbered(20), key="other")
        await publish(transport, "t", b"no key")
        got = await get(source, 21)
        assert time.monotonic() - began < 0.9
        assert bodies(got) == [*numbered(20), b"no key"]
        await source.settle(got, [])
        seen: list[Message[Any]] = []
        while len(seen) < 3000:
            got = await get(source, 1)
            seen += got
            await source.settle(got, [])
        assert bodies(seen) == numbered(3000)
        assert [seen[0].attempt, seen[1].attempt, seen[0].deliveries] == [2, 1, 2]
        await nothing(source)
        assert lanes(redis_server) == []


async def test_failures_are_counted_where_the_message_lies(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await ordered(transport)
        await publish(transport, "t", b"a", key="k")
        for counted, attempt in ((True, 1), (False, 2), (True, 2), (True, 3)):
            (message,) = await get(source, 1)
            assert (message.attempt, message.failures, message.suspect) == (attempt, attempt - 1, False)
            await source.settle([], [Settlement(message, "retry", counted=counted)])
        (message,) = await get(source, 1)
        assert redis_server.ask("EXISTS", "sluiceway:counts:{t}:g") == 1
        await source.settle([message], [])
        assert redis_server.ask("EXISTS", "sluiceway:counts:{t}:g") == 0


async def test_what_waits_in_a_lane_counts_as_backlog(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await ordered(transport)
        await publish(transport, "t", *numbered(5), key="k")
        (held,) = await source.receive(1)
        await source.settle([], [Settlement(held, "retry", delay=60)])
        await nothing(source)
        backlog = await source.backlog()
        assert backlog is not None
        assert backlog.messages == 5


async def test_a_source_without_an_order_in_the_same_group_blocks_nothing(redis_server: RedisServer) -> None:
    """It takes what waits in lanes as well; where it does, those behind go on."""
    async with connected(redis_server) as transport:
        source = await ordered(transport)
        await publish(transport, "t", *numbered(6), key="k")
        first, second, third = await get(source, 3)
        await source.settle([], [Settlement(first, "retry", delay=0.3)])
        await source.settle([], [Settlement(second, "park"), Settlement(third, "park")])
        other = await subscribe(transport, "t")
        taken = list(await other.receive(2))
        await other.settle(taken, [])
        left = {*numbered(6)} - {*bodies(taken)}
        async with asyncio.timeout(10):
            while left:
                got = await source.receive(10)
                left -= {*bodies(got)}
                await source.settle(got, [])
        assert redis_server.ask("XPENDING", "t", "g")[0] == 0
        assert lanes(redis_server) == []


async def test_entries_deleted_by_hand_hold_up_none_of_their_lane(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await ordered(transport)
        await publish(transport, "t", *numbered(5), key="k")
        messages = await get(source, 3)
        await source.settle([], [Settlement(message, "release") for message in messages])
        await source.settle([], [Settlement((await get(source, 1))[0], "retry", delay=0.3)])
        await nothing(source, 0.1)
        redis_server.ask("XDEL", "t", messages[0].token[1], messages[1].token[1])
        assert bodies(await get(source, 3)) == [b"2", b"3", b"4"]


async def test_a_deleted_group_leaves_no_lane_shut(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await ordered(transport)
        await publish(transport, "t", *numbered(4), key="k")
        messages = await get(source, 2)
        await source.settle([], [Settlement(messages[1], "park")])
        await nothing(source, 0.1)
        redis_server.ask("XGROUP", "DESTROY", "t", "g")
        assert bodies(await get(source, 4)) == numbered(4)


async def test_a_window_is_filled_in_few_receives(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await ordered(transport)
        await transport.publish([Outgoing("t", b"%d" % number, f"k{number % 300}") for number in range(1000)])
        got = [message for _ in range(5) for message in await source.receive(1000)]
        assert len(got) == 1000


async def test_an_entry_for_another_group_is_not_ours(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await ordered(transport)
        redis_server.ask("XADD", "t", "*", "body", "theirs", "sluiceway-group", "other", "sluiceway-key", "k")
        redis_server.ask("XADD", "t", "*", "body", "ours", "sluiceway-group", "g", "sluiceway-key", "k")
        redis_server.ask("XADD", "t", "*", "sluiceway-key", "no body, so no key")
        first, second = await get(source, 2)
        assert (first.body, first.key, second.key) == (b"ours", "k", None)
        assert redis_server.ask("XPENDING", "t", "g")[0] == 2


async def test_every_topic_gets_its_turn(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await ordered(transport, "a", "b")
        await publish(transport, "a", *numbered(100), key="k")
        await publish(transport, "b", b"b", key="k")
        seen: list[bytes] = []
        for _ in range(4):
            got = await get(source, 10)
            seen += bodies(got)
            await source.settle(got, [])
        assert b"b" in seen


async def test_lost_answers_and_dead_sources_break_no_order(redis_server: RedisServer) -> None:
    """Connections are cut and leases end while messages are received, settled and handed back."""
    chance = random.Random(7)
    async with connected(redis_server, lease=0.3) as transport:
        sources = [await ordered(transport) for _ in range(3)]
        keys = [f"k{number}" for number in range(5)]
        for number in range(40):
            await transport.publish([Outgoing("t", b"%d" % number, key) for key in keys])
        done: dict[str, set[int]] = {key: set() for key in keys}

        async def work(source: RedisSource) -> None:
            while any(len(numbers) < 40 for numbers in done.values()):
                call = asyncio.create_task(source.receive(4))
                await asyncio.wait([call], timeout=0.1)
                source.resize(0)
                messages = await call
                source.resize(1000)
                back: list[Settlement] = []
                acks: list[Message[Any]] = []
                shut: set[str] = set()
                for message in messages:
                    key = str(message.key)
                    if key in shut:
                        back.append(Settlement(message, "park"))
                    elif chance.random() < 0.2:
                        how = chance.choice(("retry", "release"))
                        back.append(Settlement(message, how, delay=chance.choice((0, 0.02))))  # type: ignore[arg-type]
                        shut.add(key)
                    else:
                        assert set(range(int(message.body))) <= done[key], (key, message.body)
                        done[key].add(int(message.body))
                        acks.append(message)
                for patience in range(100):
                    try:
                        await source.settle(acks, back)
                        break
                    except TransportError:
                        assert patience < 50
                        await asyncio.sleep(0.02)

        async def cut() -> None:
            for _ in range(10):
                await asyncio.sleep(0.15)
                await asyncio.to_thread(redis_server.ask, "CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")
                await asyncio.sleep(0.1)
                victim = chance.choice(sources).status().scopes
                await asyncio.to_thread(
                    redis_server.ask, "ZADD", "sluiceway:leases:{t}:g", "XX", "1", str(next(iter(victim)))
                )

        async with asyncio.timeout(40), asyncio.TaskGroup() as group:
            group.create_task(cut())
            for source in sources:
                group.create_task(work(source))
        assert all(numbers == set(range(40)) for numbers in done.values())
