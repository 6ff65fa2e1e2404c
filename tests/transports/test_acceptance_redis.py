"""The acceptance suite over Redis."""

from __future__ import annotations

import pytest

from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import Broker
from tests.servers.redis import RedisServer
from tests.transports.redis_kit import RedisBroker, redis_server

__all__ = ["redis_server"]


@pytest.fixture
def broker(redis_server: RedisServer) -> Broker:
    return RedisBroker(redis_server)
