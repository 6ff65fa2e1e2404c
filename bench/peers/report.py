"""The table, the JSON, and the section in docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.table import Table

from ..report import machine, write_between
from .measures import Row

START, END = "<!-- peers: python -m bench.peers --docs writes from here -->", "<!-- peers: to here -->"


def table(rows: Sequence[Row]) -> Table:
    """All rows, for a terminal."""
    shown = Table(title="Libraries over the same brokers", title_justify="left")
    shown.add_column("broker", no_wrap=True)
    shown.add_column("library", overflow="fold", ratio=2)
    for name in ("messages/s", "ours / theirs", "at least"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    shown.add_column("settings", overflow="fold", ratio=3)
    for row in rows:
        shown.add_row(*_cells(row), style="" if row.ok else "red")
    return shown


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a list of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(msgspec.to_builtins(rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_docs(rows: Sequence[Row], path: Path, rounds: int) -> None:
    """Put the rows between the markers of a page. Raises ValueError when it has none."""
    write_between(START, END, markdown(rows, rounds), path)


def markdown(rows: Sequence[Row], rounds: int) -> str:
    """When and where, and the rows as a table."""
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, medians of {rounds}, on {machine()}.",
        "",
        "| broker | library | messages/s | ours / theirs | at least | | settings |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    rate = "failed" if row.rate is None else f"{row.rate:,.0f}"
    verdict = "FAIL" if not row.ok else "" if row.floor is None else "ok"
    ratio = "" if row.ratio is None else f"{row.ratio:,.1f} ×"
    floor = "" if row.floor is None else f"{row.floor:g} ×"
    return row.broker, row.peer, rate, ratio, floor, verdict, row.settings
