"""Redis: what the server refuses says what is in the way, and what to change; and when it takes it again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sluiceway.errors import ConnectError, PublishError, TransportError
from sluiceway.message import Settlement
from sluiceway.source import Subscription
from sluiceway.transports.redis import RedisSource, RedisTransport
from tests.servers.redis import RedisServer
from tests.servers.server import free_port
from tests.transports.redis_kit import SOON, bodies, connected, get, publish, redis_server, subscribe

__all__ = ["redis_server"]


async def state(source: RedisSource, wanted: str) -> None:
    async with asyncio.timeout(SOON):
        while source.status().state != wanted:  # noqa: ASYNC110 # nobody tells
            await asyncio.sleep(0.005)


async def browse(transport: RedisTransport) -> None:
    async for _ in transport.browse("taken"):
        pass


def ensure(transport: RedisTransport, *, create: bool) -> Awaitable[object]:
    return transport.ensure([Subscription(topics=("taken",), group="g", window=1)], create=create)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda transport: publish(transport, "taken", b"x"), "refused 'taken'"),
        (lambda transport: publish(transport, "taken", b"x", delay=60.0), "refused 'taken'"),
        (lambda transport: subscribe(transport, "taken"), "make group 'g' on 'taken'"),
        (lambda transport: ensure(transport, create=True), "make group 'g' on 'taken'"),
        (lambda transport: ensure(transport, create=False), "tell of the groups on 'taken'"),
        (browse, "XRANGE"),
    ],
    ids=["publish", "publish with a delay", "subscribe", "ensure", "ensure, make nothing", "browse"],
)
async def test_a_topic_whose_name_another_key_has_says_so(
    redis_server: RedisServer, use: Callable[[RedisTransport], Awaitable[object]], says: str
) -> None:
    redis_server.ask("FLUSHALL")
    redis_server.ask("SET", "taken", "x")
    async with connected(redis_server) as transport:
        with pytest.raises(TransportError, match=f"{says}.*WRONGTYPE.*it is no stream: rename the topic or that key"):
            await use(transport)
    assert redis_server.ask("KEYS", "*due*") == []


async def test_a_database_that_is_not_there_says_so(redis_server: RedisServer) -> None:
    with pytest.raises(ConnectError, match=r"DB index is out of range; .*the number of a database"):
        await RedisTransport(f"{redis_server.url()}/99").connect()


async def test_a_consumer_of_a_server_that_becomes_a_replica_says_so_and_goes_on_when_it_is_none(
    tmp_path: Path,
) -> None:
    """Its connections are left, since the address may lead to the new primary by now."""
    with RedisServer(tmp_path / "a") as server, RedisServer(tmp_path / "b") as other:
        async with connected(server) as transport:
            source = await subscribe(transport, "t")
            await publish(transport, "t", b"1", b"2")
            first, second = await get(source, 2)
            waiting = asyncio.create_task(get(source, 1))
            await state(source, "running")
            before = source._reception.line._wire
            server.ask("REPLICAOF", "127.0.0.1", str(other.port))
            await state(source, "connecting")
            assert "give the URL of its primary" in str(source.status().error)
            with pytest.raises(TransportError, match=r"READONLY.* give the URL of its primary"):
                await source.settle([], [Settlement(first, "retry")])
            with pytest.raises(PublishError, match=r"READONLY.* give the URL of its primary"):
                await publish(transport, "t", b"3")
            with pytest.raises(ConnectError, match="is a replica and takes no writes"):
                await RedisTransport(server.url()).connect()
            server.ask("REPLICAOF", "NO", "ONE")
            await state(source, "running")
            assert source._reception.line._wire is not before
            await publish(transport, "t", b"3")
            assert bodies(await waiting)[0] in (b"1", b"2", b"3")  # it may have got nothing of the old ones
            await source.settle([second], [])


async def test_an_idle_consumer_says_when_its_server_is_gone_and_when_it_is_back(tmp_path: Path) -> None:
    """Not only when something comes, or it looks around again, which takes a third of the lease."""
    with RedisServer(tmp_path) as server:
        async with connected(server, lease=60.0) as transport:
            source = await subscribe(transport, "t")
            waiting = asyncio.create_task(get(source, 1))
            await state(source, "running")
            for _ in range(2):
                await asyncio.to_thread(server.kill)
                await asyncio.wait_for(state(source, "connecting"), 1)
                await asyncio.to_thread(server.start)
                await asyncio.wait_for(state(source, "running"), 10)
                assert source.status().error is None
            await publish(transport, "t", b"x")
            assert bodies(await waiting) == [b"x"]


async def test_a_cluster_is_refused_also_by_what_it_answers_where_info_is_not_allowed(tmp_path: Path) -> None:
    with RedisServer(tmp_path, {"cluster-enabled": "yes", "cluster-port": str(free_port())}) as server:
        server.ask("CLUSTER", "ADDSLOTSRANGE", "0", "8000")  # another node has the rest
        with pytest.raises(ConnectError, match="is a node of a cluster; Sluiceway needs a server"):
            await RedisTransport(server.url()).connect()
        with pytest.raises(ConnectError, match="is a node of a cluster; Sluiceway needs a server"):
            await RedisTransport(f"{server.url()}/1").connect()
        server.ask("ACL", "SETUSER", "ada", "on", ">secret", "~*", "&*", "+@all", "-info")
        transport = RedisTransport(server.url().replace("//", "//ada:secret@"))
        await transport.connect()
        with pytest.raises(PublishError, match=r"CLUSTERDOWN.*it is a node of a cluster"):
            await publish(transport, "t", b"x")
        await transport.aclose()
