"""Servers that are none: each transport says within seconds what it found, without the password, and never hangs."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from sluiceway.app import open_transport
from sluiceway.errors import ConnectError
from tests.servers.server import free_port

SECRET = "hunter2"
URLS = {
    "redis": f"redis://:{SECRET}@%s",
    "nats": f"nats://ada:{SECRET}@%s",
    "rabbitmq": f"amqp://ada:{SECRET}@%s/?timeout=3",
}
MOST = 15.0  # seconds

pytestmark = pytest.mark.parametrize("url", list(URLS.values()), ids=list(URLS))


async def refused(url: str, where: str) -> str:
    """What `connect` says, which names the place and not the password."""
    transport = open_transport(url % where)
    began = time.monotonic()
    with pytest.raises(ConnectError) as caught:
        await asyncio.wait_for(transport.connect(), 2 * MOST)
    assert time.monotonic() - began < MOST
    await transport.aclose()
    text = str(caught.value)
    assert where.partition(":")[0] in text
    assert SECRET not in text
    return text


async def test_a_port_where_nobody_listens(url: str) -> None:
    port = free_port()
    assert f"127.0.0.1:{port}" in await refused(url, f"127.0.0.1:{port}")


async def test_a_host_that_has_no_address(url: str) -> None:
    await refused(url, "nowhere.invalid")


async def test_a_server_that_says_nothing(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connections wait in its backlog
        await refused(url, f"127.0.0.1:{listener.getsockname()[1]}")


async def test_a_server_that_speaks_something_else(url: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        await refused(url, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")


async def test_a_server_that_closes_at_once(url: str) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        await refused(url, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
