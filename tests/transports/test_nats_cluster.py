"""NATS: clusters. Three servers on loopback, with all streams on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sluiceway.errors import PublishError, TransportError
from sluiceway.message import Settlement
from sluiceway.transports.nats import NATSTransport
from tests.servers.nats import NATSServer
from tests.servers.server import free_port
from tests.transports.nats_kit import bodies, get, numbered, publish, subscribe


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[NATSServer]]:
    ports = [free_port() for _ in range(3)]
    routes = [f"nats://127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                NATSServer(
                    tmp_path / str(port),
                    {
                        "server_name": f"n{port}",
                        "cluster": {"name": "c", "listen": f"127.0.0.1:{port}", "routes": routes},
                    },
                )
            )
            for port in ports
        ]


async def insist(transport: NATSTransport, *some: bytes) -> None:
    """Publish as a program would that must not lose anything: again when it is not confirmed."""
    async with asyncio.timeout(40):
        for body in some:
            while True:
                try:
                    await publish(transport, "t", body)
                    break
                except PublishError:
                    await asyncio.sleep(0.2)


async def test_the_death_of_the_server_that_we_are_connected_to_loses_nothing(servers: list[NATSServer]) -> None:
    transport = NATSTransport([f"127.0.0.1:{server.port}" for server in servers], replicas=3, lease=3.0)
    await transport.connect()  # waits for the cluster's first leader
    await insist(transport, *numbered(20))
    source = await subscribe(transport, "t")
    messages = await get(source, 10)
    assert not await source.settle(messages[:5], [])
    assert not await source.settle([], [Settlement(messages[5], "retry")])
    client = transport._open._client
    assert client is not None
    assert client.connected_url is not None
    await asyncio.to_thread(next(one for one in servers if one.port == client.connected_url.port).kill)
    publishing = asyncio.create_task(insist(transport, *numbered(30)[20:]))
    handled = set(bodies(messages[:5]))
    async with asyncio.timeout(60):
        while len(handled) < 30:
            some = await source.receive(100)
            try:
                await source.settle(some, [])
            except TransportError:
                await asyncio.sleep(0.2)
                continue  # they come again
            handled |= set(bodies(some))
    await publishing
    assert source.status().state == "running"
    await transport.aclose()


async def test_more_replicas_than_there_are_servers_are_refused(servers: list[NATSServer]) -> None:
    transport = NATSTransport([f"127.0.0.1:{server.port}" for server in servers], replicas=5)
    await transport.connect()
    with pytest.raises(PublishError, match=r"cannot make stream 'sluiceway': .*lower replicas, or add servers"):
        await publish(transport, "t", b"x")
    await transport.aclose()
