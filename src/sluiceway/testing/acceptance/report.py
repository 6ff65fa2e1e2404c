"""The table of guarantees and transports: what was shown, what does not apply and why. A pytest plugin.

A project registers it in its `conftest.py`, and has the table at the end of a run and, when asked for, in a file:

    def pytest_configure(config):
        config.pluginmanager.register(Report(Path("guarantees.json")))
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from . import TESTS
from .guarantees import GUARANTEES

PROPERTY = "guarantee"
NOT_APPLICABLE = "Skipped: n/a: "

Cell = dict[str, Any]
"""What one transport shows of one guarantee: tests `shown`; `failed`, `skipped` and `not applicable` by reason."""


class Report:
    """Collects what the tests marked with `guarantee` showed; works under pytest-xdist.

    A test that is skipped, and not because it does not apply, has shown nothing: where the variable CI is set, that
    makes the run fail. `path` is a JSON file with a row per transport. A run that ran every test of the suite over a
    transport, none of which failed or was skipped, writes the row of that transport anew and leaves the others.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._cells: dict[str, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
        self._tests: dict[str, set[str]] = defaultdict(set)
        self._worker = False

    def pytest_configure(self, config: pytest.Config) -> None:
        self._worker = hasattr(config, "workerinput")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        mark = item.get_closest_marker("guarantee")
        if mark is not None:
            name = getattr(item, "originalname", item.name)
            report.user_properties.append((PROPERTY, json.dumps([_transport_of(item), name, *mark.args])))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            outcome = _outcome(report)
            if name != PROPERTY or outcome is None:
                continue
            transport, test, *guarantees = json.loads(str(value))
            self._tests[transport].add(test)
            for one in guarantees:
                self._cells[transport][one].append(outcome)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._worker:
            return
        rows = self.rows()
        if os.environ.get("CI") and any("skipped" in cell for row in rows.values() for cell in row.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        whole = {name: row for name, row in rows.items() if self._is_whole(name, row)}
        if self._path is not None and whole:
            known = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**known, **whole}, indent=1, sort_keys=True)
            self._path.write_text(text + "\n", encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._cells:
            terminalreporter.section("guarantees: tests that show each")
            for line in table(self.rows()):
                terminalreporter.write_line(line)

    def rows(self) -> dict[str, dict[str, Cell]]:
        """What was seen, by transport and guarantee."""
        return {
            transport: {name: _cell(outcomes) for name, outcomes in sorted(cells.items())}
            for transport, cells in sorted(self._cells.items())
        }

    def _is_whole(self, transport: str, row: Mapping[str, Cell]) -> bool:
        failed = any("failed" in cell or "skipped" in cell for cell in row.values())
        return not failed and TESTS.keys() <= self._tests[transport]


def table(rows: Mapping[str, Mapping[str, Cell]]) -> Iterable[str]:
    """The lines of a table for a terminal."""
    yield " " * 10 + "".join(f"{name:>14}" for name in rows)
    for guarantee in GUARANTEES:
        yield f"{guarantee:<10}" + "".join(f"{_short(row.get(guarantee)):>14}" for row in rows.values())


def _short(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    bad = [f"{sum(cell[name].values())} {name}" for name in ("failed", "skipped") if name in cell]
    return ", ".join(bad) or str(cell.get("shown") or "n/a")


def _cell(outcomes: Iterable[tuple[str, str]]) -> Cell:
    cell: Cell = {}
    for (kind, why), count in sorted(Counter(outcomes).items()):
        if kind == "shown":
            cell["shown"] = count
        else:
            cell.setdefault(kind, {})[why] = count
    return cell


def _outcome(report: pytest.TestReport) -> tuple[str, str] | None:
    """What a report says and why; None when it says nothing, like that of a setup that went well."""
    if report.failed:
        return "failed", report.nodeid.rpartition("::")[2]
    if report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        if why.startswith(NOT_APPLICABLE):
            return "not applicable", why.removeprefix(NOT_APPLICABLE)
        return "skipped", why.removeprefix("Skipped: ")
    return ("shown", "") if report.when == "call" else None


def _transport_of(item: pytest.Item) -> str:
    """The name of the test's broker; where it could not be made, what the module's name ends with."""
    broker = getattr(item, "funcargs", {}).get("broker")
    return getattr(broker, "name", "") or str(item.path.stem).rpartition("_")[2]
