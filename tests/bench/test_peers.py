"""What compares libraries says which versions and settings it measured, and goes on when one cannot be measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.child import ROOT, MeasureFailed
from bench.peers import table
from bench.peers.__main__ import main
from bench.peers.environments import python_of
from bench.peers.measures import PROGRAMS, Row, compared, failed, row
from bench.peers.report import END, START, write_docs
from bench.peers.table import PEERS, Peer
from bench.servers import server
from tests.servers.server import find


def nothing() -> None:
    return


def test_every_peer_has_a_program_pinned_versions_and_settings() -> None:
    for peer in PEERS:
        assert (PROGRAMS / f"with_{peer.library}.py").exists()
        assert peer.settings
        pins = table.PINS.get(peer.library, ())
        assert all("==" in pin for pin in pins)
        assert pins or peer.library == "sluiceway"
    assert len({(peer.broker, peer.name) for peer in PEERS}) == len(PEERS)


@pytest.mark.parametrize("batch", [False, True])
def test_a_program_is_measured_in_as_many_messages_as_it_takes_in_the_time(batch: bool, tmp_path: Path) -> None:
    find("redis-server")
    steps: list[int] = []
    with server("redis", tmp_path) as url:
        found = row(Peer("sluiceway", "redis", "none", batch), url, 2, lambda: steps.append(1), scale=0.01)
    assert found.error is None
    assert found.rate is not None
    assert found.rate > 500
    assert found.count % 100 == 0
    assert len(steps) == 2


def test_a_program_that_fails_makes_a_row_that_says_why() -> None:
    found = row(Peer("sluiceway", "redis", "none"), "redis://127.0.0.1:1", 1, nothing)
    assert found.rate is None
    assert found.error is not None
    assert "Sluiceway over redis ended with 1" in found.error
    assert "cannot reach redis://127.0.0.1:1" in found.error


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.PINS, "arq", (str(tmp_path / "missing.whl"),))
    with pytest.raises(MeasureFailed, match=r"cannot make arq's environment in .*missing\.whl"):
        python_of("arq", tmp_path)
    assert python_of("sluiceway", tmp_path) == sys.executable


def test_the_rows_go_into_the_json_and_between_the_markers_of_the_page(tmp_path: Path) -> None:
    find("redis-server")
    results = tmp_path / "peers.json"
    arguments = ["--only", "sluiceway, batches of 100 over redis", "--quick", "--rounds", "1", "--json", str(results)]
    assert main(arguments) == 0
    (one,) = json.loads(results.read_text(encoding="utf-8"))
    assert (one["broker"], one["peer"], one["error"]) == ("redis", "Sluiceway, batches of 100", None)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n", encoding="utf-8")
    rows = [
        Row(broker="nats", peer="a 1.0", rate=1234.5, settings="fast", ratio=4.25, floor=4.0),
        Row(broker="nats", peer="b 2.0", rate=None, settings="slow", error="why"),
    ]
    write_docs(rows, page, 3)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert "| nats | a 1.0 | 1,234 | 4.2 × | 4 × | ok | fast |\n| nats | b 2.0 | failed |  |  | FAIL | slow |\n" in text
    assert START in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_each_library_is_compared_with_ours_over_its_broker_and_with_its_kind_of_handler() -> None:
    peers = [
        Peer("sluiceway", "redis", "s"), Peer("sluiceway", "redis", "s", batch=True),
        Peer("arq", "redis", "s", floor=25), Peer("arq", "redis", "s", batch=True, floor=4), Peer("arq", "nats", "s"),
    ]  # fmt: skip
    rates = [50_000.0, 80_000.0, 2_500.0, 20_000.0, 1.0]
    rows = [
        Row(broker=peer.broker, peer=peer.name, rate=rate, settings="s", floor=peer.floor)
        for peer, rate in zip(peers, rates, strict=True)
    ]
    found = compared(peers, rows)
    assert [row.ratio for row in found] == [None, None, 20.0, 4.0, None]
    assert [row.ok for row in found] == [True, True, False, True, True], "20 is less than 25, 4 is enough"


def test_a_floor_without_a_ratio_is_missed() -> None:
    peers = [Peer("sluiceway", "redis", "s"), Peer("arq", "redis", "s", floor=25)]
    rows = [failed(peers[0], "it hung"), Row(broker="redis", peer="arq", rate=10.0, settings="s", floor=25)]
    assert [row.ok for row in compared(peers, rows)] == [False, False]


def test_floors_stand_where_they_must() -> None:
    assert {peer.broker: peer.floor for peer in PEERS if peer.floor} == {"redis": 25, "nats": 3, "rabbitmq": 4}


def test_a_name_that_fits_nothing_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no such library"]) == 2
    assert "no library and broker have 'no such library'" in capsys.readouterr().err
