"""The matrix can fail: what is lost, repeated, dead or never comes again is seen, and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import apsw
import pytest
from rich.console import Console

from chaos.__main__ import choose, main
from chaos.brokers import BROKERS, SQLite
from chaos.cell import Row, run_cell
from chaos.faults import FAULTS, Damage, Fault
from chaos.ledger import Book, Ledger
from chaos.report import END, START, table, write_docs
from chaos.site import ROOT, Site, Stuck

GOOD = Row(
    broker="redis", fault="cut", sent=1_200, handled=1_200, repeated=7, at_most=40, recovered=0.5, caught_up=0.7,
    log=["the connection was lost; trying again in # s"],
)  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"lost": 1},
        {"dead": 1},
        {"left": 1},
        {"repeated": 41},
        {"overtaken": 1},
        {"recovered": None},
        {"error": "it hung"},
    ],
)
def test_a_row_is_not_ok_when_anything_is_wrong(bad: dict[str, object]) -> None:
    assert GOOD.ok
    changed = Row(**{name: getattr(GOOD, name) for name in GOOD.__struct_fields__} | bad)  # type: ignore[arg-type]
    assert not changed.ok


def test_the_book_knows_what_was_sent_handled_and_repeated(tmp_path: Path) -> None:
    book, ledger = Book(tmp_path / "ledger"), Ledger(str(tmp_path / "ledger"))
    for n in (0, 1, 2, 3):
        ledger.note("offer", n)
    for n in (0, 1, 2):
        ledger.note("accept", n)
    ledger.note("refuse", what="PublishError")
    for n in (0, 0, 1, 1, 3):
        ledger.note("start", n)
        ledger.note("end", n)
    ledger.note("offer", 1)  # again, since nobody heard of the first
    book.read()
    assert (set(book.accepted), book.missing(), book.refused["PublishError"]) == ({0, 1, 2}, {2}, 1)
    assert book.repeated() == 1, "0 was; 1 was offered twice"
    assert book.new_since(0.0) is not None
    assert book.new_since(time.monotonic()) is None
    assert book.caught_up(time.monotonic()) == float("inf"), "2 is yet to come"
    ledger.note("end", 2)
    book.read()
    assert book.caught_up(time.monotonic()) == book.ended[2]
    book.close()


def test_a_failure_on_purpose_is_no_repetition_and_what_comes_more_often_is(tmp_path: Path) -> None:
    book, ledger = Book(tmp_path / "ledger"), Ledger(str(tmp_path / "ledger"))
    for event in ("offer", "accept", "start", "fail", "start", "end"):
        ledger.note(event, 0)
    book.read()
    assert (book.repeated(), book.running[os.getpid()], book.missing()) == (0, 0, set())
    for event in ("start", "fail"):
        ledger.note(event, 0)
    book.read()
    assert book.repeated() == 1
    book.close()


@pytest.mark.parametrize(
    ("events", "overtaken"),
    [
        ("start 0, end 0, start 2, end 2, start 4, end 4", 0),
        ("start 0, start 1, end 1, end 0, start 2, end 2", 0),  # another key
        ("start 0, fail 0, start 0, end 0, start 2, end 2", 0),
        ("start 0, end 0, start 2, end 2, start 0, end 0", 0),  # it came again
        ("start 0, start 2, end 0, end 2", 1),
        ("start 0, fail 0, start 2, end 2, start 0, end 0", 1),
        ("start 2, end 2, start 0, end 0, start 4, end 4", 1),
        ("start 4, end 4, start 2, end 2, start 0, end 0", 2),
        ("offer 0, start 2, end 2, start 0, end 0", 0),  # nobody knows when 0 was accepted
    ],
)
def test_what_overtakes_an_earlier_message_of_its_key_is_seen(tmp_path: Path, events: str, overtaken: int) -> None:
    book, ledger = Book(tmp_path / "ledger"), Ledger(str(tmp_path / "ledger"))
    for event, n in (one.split() for one in ("offer 0, offer 1, offer 2, offer 4, " + events).split(", ")):
        ledger.note(event, int(n))
    book.read()
    assert book.overtaken(lambda n: "odd" if n % 2 else "even") == overtaken
    book.close()


def test_every_fault_has_a_broker_and_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert not [fault.name for fault in FAULTS if not any(map(fault.fits, BROKERS))]


@pytest.fixture
def sqlite(tmp_path: Path) -> SQLite:
    return SQLite(tmp_path)


def steal(site: Site) -> Damage:
    """Delete what waits behind the broker's back."""
    for worker in site.workers:
        site.broker.freeze(worker.pid)
    site.wait(1.0)
    assert isinstance(site.broker, SQLite)
    db = apsw.Connection(str(site.broker.path))
    db.execute("DELETE FROM queue WHERE topic = ? AND state <> 2", [site.topic])
    db.close()
    for worker in site.workers:
        worker.signal(signal.SIGCONT)
    return Damage(2, time.monotonic())


