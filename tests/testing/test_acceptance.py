"""The acceptance suite as a third party uses it: it passes what is right, fails what is wrong, says what it showed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sluiceway.testing.acceptance import TESTS
from sluiceway.testing.acceptance.guarantees import GUARANTEES
from tests.testing.broken_transports import FAULTS

ROOT = Path(__file__).resolve().parents[2]

MODULE = """
import pytest
from sluiceway.source import Subscription
from sluiceway.testing.acceptance import *
from sluiceway.testing.acceptance import Broker
from {module} import {transport} as MyTransport

class Mine(Broker):
    name = "mine"
    virtual = True
    remote = {remote}

    def __init__(self):
        self.transport = MyTransport(max_payload=100_000)

    def client(self):
        return self.transport

    async def expire(self, source):
        self.transport.expire(source)

    async def die_holding(self, topic, group, count):
        source = await self.transport.subscribe(Subscription(topics=(topic,), group=group, window=count))
        await source.receive(count)
        self.transport.crash(source)

@pytest.fixture
def broker():
    return Mine()
"""

CONFTEST = """
import os
from pathlib import Path
from sluiceway.testing.acceptance.report import Report

def pytest_configure(config):
    config.pluginmanager.register(Report(Path("out/guarantees.json")))

def pytest_collection_modifyitems(items):
    only = os.environ.get("ONLY")
    items[:] = [item for item in items if not only or only in item.get_closest_marker("guarantee").args]
"""


def run(
    folder: Path, *options: str, broken: str = "", ini: str = "", ci: str = "", only: str = "", remote: bool = False
) -> tuple[str, int]:
    """What pytest says of a third party's module, and its exit code; with `only` the tests of that guarantee."""
    module = "tests.testing.broken_transports" if broken else "sluiceway.transports.memory"
    text = MODULE.format(module=module, transport=broken or "MemoryTransport", remote=remote)
    (folder / "test_mine.py").write_text(text)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        command, cwd=folder, env={**environment, "CI": ci, "ONLY": only, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr, done.returncode


@pytest.mark.parametrize(
    ("options", "ini"),
    [
        (["-p", "no:asyncio", "-p", "no:anyio", "-p", "no:xdist"], ""),
        (["-p", "no:xdist", "--strict-markers"], "asyncio_mode=strict"),
        (["-n", "2"], "asyncio_mode=auto"),
    ],
    ids=["no async plugin", "strict mode", "xdist"],
)
def test_a_third_partys_module_of_forty_lines_runs_the_suite(tmp_path: Path, options: list[str], ini: str) -> None:
    assert len(MODULE.splitlines()) <= 40
    said, code = run(tmp_path, *options, ini=ini, ci="1")
    assert code == 0, said
    assert re.search(r"^G8 +\d+$", said, re.MULTILINE)
    rows = json.loads((tmp_path / "out" / "guarantees.json").read_text())
    assert rows.keys() == {"mine"}
    assert set(rows["mine"]) == set(GUARANTEES)
    assert rows["mine"]["G8"]["shown"] > 5
    assert rows["mine"]["G11"]["not applicable"]["there is no server"] == 2


def test_assertions_of_the_suite_say_what_they_compared(tmp_path: Path) -> None:
    said, code = run(tmp_path, "-k", "how_many_are_held", broken="NeverAcks")
    assert code == 1
    assert re.search(r"assert 4 in \(1, None\)", said), said


def test_a_run_of_a_part_writes_no_row(tmp_path: Path) -> None:
    assert run(tmp_path, "-k", "retry")[1] == 0
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_failure_leaves_the_row_as_it_was(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "out" / "guarantees.json").read_text()
    assert run(tmp_path, broken="SuspectsNobody")[1] == 1
    assert (tmp_path / "out" / "guarantees.json").read_text() == before


@pytest.mark.parametrize(("ci", "remote", "code"), [("", True, 0), ("1", True, 1), ("1", False, 0)])
def test_in_ci_a_method_that_a_broker_with_a_server_lacks_fails_the_run(
    tmp_path: Path, ci: str, remote: bool, code: int
) -> None:
    said, found = run(tmp_path, "-k", "outlives_its_connections_and", "-rs", ci=ci, remote=remote)
    assert found == code, said
    assert ("the broker has no interrupt()" if remote else "n/a: there is no server") in said


@pytest.mark.parametrize("broken", FAULTS, ids=lambda broken: broken.__name__)
def test_the_tests_of_a_guarantee_fail_a_transport_that_breaks_it(tmp_path: Path, broken: type) -> None:
    said, code = run(tmp_path, "-p", "no:xdist", "--tb=no", broken=broken.__name__, only=FAULTS[broken])
    assert code == 1, said[-3000:]
    assert re.search(rf"^{FAULTS[broken]} +\d+ failed$", said, re.MULTILINE), said[-3000:]


def test_every_guarantee_has_a_test() -> None:
    marks = [mark for test in TESTS.values() for mark in getattr(test, "pytestmark", [])]
    assert {name for mark in marks if mark.name == "guarantee" for name in mark.args} == set(GUARANTEES)
