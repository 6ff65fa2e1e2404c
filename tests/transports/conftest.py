"""The brokers that the contract suite runs against. What they lack, by `transport.features`, is skipped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from sluiceway.testing import VirtualClockLoop
from tests.transports.kit import Broker, Kit, MemoryBroker, SQLiteBroker

BROKERS: dict[str, tuple[Callable[[Path], Broker], bool]] = {  # and whether it lives in virtual time
    "memory": (MemoryBroker, True),
    "sqlite": (SQLiteBroker, False),
}


@pytest.fixture(params=sorted(BROKERS))
async def kit(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kit]:
    """One broker, with one transport connected to it."""
    make, virtual = BROKERS[request.param]
    loop = asyncio.get_running_loop()
    real = loop.external() if isinstance(loop, VirtualClockLoop) and not virtual else nullcontext()
    with real:
        kit = Kit(make(tmp_path))
        await kit.client()
        needs = request.node.get_closest_marker("needs")
        for name in needs.args if needs else ():
            if getattr(kit.transport.features, name) in (False, "none"):
                await kit.aclose()
                pytest.skip(f"{request.param} has no {name}")
        try:
            yield kit
        finally:
            await kit.aclose()
