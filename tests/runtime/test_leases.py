"""Leases are renewed from a thread, which costs nothing while nothing is held."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import Message, Pipeline
from sluiceway._runtime import leases

from .recording import Broker, bodies, running


class Renewals:
    """A renewer that notes what it renews."""

    def __init__(self) -> None:
        self.renewed: list[Sequence[Any]] = []

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        self.renewed.append(tokens)
        return ()

    def close(self) -> None: ...


def test_what_comes_after_a_long_rest_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread looks once when all has ended, and then not before something comes."""
    looks = 0

    def draw() -> float:
        nonlocal looks
        looks += threading.current_thread().name.endswith("leases")
        return 0.5

    monkeypatch.setattr(leases, "draw", draw)

    async def main() -> None:  # in real time: leases are renewed from a thread
        broker, renewals = Broker(*bodies(1)), Renewals()
        broker.lease, broker.renewer = 0.03, lambda: renewals
        go = asyncio.Event()

        async def handle(message: Message[bytes]) -> None:
            if message.id != "m1":
                await go.wait()

        async with running(Pipeline(broker.open, handle), broker):
            await broker.settled(1)
            await asyncio.sleep(0.1)  # more than long enough for that look
            before = looks
            await asyncio.sleep(0.2)  # some twenty thirds of the lease
            assert looks == before
            for number in (2, 3):
                broker.put(b"x")
                async with asyncio.timeout(5):
                    while [f"m{number}"] not in renewals.renewed:  # noqa: ASYNC110 # a thread says so
                        await asyncio.sleep(0.005)
                go.set()
                await broker.settled(number)
                go.clear()

    asyncio.run(main())


def test_a_pipeline_that_holds_nothing_stops_at_once() -> None:
    async def main() -> float:
        broker = Broker()
        broker.lease, broker.renewer = 60.0, Renewals
        async with running(Pipeline(broker.open, lambda message: None), broker):
            await broker.until(lambda: broker.source.receiving)
            began = time.monotonic()
        return time.monotonic() - began

    assert asyncio.run(main()) < 5
