"""NATS: what a consumer does while nothing happens, and what it knows nevertheless."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluiceway.transports.nats import source as source_module
from tests.servers.nats import NATSServer
from tests.transports.nats_kit import bodies, connected, get, manager, numbered, publish, subscribe, until


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NATSServer]:
    monkeypatch.setattr(source_module, "POLL", 1.0)
    with NATSServer(tmp_path) as running:
        yield running


async def test_an_idle_consumer_hears_heartbeats_and_asks_nothing(server: NATSServer) -> None:
    async with connected(server, lease=1.0) as transport:
        source = await subscribe(transport, "t")
        waiting = asyncio.create_task(get(source, 1))
        await asyncio.sleep(2.5)  # the first look has been
        connection = transport._open
        asked, heard, moves = connection._asked, source._pulls._heard, source._pulls.moves
        await until(lambda: source._pulls._heard > heard + 2, "heartbeats come")
        assert (connection._asked, source._pulls.moves) == (asked, moves)
        await publish(transport, "t", b"x")
        assert bodies(await waiting) == [b"x"]


async def test_an_idle_consumer_knows_how_far_others_of_its_group_are(server: NATSServer) -> None:
    """It learns of that from heartbeats. So when the consumer is deleted, and only an idle process is left to make it
    anew, nothing is handled again that was settled when it last looked."""
    async with connected(server, lease=1.0) as idle, connected(server, lease=1.0) as busy:
        source, other = await subscribe(idle, "t"), await subscribe(busy, "t")
        waiting = asyncio.create_task(source.receive(1))
        await asyncio.sleep(2.5)  # the first look has been
        source.resize(0)
        assert not await waiting
        await publish(busy, "t", *numbered(5))
        messages = await get(other, 5)
        source.resize(1)
        waiting = asyncio.create_task(get(source, 1))
        await until(lambda: source._consumers[0].held == 5, "it sees that they are in hand")
        assert not await other.settle(messages, [])
        await until(lambda: source._consumers[0].floor == 5, "it sees that they are settled")
        await other.aclose()
        async with manager(server) as js:
            (info,) = await js.consumers_info("sluiceway")
            await js.delete_consumer("sluiceway", info.name)
        await until(lambda: "deleted" in str(source._pulls.trouble).lower() or waiting.done(), "it notices")
        await publish(busy, "t", b"new")
        assert bodies(await waiting) == [b"new"]


async def test_consumers_of_an_app_look_at_the_same_moments(server: NATSServer) -> None:
    async with connected(server) as transport:
        ends = []
        for _ in range(3):
            now = asyncio.get_running_loop().time()
            wait = transport._open.whole(4.0)
            assert 4.0 <= wait < 5.0
            ends.append((now + wait) % 1.0)
            await asyncio.sleep(0.05)
        assert max(ends) - min(ends) < 0.01 or max(ends) - min(ends) > 0.99
