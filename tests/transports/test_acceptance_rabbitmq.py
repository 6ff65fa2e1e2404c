"""The acceptance suite over RabbitMQ: a server of its own, with quorum queues."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import TESTS, Broker
from tests.servers.proxy import Proxy
from tests.transports.rabbitmq_kit import RabbitMQBroker, shared_server


@pytest.fixture
def broker() -> Iterator[Broker]:
    server = shared_server()
    with Proxy(server.port) as proxy:
        yield RabbitMQBroker(server, proxy)


# What AMQP does not say. `backlog` answers what it can: messages that are due, and no age before one was received.
_NOT_SAID = {
    "test_the_backlog_says_how_long_the_oldest_has_waited": "the age of a queue's head cannot be had without taking it",
    "test_the_backlog_counts_what_waits_for_its_retry_but_not_its_age": "all groups share the delay ladder",
}
for _name, _why in _NOT_SAID.items():
    globals()[_name] = pytest.mark.skip(reason=_why)(TESTS[_name])