def ruin(site: Site) -> Damage:
    site.workers[0].signal(signal.SIGTERM)
    site.wait(10.0)
    return Damage(0, time.monotonic())


def miss(site: Site) -> Damage:
    raise Stuck("the fault did not take hold: nothing was there")


@pytest.mark.slow
def test_what_is_lost_is_seen(sqlite: SQLite) -> None:
    with sqlite:
        row = run_cell(sqlite, Fault("steal", "", steal, lambda _: True), patience=3.0)
    assert row.lost > 20
    assert row.sent == row.handled + row.lost
    assert row.error == "not within 3 s: all that was sent is handled"
    assert not row.ok


@pytest.mark.slow
def test_a_worker_that_ends_by_itself_is_seen(sqlite: SQLite) -> None:
    with sqlite:
        row = run_cell(sqlite, Fault("ruin", "", ruin, lambda _: True))
    assert row.error is not None
    assert row.error.startswith("a worker ended by itself with exit code 0")


@pytest.mark.slow
def test_a_fault_that_did_not_take_hold_proves_nothing(sqlite: SQLite) -> None:
    with sqlite:
        row = run_cell(sqlite, Fault("miss", "", miss, lambda _: True))
    assert row.error == "the fault did not take hold: nothing was there"
    assert not row.ok


def test_cells_are_chosen_by_the_names_of_broker_and_fault() -> None:
    ((make, (fault,)),) = choose("SQLite, kill")
    assert (make.name, fault.name) == ("sqlite", "kill worker")
    assert [make for make, _ in choose("")] == list(BROKERS)


def test_a_name_that_fits_no_cell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no such cell"]) == 2
    assert "--list shows them all" in capsys.readouterr().err


def test_the_cells_are_listed_with_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "sqlite", "--list"]) == 0
    assert "sqlite, kill worker: a worker is killed with SIGKILL" in capsys.readouterr().out


def test_a_failed_row_is_marked_in_the_table_with_its_error() -> None:
    out = StringIO()
    bad = Row(broker="nats", fault="kill", sent=10, handled=9, lost=1, error="not within 15 s")
    Console(file=out, width=160).print(table([GOOD, bad]))
    lines = out.getvalue().splitlines()
    assert [("1,200" in line, "7 of 40" in line, "ok" in line) for line in lines if "redis" in line] == [(True,) * 3]
    assert any("nats" in line and "FAIL" in line and "not within 15 s" in line for line in lines)


def test_the_rows_go_between_the_markers_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n", encoding="utf-8")
    bad = Row(broker="nats", fault="kill", sent=10, handled=9, lost=1, overtaken=2, error="not within 15 s")
    write_docs([GOOD, bad], page, ["Redis 7"])
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert "| cut | 1,200 | 1,200 | 0 |  | 7 of 40 | 0.5 s | 0.7 s | ok | the connection was lost" in text
    assert "| kill | 10 | 9 | 1 | 2 | 0 |  |  | FAIL | not within 15 s |" in text
    assert "| fault | what happens | redis | nats |\n" in text
    assert "and started again after 1 s | – | FAIL |\n" in text
    assert "by RST and by FIN | ok | – |\n" in text
    assert "Redis 7" in text
    assert (text.startswith("before\n"), text.endswith("\nafter\n")) == (True, True)
    assert START in (ROOT / "docs" / "reference" / "faults.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_ctrl_c_leaves_neither_processes_nor_files(tmp_path: Path) -> None:
    results, folder = tmp_path / "latest.json", tmp_path / "folder"
    folder.mkdir()
    chaos = subprocess.Popen(
        [sys.executable, "-m", "chaos", "--only", "sqlite, stop worker", "--json", str(results)],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": f"{ROOT}/src"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while len(_descendants(chaos.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    started = _descendants(chaos.pid)
    chaos.send_signal(signal.SIGINT)
    assert chaos.wait(timeout=15) == 130
    assert len(started) == 3
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert not list(folder.iterdir())
    assert not results.exists()


@pytest.mark.slow
def test_the_rows_are_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "latest.json"
    assert main(["--only", "sqlite, kill worker", "--json", str(results)]) == 0
    (row,) = json.loads(results.read_text(encoding="utf-8"))
    assert (row["broker"], row["fault"], row["lost"], row["ok"]) == ("sqlite", "kill worker", 0, True)
    assert row["sent"] == row["handled"] > 100
    assert "1 cells, 0 failed" in capsys.readouterr().out


def _descendants(pid: int) -> set[int]:
    found = {int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()}
    return found.union(*map(_descendants, found))
