"""The bench measures what it says, in rows that a program can read; that it is fast is not tested here."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.__main__ import CASES, main
from bench.child import ROOT, Job, MeasureFailed, measure
from bench.pairs import Case, Figure, Row, make_row, run_case
from bench.report import END, START, table, write_docs
from bench.watch import Watch
from sluiceway import App, Message
from sluiceway.telemetry import Received
from sluiceway.transports.memory import MemoryTransport

TINY = 0.001  # of the messages


def nothing() -> None:
    return


def test_the_ratio_is_the_median_of_the_ratios_of_the_pairs() -> None:
    pairs: list[Any] = [
        ({"rate": 100.0}, {"rate": 50.0}),
        ({"rate": 10.0}, {"rate": 9.0}),
        ({"rate": 200.0}, {"rate": 40.0}),
    ]
    row = make_row(Figure("a", least=0.4), pairs)
    assert (row.rate, row.limit, row.ratio, row.ok) == (40.0, 100.0, 0.5, True)
    assert not make_row(Figure("a", least=0.6), pairs).ok


def test_what_must_stay_below_a_bound_has_a_ratio_of_one_or_more_when_it_does() -> None:
    row = make_row(
        Figure("a", "µs", "p50", "bound", 30.0, 1.0),
        [(None, {"p50": 20.0}), (None, {"p50": 60.0}), (None, {"p50": 15.0})],
    )
    assert (row.rate, row.limit, row.ratio, row.ok) == (20.0, 30.0, 1.5, True)


def test_a_rise_is_what_ours_has_more_than_its_limit() -> None:
    figure = Figure("a", "MiB", "MiB", "rise", 10.0, 1.0)
    assert make_row(figure, [({"MiB": 30.0}, {"MiB": 50.0})]).ratio == 0.5
    assert make_row(figure, [({"MiB": 30.0}, {"MiB": 29.0})]).ok


def test_every_floor_has_a_row() -> None:
    floors = [figure.least for case in CASES for figure in case.figures if figure.least is not None]
    without_server = [0.24, 0.3, 0.5, 0.6, 0.65, 0.75, 0.8, 0.85, 0.9, 0.9, *[1.0] * 8, 1.8]
    of_brokers = [0.85, 0.95, 0.85, *[0.8] * 3, *[1.0] * 6 * 3]
    assert sorted(floors) == sorted([*without_server, *of_brokers])
    names = [figure.case for case in CASES for figure in case.figures]
    assert len(set(names)) == len(names)


def test_every_job_can_be_called_as_it_is_given() -> None:
    for case in CASES:
        for job in (case.ours, case.limit, case.prepare):
            if job is not None:
                module, _, name = job.call.partition(":")
                given = {**job.given, "scale": 1.0, **({"folder": "/tmp"} if case.folder else {})}
                given |= {"url": "redis://"} if case.server else {}
                inspect.signature(getattr(importlib.import_module(module), name)).bind(**given)


@pytest.mark.parametrize(
    "name",
    [
        "memory, one batcher of 100, gc set",
        "threads, sync no-op on 10, gc set",
        "SQLite, typed 200-byte JSON, gc set",
        "SQLite, two processes on one file, one core",
        "memory, idle: publish to settled, p50",
    ],
)
def test_a_case_can_be_measured(name: str) -> None:
    case = next(case for case in CASES if case.figures[0].case == name)
    outcome = run_case(case, 1, nothing, scale=TINY)
    assert outcome.error is None
    assert all(row.rate is not None and row.rate > 0 and row.ratio is not None for row in outcome.rows)


def test_a_measure_that_takes_too_long_is_ended_and_fails_its_rows() -> None:
    slow = Job("bench.threads:bare_pool", limit=1.0)
    with pytest.raises(MeasureFailed, match="took more than 1 s"):
        measure(slow, scale=1000)
    outcome = run_case(Case((Figure("slow"),), slow), 1, nothing, scale=1000)
    assert outcome.rows == (Row("slow", None, "messages/s", None, None, None, False),)


def test_a_measure_that_raises_says_why() -> None:
    with pytest.raises(MeasureFailed, match="unexpected keyword argument 'speed'"):
        measure(Job("bench.memory:bare", {"speed": 3}), scale=TINY)


def test_the_rows_are_written_as_json_and_shown_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "latest.json"
    code = main(["--only", "asyncio.queue", "--quick", "--rounds", "1", "--json", str(results)])
    (row,) = json.loads(results.read_text(encoding="utf-8"))
    assert list(row) == ["case", "rate", "unit", "limit", "ratio", "least", "ok"]
    assert code == 0
    assert row["ok"]
    assert "asyncio.Queue, 10 workers" in capsys.readouterr().out


def test_a_missed_floor_is_marked_in_the_table() -> None:
    out = StringIO()
    rows = [Row("fast", 2e6, "messages/s", 4e6, 0.5, 0.4, True), Row("slow", 3.25, "µs", None, None, 1.0, False)]
    Console(file=out, width=100).print(table(rows))
    lines = out.getvalue().splitlines()
    assert [("2,000,000" in line, "ok" in line) for line in lines if "fast" in line] == [(True, True)]
    assert any("slow" in line and "FAIL" in line for line in lines)


def test_a_name_that_fits_no_case_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no such case"]) == 2
    assert "--list shows them all" in capsys.readouterr().err


def test_the_figures_go_between_the_markers_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n", encoding="utf-8")
    write_docs([Row("fast", 2e6, "messages/s", 4e6, 0.5, 0.4, True)], page, 5)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert "| fast | 2,000,000 | messages/s | 4,000,000 | 0.50 | 0.4 | ok |" in text
    assert (text.startswith("before\n"), text.endswith("\nafter\n")) == (True, True)
    assert START in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


async def test_the_watch_sees_a_window_that_is_overrun() -> None:
    app = App(MemoryTransport())

    @app.consumer("t")
    async def consume(message: Message[bytes]) -> None:
        return

    async with app.running():
        watch = Watch(app, lambda: watch.window + 1)
        app.telemetry.emit(Received(consumer="consume", demand=1, count=1, held=1, window=1))
        with pytest.raises(AssertionError, match="G1: the broker counts"):
            watch.check()


@pytest.mark.slow
def test_ctrl_c_leaves_neither_processes_nor_files(tmp_path: Path) -> None:
    results = tmp_path / "latest.json"
    bench = subprocess.Popen(
        [sys.executable, "-m", "bench", "--only", "two processes on one file", "--json", str(results)],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": f"{ROOT}/src"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not any(tmp_path.glob("*/copy-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    started = _descendants(bench.pid)
    bench.send_signal(signal.SIGINT)
    assert bench.wait(timeout=10) == 130
    assert started
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert not list(tmp_path.iterdir())


def _descendants(pid: int) -> set[int]:
    found = {int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()}
    return found.union(*map(_descendants, found))
