"""Connections that break while something is under way: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sluiceway.errors import PublishError, TransportError
from sluiceway.message import Outgoing, Settlement
from sluiceway.transports.redis import RedisTransport
from tests.servers.proxy import Proxy
from tests.servers.redis import RedisServer
from tests.transports.redis_kit import bodies, connected, get, numbered, publish, redis_server, subscribe

__all__ = ["redis_server"]


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    redis_server.ask("FLUSHALL")
    with Proxy(redis_server.port) as proxy:
        yield proxy


def through(proxy: Proxy, lease: float = 30.0) -> RedisTransport:
    return RedisTransport(f"redis://127.0.0.1:{proxy.port}", lease=lease)


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_read_whose_answer_was_lost_is_received_again_untouched(
    redis_server: RedisServer, proxy: Proxy
) -> None:
    transport = through(proxy)
    await transport.connect()
    source = await subscribe(transport, "t")
    call = asyncio.create_task(source.receive(100))
    await asyncio.sleep(0.1)
    proxy.stall("replies")
    async with connected(redis_server) as other:
        await publish(other, "t", *numbered(5))
    await until(lambda: redis_server.ask("XPENDING", "t", "g")[0] > 0)
    proxy.cut()
    proxy.heal()
    messages = list(await asyncio.wait_for(call, 10))
    messages += await get(source, 5 - len(messages))
    assert bodies(messages) == numbered(5)
    assert all((one.attempt, one.deliveries, one.suspect) == (1, 1, False) for one in messages)
    assert not await source.settle(messages, [])
    await transport.aclose()


async def test_a_settle_whose_answer_was_lost_is_carried_out_once(redis_server: RedisServer, proxy: Proxy) -> None:
    """Released, then received by the same source again: the second try must not release it once more."""
    transport = through(proxy)
    await transport.connect()
    source = await subscribe(transport, "t")
    await publish(transport, "t", *numbered(3))
    freed, failed, sent = await get(source, 3)
    others = [
        Settlement(freed, "release"),
        Settlement(failed, "retry", delay=0.2),
        Settlement(sent, "ack", outputs=(Outgoing("out", b"x"), Outgoing("out", b"y", delay=0.1))),
    ]
    proxy.stall("replies")
    settling = asyncio.create_task(source.settle([], others))
    await until(lambda: redis_server.ask("XLEN", "out") == 1)
    proxy.cut()
    with pytest.raises(TransportError):
        await settling
    proxy.heal()
    again = await get(source, 1)
    assert bodies(again) == [b"0"]
    assert not await source.settle([], others)
    assert not await source.settle(again, [])
    (retried,) = await get(source, 1)
    assert (retried.body, retried.attempt) == (b"1", 2)
    outputs = await subscribe(transport, "out")
    assert sorted(bodies(await get(outputs, 2))) == [b"x", b"y"]
    call = asyncio.create_task(outputs.receive(10))
    await asyncio.sleep(0.3)
    outputs.stop()
    assert await call == []
    await transport.aclose()


async def test_a_publish_that_was_not_confirmed_says_so(redis_server: RedisServer, proxy: Proxy) -> None:
    transport = through(proxy)
    await transport.connect()
    messages = [Outgoing("t", b"%d" % number) for number in range(2500)]
    proxy.stall("replies")
    publishing = asyncio.create_task(transport.publish(messages))
    await until(lambda: redis_server.ask("XLEN", "t") == 1000)
    proxy.cut()
    with pytest.raises(PublishError, match=r"^2500 of 2500 messages are not confirmed as published: ") as caught:
        await publishing
    assert list(caught.value.failed) == messages
    assert redis_server.ask("XLEN", "t") == 1000  # no more than a chunk is on the way at a time
    proxy.heal()
    await transport.publish(messages[1000:])
    assert redis_server.ask("XLEN", "t") == 2500
    await transport.aclose()


async def test_a_server_that_stands_still_is_waited_for(redis_server: RedisServer, proxy: Proxy) -> None:
    async with connected(redis_server, lease=5.0) as transport:
        source = await subscribe(transport, "t")
        call = asyncio.create_task(source.receive(100))
        await asyncio.sleep(0.1)
        redis_server.pause()
        publishing = asyncio.create_task(publish(transport, "t", *numbered(3)))
        await asyncio.sleep(0.5)
        redis_server.resume()
        await publishing
        messages = list(await asyncio.wait_for(call, 10))
        messages += await get(source, 3 - len(messages))
        assert bodies(messages) == numbered(3)


@pytest.mark.parametrize("waits", [0.001, 0.01, 0.05])
async def test_stopping_when_the_server_is_out_of_reach_ends_promptly_and_loses_nothing(
    redis_server: RedisServer, proxy: Proxy, waits: float
) -> None:
    transport = through(proxy, lease=1.0)
    await transport.connect()
    source = await subscribe(transport, "t")
    call = asyncio.create_task(source.receive(100))
    await asyncio.sleep(waits)
    proxy.refuse()
    proxy.cut()
    source.stop()
    got = await asyncio.wait_for(call, 5)
    async with connected(redis_server, lease=1.0) as other:
        await publish(other, "t", b"a")
        rest = await get(await subscribe(other, "t"), 1 - len(got))
        assert bodies([*got, *rest]) == [b"a"]
    proxy.heal()
    await transport.aclose()


async def test_cancelling_a_receive_loses_nothing(redis_server: RedisServer) -> None:
    redis_server.ask("FLUSHALL")
    async with connected(redis_server, lease=30.0) as transport:
        source = await subscribe(transport, "t")
        seen: list[bytes] = []
        for number in range(30):
            call = asyncio.create_task(source.receive(3))
            publishing = asyncio.create_task(publish(transport, "t", b"%d" % number))
            await asyncio.sleep(0.0002 * (number % 10))
            call.cancel()
            await publishing
            try:
                messages = await call
            except asyncio.CancelledError:
                continue
            seen += bodies(messages)
            await source.settle(messages, [])
        while len(seen) < 30:
            messages = await get(source, 1)
            assert messages[0].attempt == 1
            seen += bodies(messages)
            await source.settle(messages, [])
        assert sorted(seen, key=int) == numbered(30)


@pytest.mark.parametrize("moment", ["while it waits", "while it connects"])
async def test_stopping_when_the_network_stands_still_ends_promptly(
    redis_server: RedisServer, proxy: Proxy, moment: str
) -> None:
    transport = through(proxy)
    await transport.connect()
    source = await subscribe(transport, "t")
    if moment == "while it connects":
        proxy.stall()
    call = asyncio.create_task(source.receive(100))
    await asyncio.sleep(0.2)
    proxy.stall()
    began = time.monotonic()
    source.stop()
    assert list(await asyncio.wait_for(call, 10)) == []
    assert time.monotonic() - began < 2
    proxy.heal()
    await transport.aclose()


async def test_a_server_that_wants_replicas_and_has_none_takes_nothing_until_one_is_there(tmp_path: Path) -> None:
    with RedisServer(make_folder(tmp_path, "primary"), {"min-replicas-to-write": "1"}) as primary:
        async with connected(primary) as transport:
            with pytest.raises(PublishError, match="NOREPLICAS") as caught:
                await publish(transport, "t", b"a", b"b")
            assert len(caught.value.failed) == 2
            with RedisServer(make_folder(tmp_path, "replica"), {"replicaof": f"127.0.0.1 {primary.port}"}):
                deadline = time.monotonic() + 15
                while b"min_slaves_good_slaves:1" not in primary.ask("INFO", "replication"):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)
                await publish(transport, "t", b"c")
                source = await subscribe(transport, "t")
                assert bodies(await get(source, 1)) == [b"c"]
                assert not await transport.ensure([], create=True)
                primary.ask("CONFIG", "SET", "min-replicas-to-write", "0")
                (finding,) = await transport.ensure([], create=True)
                assert finding.text.endswith("set `min-replicas-to-write 1`")


def make_folder(path: Path, name: str) -> Path:
    (path / name).mkdir()
    return path / name


async def test_a_server_that_was_away_for_longer_than_a_lease_takes_nothing_from_those_that_live(
    tmp_path: Path,
) -> None:
    server = RedisServer(tmp_path)
    with server:
        async with connected(server, lease=3.0) as transport:
            source, other = await subscribe(transport, "t"), await subscribe(transport, "t")
            await publish(transport, "t", *numbered(3))
            messages = await get(source, 3)
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(3.2)
            await asyncio.to_thread(server.start)
            call = asyncio.create_task(other.receive(10))
            assert source.renewer is not None
            renewer = await asyncio.to_thread(source.renewer)
            deadline = time.monotonic() + 6
            while time.monotonic() < deadline:
                await asyncio.sleep(0.5)
                assert not call.done()
                assert not await asyncio.to_thread(renewer.renew, [message.token for message in messages])
            await asyncio.to_thread(renewer.close)
            assert not await source.settle(messages, [])
            other.stop()
            assert list(await call) == []


async def test_the_bells_of_one_topic_end_no_retries_of_another(redis_server: RedisServer) -> None:
    """Entries of two streams may have the same id."""
    redis_server.ask("FLUSHALL")
    async with connected(redis_server, lease=30.0) as transport:
        source = await subscribe(transport, "a", "b")
        call = asyncio.create_task(source.receive(100))
        await asyncio.sleep(0.2)
        with redis_server.client() as client:
            pipe = client.pipeline(transaction=True)
            pipe.xadd("sluiceway:retry:{a}:g", {"bell": "1"}, id="9999999999999-1")
            pipe.xadd("sluiceway:retry:{b}:g", {"body": "kept"}, id="9999999999999-1")
            pipe.execute()
        messages = list(await asyncio.wait_for(call, 10))
        assert bodies(messages) == [b"kept"]
        await asyncio.sleep(0.2)
        call = asyncio.create_task(source.receive(100))
        await asyncio.sleep(0.3)
        assert redis_server.ask("XLEN", "sluiceway:retry:{b}:g") == 1
        assert redis_server.ask("XLEN", "sluiceway:retry:{a}:g") == 0
        source.stop()
        assert not await call
        assert not await source.settle([], [Settlement(messages[0], "release")])
