"""What all tests share. `@pytest.mark.virtual_time` is the test kit's own, by its pytest plugin."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*features): skipped on transports without one of these features")
