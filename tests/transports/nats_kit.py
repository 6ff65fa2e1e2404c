"""What the tests of the NATS transport share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import nats

from sluiceway.message import Message, Outgoing
from sluiceway.source import Source, Subscription
from sluiceway.testing.acceptance import Broker
from sluiceway.transports.nats import NATSSource, NATSTransport
from tests.servers.nats import NATSServer
from tests.servers.proxy import Proxy

SOON = 20.0  # seconds after which what should come is said to be lost


class NATSBroker(Broker):
    """One server for all tests, emptied before each, behind a proxy that can cut its connections."""

    name = "nats"
    topics = 2000

    def __init__(self, server: NATSServer, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy

    def client(self) -> NATSTransport:
        return NATSTransport(f"127.0.0.1:{self.proxy.port}", lease=0.5)

    def url(self) -> str:
        return f"{self.server.url()}?lease=0.5"

    async def open(self) -> None:
        await self.server.empty()

    async def publish_raw(self, topic: str, body: bytes, headers: Mapping[str, bytes] = {}) -> None:
        await self.server.publish(topic, body, headers)

    async def interrupt(self) -> None:
        await asyncio.to_thread(self.proxy.cut)

    async def restart(self) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)

    async def held(self, topic: str, group: str) -> int:
        async with manager(self.server) as js:
            infos = await js.consumers_info("sluiceway")
            return sum(info.num_ack_pending or 0 for info in infos if info.name.startswith(f"{group}-{topic}"))


@asynccontextmanager
async def manager(server: NATSServer) -> AsyncIterator[Any]:
    """nats-py's own view of the server."""
    client = await nats.connect(server.url())
    try:
        yield client.jetstream()
    finally:
        await client.close()


@asynccontextmanager
async def connected(server: NATSServer, **options: Any) -> AsyncIterator[NATSTransport]:
    transport = NATSTransport(f"127.0.0.1:{server.port}", **options)
    await transport.connect()
    try:
        yield transport
    finally:
        await transport.aclose()


async def subscribe(transport: NATSTransport, *topics: str, group: str = "g", **options: Any) -> NATSSource:
    return await transport.subscribe(Subscription(topics=topics, group=group, **{"window": 1000, **options}))


async def publish(transport: NATSTransport, topic: str, *bodies: bytes, **fields: Any) -> None:
    await transport.publish([Outgoing(topic, body, **fields) for body in bodies])


async def get(source: Source, count: int) -> list[Message[Any]]:
    messages: list[Message[Any]] = []
    async with asyncio.timeout(SOON):
        while len(messages) < count:
            messages += await source.receive(count - len(messages))
            await asyncio.sleep(0)  # a source that has stopped returns at once
    return messages


async def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def bodies(messages: Any) -> list[bytes]:
    return [message.body for message in messages]


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]
