"""The acceptance suite over the broker in memory, in virtual time."""

from __future__ import annotations

import pytest

from sluiceway.source import Source, Subscription
from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import Broker
from sluiceway.transport import Transport
from sluiceway.transports.memory import MemorySource, MemoryTransport


class MemoryBroker(Broker):
    """In the same process, and in virtual time."""

    name = "memory"
    virtual = True
    remote = False

    def __init__(self) -> None:
        self._transport = MemoryTransport(max_payload=100_000)

    def client(self) -> Transport:
        return self._transport

    async def expire(self, source: Source) -> None:
        assert isinstance(source, MemorySource)
        self._transport.expire(source)

    async def die_holding(self, topic: str, group: str, count: int) -> None:
        source = await self._transport.subscribe(Subscription(topics=(topic,), group=group, window=count))
        assert len(await source.receive(count)) == count
        self._transport.crash(source)


@pytest.fixture
def broker() -> Broker:
    return MemoryBroker()
