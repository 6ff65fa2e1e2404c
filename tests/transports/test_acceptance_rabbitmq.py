"""The acceptance suite over RabbitMQ: a server of its own, with quorum queues."""

from __future__ import annotations

import pytest

from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import Broker
from tests.transports.rabbitmq_kit import RabbitMQBroker, shared_server


@pytest.fixture
def broker() -> Broker:
    return RabbitMQBroker(shared_server())
