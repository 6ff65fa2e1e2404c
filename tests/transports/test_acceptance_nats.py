"""The acceptance suite over NATS JetStream: a server of the tests' own, emptied before each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import Broker
from tests.servers.nats import NATSServer
from tests.servers.proxy import Proxy
from tests.transports.nats_kit import NATSBroker


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NATSServer]:
    with NATSServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def broker(server: NATSServer) -> Iterator[Broker]:
    with Proxy(server.port) as proxy:
        yield NATSBroker(server, proxy)
