"""RabbitMQ for tests: one server for the whole run, and names of its own for each test."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pika

from sluiceway.message import Message
from sluiceway.source import Source, Subscription
from sluiceway.testing.acceptance import Broker
from sluiceway.transport import Transport
from sluiceway.transports.rabbitmq import RabbitMQTransport
from tests.servers.proxy import Proxy
from tests.servers.rabbitmq import RabbitMQServer

SOON = 30.0  # seconds after which what should come is said to be lost


async def until(true: Callable[[], object], seconds: float = SOON) -> None:
    """Return when `true()` holds. Fails when that takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        await asyncio.sleep(0.01)


async def opened(transport: Transport, topic: str = "t", window: int = 1000) -> Source:
    """A source of a topic for the group `g`."""
    return await transport.subscribe(Subscription(topics=(topic,), group="g", window=window))


async def take(source: Source, count: int) -> list[Message[bytes]]:
    """As many messages as these. Fails when that takes too long."""
    found: list[Message[bytes]] = []
    async with asyncio.timeout(SOON):
        while len(found) < count:
            found += await source.receive(count - len(found))
    return found


@cache
def shared_server() -> RabbitMQServer:
    """The server that tests share; a start takes seconds. It ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="sluiceway-rabbitmq-"))
    server = RabbitMQServer(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    server.start()
    return server


class RabbitMQBroker(Broker):
    """All names of a test begin with an exchange of its own, and are deleted after it."""

    name = "rabbitmq"
    moment = 0.3
    step = 0.2
    late = 10.0
    topics = 1_000
    tells_age = False  # the head of a queue cannot be looked at without taking it
    pushes_ahead = True  # a prefetch cannot change, and who ends a consumer hands its turn to another process
    tells_delayed = False  # all groups share the delay queues

    def __init__(self, server: RabbitMQServer, proxy: Proxy | None = None) -> None:
        self.server = server
        self.proxy = proxy
        self.exchange = f"t{uuid.uuid4().hex[:10]}"

    def url(self, port: int | None = None) -> str:
        port = self.server.port if port is None else port
        return f"amqp://guest:guest@127.0.0.1:{port}/%2F?exchange={self.exchange}&max_payload=100000"

    def client(self) -> Transport:
        """One whose connections go through the proxy, where there is one."""
        return RabbitMQTransport(self.url(None if self.proxy is None else self.proxy.port))

    async def open(self) -> None:
        await self.held("none", "none")  # the first answer takes a second, in which a test would be over

    async def interrupt(self) -> None:
        assert self.proxy is not None
        await asyncio.to_thread(self.proxy.cut)

    async def expire(self, source: Source) -> None:
        """It has no lease: what it holds is over when its connection is."""
        epoch = source.status().scopes
        await self.interrupt()
        await until(lambda: source.status().scopes != epoch)

    async def restart(self) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)

    async def held(self, topic: str, group: str) -> int:
        return await asyncio.to_thread(self.server.held, f"{self.exchange}|{group}|{topic}")

    async def publish_raw(self, topic: str, body: bytes, headers: Mapping[str, bytes] = {}) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self.server.url()))
        properties = pika.BasicProperties(headers=dict(headers) or None)
        connection.channel().basic_publish(self.exchange, topic, body, properties)
        connection.close()
