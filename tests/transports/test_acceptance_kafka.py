"""The acceptance suite over Apache Kafka: a server of the tests' own, in which each test has its own names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import Broker
from tests.servers.kafka import Kafka
from tests.servers.proxy import Proxy
from tests.transports.kafka_kit import KafkaBroker


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kafka, Proxy]]:
    server = Kafka(tmp_path_factory.mktemp("kafka"))
    with Proxy(server.port) as proxy:
        server.advertised = proxy.port
        with server:
            yield server, proxy


@pytest.fixture
def broker(server: tuple[Kafka, Proxy]) -> Broker:
    return KafkaBroker(*server)
