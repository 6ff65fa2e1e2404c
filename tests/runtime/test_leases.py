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


def test_after_a_renewal_that_failed_the_next_is_soon_and_later_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    wait = threading.Event.wait

    def waited(event: threading.Event, timeout: float | None = None) -> bool:
        if timeout is not None and threading.current_thread().name.endswith("leases"):
            pauses.append(timeout)
            timeout = 0.001
        return wait(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", waited)
    monkeypatch.setattr(leases, "draw", lambda: 1.0)

    class Flaky(Renewals):
        fourth = threading.Event()

        def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
            super().renew(tokens)
            if len(self.renewed) == 1:
                raise ConnectionError("out of reach")
            if len(self.renewed) == 4:
                self.fourth.set()
            return ()

    async def main() -> None:
        broker, renewals = Broker(*bodies(1)), Flaky()
        broker.lease, broker.renewer = 30.0, lambda: renewals

        async def handle(message: Message[bytes]) -> None:
            await asyncio.to_thread(renewals.fourth.wait, 10)

        async with running(Pipeline(broker.open, handle), broker):
            await broker.settled(1)

    asyncio.run(main())
    assert pauses[:4] == [10.0, 1.0, 10.0, 10.0]
