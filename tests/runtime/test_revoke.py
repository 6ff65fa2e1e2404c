"""Scopes that the broker takes away: what has not started is not ours to run any more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sluiceway import App, Message
from sluiceway.source import Subscription
from sluiceway.transports.memory import MemoryTransport

pytestmark = pytest.mark.virtual_time


class Revoking(MemoryTransport):
    """The in-memory broker, whose subscriptions the test can look at."""

    async def subscribe(self, subscription: Subscription) -> Any:
        self.subscription = subscription
        self.source = await super().subscribe(subscription)
        return self.source


async def test_of_a_scope_that_is_gone_nothing_more_is_started_and_another_consumer_has_it() -> None:
    transport = Revoking()
    app = App(transport)
    started: list[bytes] = []
    go = asyncio.Event()

    @app.consumer("t", concurrency=1, max_demand=3)
    async def slow(message: Message[bytes]) -> None:
        started.append(message.body)
        await go.wait()

    async with app.running() as manager:
        await app.publish_many("t", [b"a", b"b", b"c"])
        await asyncio.sleep(1)
        scopes = frozenset(message.scope for message in _held(manager))
        await transport.subscription.on_revoke(scopes, None)
        go.set()
        await asyncio.sleep(1)
        assert started == [b"a"]
        assert manager.stats()[0].held == 0


async def test_a_scope_that_is_taken_away_is_left_when_what_runs_has_ended_and_the_rest_is_back() -> None:
    transport = Revoking()
    app = App(transport)

    @app.consumer("t", concurrency=1, max_demand=3)
    async def slow(message: Message[bytes]) -> None:
        await asyncio.sleep(10)

    async with app.running() as manager:
        await app.publish_many("t", [b"a", b"b", b"c"])
        await asyncio.sleep(1)
        manager.pause("slow")
        scopes = frozenset(message.scope for message in _held(manager))
        before = asyncio.get_running_loop().time()
        await transport.subscription.on_revoke(scopes, 60.0)
        assert asyncio.get_running_loop().time() - before == pytest.approx(9)
        backlog = await manager.backlog("slow")
        assert backlog is not None
        assert (backlog.messages, manager.stats()[0].finished) == (2, 3)


async def test_a_scope_is_left_in_time_also_when_a_handler_is_too_slow() -> None:
    transport = Revoking()
    app = App(transport)

    @app.consumer("t")
    async def slow(message: Message[bytes]) -> None:
        await asyncio.sleep(100)

    async with app.running() as manager:
        await app.publish("t", b"a")
        await asyncio.sleep(1)
        before = asyncio.get_running_loop().time()
        await transport.subscription.on_revoke(frozenset(one.scope for one in _held(manager)), 5.0)
        assert asyncio.get_running_loop().time() - before == pytest.approx(5)


def _held(manager: Any) -> list[Message[Any]]:
    (running,) = manager._running.values()
    return list(running.supervisor._flow.settler.held)
