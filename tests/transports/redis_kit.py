"""What the tests of the Redis transport share: the broker for the acceptance suite, and a few moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sluiceway.message import Message, Outgoing
from sluiceway.source import Subscription
from sluiceway.testing.acceptance import Broker
from sluiceway.testing.acceptance.brokers import NO_RAW_HEADERS
from sluiceway.transport import Transport
from sluiceway.transports.redis import RedisSource, RedisTransport
from tests.servers.redis import RedisServer

SOON = 20.0  # seconds after which what should come is said to be lost
LEASE = 0.5


class RedisBroker(Broker):
    """A server that all tests of a module share; each test finds it empty."""

    name = "redis"
    early = 0.002

    def __init__(self, server: RedisServer) -> None:
        self.server_ = server
        server.ask("FLUSHALL")

    def client(self) -> Transport:
        return RedisTransport.from_url(self.url())

    def url(self) -> str:
        return f"{self.server_.url()}?lease={LEASE}&max_payload=100000"

    async def publish_raw(self, topic: str, body: bytes, headers: Mapping[str, bytes] = NO_RAW_HEADERS) -> None:
        fields = [part for name, value in headers.items() for part in (name, value)]
        await asyncio.to_thread(self.server_.ask, "XADD", topic, "*", "body", body, *fields)

    async def interrupt(self) -> None:
        await asyncio.to_thread(self.server_.ask, "CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")

    async def restart(self) -> None:
        await asyncio.to_thread(self.server_.kill)
        await asyncio.to_thread(self.server_.start)

    async def held(self, topic: str, group: str) -> int:
        def count() -> int:
            with self.server_.client() as client:
                streams = (topic, f"sluiceway:retry:{{{topic}}}:{group}")
                consumers = [one for stream in streams for one in client.xinfo_consumers(stream, group)]
            return sum(one["pending"] for one in consumers if not one["name"].startswith(b"sluiceway:"))

        return await asyncio.to_thread(count)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@asynccontextmanager
async def connected(server: RedisServer, **options: Any) -> AsyncIterator[RedisTransport]:
    transport = RedisTransport(server.url(), **{"lease": LEASE, **options})
    await transport.connect()
    try:
        yield transport
    finally:
        await transport.aclose()


async def subscribe(transport: RedisTransport, *topics: str, group: str = "g", **options: Any) -> RedisSource:
    return await transport.subscribe(Subscription(topics=topics, group=group, **{"window": 1000, **options}))


async def publish(transport: RedisTransport, topic: str, *bodies: bytes, **fields: Any) -> None:
    await transport.publish([Outgoing(topic, body, **fields) for body in bodies])


async def get(source: RedisSource, count: int) -> list[Message[Any]]:
    messages: list[Message[Any]] = []
    async with asyncio.timeout(SOON):
        while len(messages) < count:
            messages += await source.receive(count - len(messages))
            await asyncio.sleep(0)  # a source that has stopped returns at once
    return messages


def bodies(messages: Any) -> list[bytes]:
    return [message.body for message in messages]


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]
