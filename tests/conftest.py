"""What all tests share: `@pytest.mark.virtual_time` runs an async test in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from sluiceway.testing import VirtualClockLoop


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "virtual_time: runs in virtual time, where waiting takes no time")
    config.addinivalue_line("markers", "needs(*features): skipped on transports without one of these features")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop of an async test, and of its async fixtures."""
    if item.get_closest_marker("virtual_time") is not None:
        return {"virtual time": VirtualClockLoop}
    return {"real time": asyncio.new_event_loop}
