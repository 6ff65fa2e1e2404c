"""The demo: it runs to its end, counts right, says so when a number is wrong, and leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluiceway import App

duckdb = pytest.importorskip("duckdb")
pytest.importorskip("matplotlib")

from examples.flights import audit as auditing  # noqa: E402
from examples.flights.publish import ROWS as ALL  # noqa: E402
from examples.flights.publish import chosen, read_rows  # noqa: E402
from examples.flights.warehouse import read  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ROWS = 8_000

pytestmark = [pytest.mark.crash, pytest.mark.slow]


def start(out: Path, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The demo in a process group of its own, so that whatever it leaves behind can be found."""
    command = [sys.executable, str(ROOT / "examples" / "flights"), "--out", str(out), "--rows", str(ROWS), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """What it said; everything it started is killed when it does not end."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return said


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, str, int]]:
    """One run: its folder, exit code, words and process group. The folder's name needs quoting in a URL and in SQL."""
    out = tmp_path_factory.mktemp("a year's flights %41")
    process = start(out, "--rate", "4000", cwd=out)
    said = finish(process, 120)
    yield out, process.returncode, said, process.pid
    if has_processes(process.pid):
        os.killpg(process.pid, signal.SIGKILL)


def test_the_demo_ends_well_and_loses_nothing_although_a_worker_is_killed(demo: tuple[Path, int, str, int]) -> None:
    _, code, said, _ = demo
    words = " ".join(said.split())
    assert code == 0, said
    assert "SIGKILL for worker 1" in words
    assert f"published {ROWS:,}" in words
    assert f"handled {ROWS:,} each counted once" in words
    assert "lost 0 " in words
    assert "cancelled: never departed" in words
    assert "all 10 checks against the CSV are right" in words


def test_the_demo_leaves_a_picture_and_a_page_that_needs_nothing_else(demo: tuple[Path, int, str, int]) -> None:
    out, _, said, _ = demo
    assert str(out / "flights.html") in said
    assert str(out / "delays.png") in said
    assert (out / "delays.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "flights.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "JetBlue" in page
    assert "http" not in page


def test_the_demo_leaves_no_process_behind(demo: tuple[Path, int, str, int]) -> None:
    assert not has_processes(demo[3])


async def test_the_audit_sees_a_lost_a_changed_and_a_misplaced_row(demo: tuple[Path, int, str, int]) -> None:
    out, _, _, _ = demo
    async with App("sqlite://" + "/" + str(out / "run" / "broker.db").replace("%", "%25")) as app:
        dead = [letter async for letter in app.transport.browse("flights.departed.default.dead")]

    expected = auditing.expect(ROWS)

    def found(change: str) -> auditing.Figures:
        with read(out / "run" / "warehouse") as db:
            auditing.load_dead(db, dead)
            auditing.load_source(db, ROWS, out / "scratch.csv")
            db.execute(change)
            return auditing.audit(db, published=ROWS, expected=expected, left=0, killed_at=time.time())

    some = "(SELECT max(id) FROM flights)"
    assert found("SELECT 1").wrong == []
    lost = found(f"DELETE FROM deliveries WHERE id = {some}")
    assert lost.lost == 1
    assert "lost: rows of the CSV that are nowhere" in [check.name for check in lost.wrong]
    changed = found(f"UPDATE deliveries SET arr_delay = arr_delay + 1 WHERE id = {some}")
    assert changed.lost == 0
    assert "flights, delays, air time and distance per airline" in [check.name for check in changed.wrong]
    misplaced = found(f"UPDATE deliveries SET target = 'incomplete' WHERE id = {some}")
    differs = "rows that differ from the CSV in any field, or are in the wrong place"
    assert differs in [check.name for check in misplaced.wrong]
    twice = found(f"INSERT INTO deliveries SELECT * REPLACE ('other' AS id) FROM deliveries WHERE id = {some}")
    assert "rows that the CSV does not have" in [check.name for check in twice.wrong]


def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    process = start(tmp_path, "--rate", "200", cwd=tmp_path)
    deadline = time.monotonic() + 30
    while process.poll() is None and not list(tmp_path.glob("run/warehouse/*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    said = finish(process, 30)
    assert process.returncode == 130, said
    assert "no process was left behind" in said
    assert "Traceback" not in said
    assert not has_processes(process.pid)


def test_a_folder_that_cannot_be_used_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way", encoding="utf-8")
    process = start(tmp_path, cwd=tmp_path)
    said = finish(process, 30)
    assert process.returncode == 1
    assert "cannot use the folder" in said
    assert "Traceback" not in said


def test_a_smaller_set_is_spread_over_the_whole_year() -> None:
    some = [number for number, kept in enumerate(chosen(1_000), 1) if kept]
    assert len(some) == 1_000
    assert max(after - before for before, after in itertools.pairwise(some)) <= ALL // 1_000 + 1
    assert all(chosen(ALL))
    assert [row["row"] for row in read_rows(10)] == [number for number, kept in enumerate(chosen(10), 1) if kept]
    assert json.dumps(next(read_rows(10)))
