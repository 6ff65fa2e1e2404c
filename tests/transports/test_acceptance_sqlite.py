"""The acceptance suite over SQLite: a file, which other processes use too."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluiceway.testing.acceptance import *  # noqa: F403  # the tests
from sluiceway.testing.acceptance import Broker
from sluiceway.transport import Transport
from sluiceway.transports.sqlite import SQLiteTransport


class SQLiteBroker(Broker):
    name = "sqlite"
    remote = False

    def __init__(self, folder: Path) -> None:
        self._path = folder / "acceptance.db"

    def client(self) -> Transport:
        return SQLiteTransport(self._path, lease=0.5, max_payload=100_000)

    def url(self) -> str:
        return f"sqlite:///{self._path}?lease=0.5&max_payload=100000"


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return SQLiteBroker(tmp_path)
