"""The acceptance suite over NATS JetStream: a server of the tests' own, emptied before each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import nats
import pytest

from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import Broker
from sluiceway.transport import Transport
from sluiceway.transports.nats import NATSTransport
from tests.servers.nats import NATSServer


class NATSBroker(Broker):
    name = "nats"
    topics = 2000

    def __init__(self, server: NATSServer) -> None:
        self._server = server

    def client(self) -> Transport:
        return NATSTransport(f"127.0.0.1:{self._server.port}", lease=0.5)

    def url(self) -> str:
        return f"{self._server.url()}?lease=0.5"

    async def open(self) -> None:
        await self._server.empty()

    async def publish_raw(self, topic: str, body: bytes, headers: Mapping[str, bytes] = {}) -> None:  # noqa: B006
        await self._server.publish(topic, body, headers)

    async def restart(self) -> None:
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.start)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NATSServer]:
    with NATSServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def broker(server: NATSServer) -> Broker:
    return NATSBroker(server)
