"""What all tests share. `@pytest.mark.virtual_time` is the test kit's own, by its pytest plugin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.servers.certificates import Certificates

GUARANTEES = Path(__file__).parent / "results" / "guarantees.json"


def pytest_configure(config: pytest.Config) -> None:
    from sluiceway.testing.acceptance.report import Report

    config.pluginmanager.register(Report(GUARANTEES), "guarantees")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        shows = item.get_closest_marker("guarantee")
        if shows is not None and shows.kwargs.get("slow"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates for servers with TLS and their clients, made once."""
    from tests.servers.certificates import Certificates

    return Certificates(tmp_path_factory.mktemp("certificates"))
