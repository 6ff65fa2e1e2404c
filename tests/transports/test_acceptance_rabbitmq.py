"""The acceptance suite over RabbitMQ: a server of its own, with quorum queues."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import Broker
from tests.servers.proxy import Proxy
from tests.transports.rabbitmq_kit import RabbitMQBroker, shared_server


@pytest.fixture
def broker() -> Iterator[Broker]:
    server = shared_server()
    with Proxy(server.port) as proxy:
        yield RabbitMQBroker(server, proxy)
