"""Which dead-letter topics there are, as the embedded brokers say it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sluiceway.message import Outgoing
from sluiceway.source import Subscription
from sluiceway.transport import Transport
from sluiceway.transports.memory import MemoryTransport
from sluiceway.transports.sqlite import SQLiteTransport


@pytest.fixture(params=["memory", "sqlite"])
async def transport(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Transport]:
    made: Transport = MemoryTransport() if request.param == "memory" else SQLiteTransport(tmp_path / "a.db")
    await made.connect()
    yield made
    await made.aclose()


async def asked(transport: Transport) -> list[str]:
    return list(await transport.dead_letter_topics())  # type: ignore[attr-defined]


async def test_topics_with_dead_letters_are_told_in_order_and_once(transport: Transport) -> None:
    assert await asked(transport) == []
    topics = ("orders.us.shop.dead", "orders.eu.shop.dead", "orders.eu.shop.dead", "orders.eu", "dead.ends")
    await transport.publish([Outgoing(topic, b"1") for topic in topics])
    assert await asked(transport) == ["orders.eu.shop.dead", "orders.us.shop.dead"]


async def test_those_that_a_group_reads_are_told_too(transport: Transport) -> None:
    reads = Subscription(topics=("orders.eu.shop.dead", "orders.#"), group="repair", window=10)
    await transport.ensure([reads], create=True)
    await transport.publish([Outgoing("orders.eu.shop.dead", b"1"), Outgoing("orders.eu", b"1")])
    assert await asked(transport) == ["orders.eu.shop.dead"]


async def test_those_whose_last_dead_letter_was_removed_are_not_told(transport: Transport) -> None:
    await transport.publish([Outgoing("a.shop.dead", b"1"), Outgoing("b.shop.dead", b"1")])
    await transport.remove([one async for one in transport.browse("a.shop.dead")])
    assert await asked(transport) == ["b.shop.dead"]
