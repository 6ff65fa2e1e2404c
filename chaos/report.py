"""The table, the JSON, and docs/reference/faults.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from bench.report import machine

from .cell import Row
from .faults import FAULTS

PORT = re.compile(r"127\.0\.0\.1:\d+")  # another one in each run
START, END = "<!-- rows: python -m chaos --docs writes from here -->", "<!-- to here -->"
COLUMNS = ("broker", "fault", "sent", "handled", "lost", "overtaken", "repeated", "recovered", "caught up")


def table(rows: Sequence[Row]) -> Table:
    """All rows, for a terminal."""
    caption = "repeated: of the most that the windows allow. recovered, caught up: seconds after the end of the fault."
    shown = Table(
        title="Sluiceway under faults", title_justify="left", caption=caption, caption_justify="left", expand=True
    )
    for name in (*COLUMNS, ""):
        shown.add_column(name, justify="left" if name in ("broker", "fault", "") else "right", no_wrap=True)
    shown.add_column("what the log said", overflow="ellipsis", no_wrap=True, ratio=1)
    for row in rows:
        said = row.error or (row.log[0] if row.log else "nothing")
        shown.add_row(*map(Text, cells(row)), _verdict(row), Text(said, style="" if row.ok else "red"))
    return shown


def line(row: Row) -> Text:
    """One row, while others still run."""
    text = f" {row.broker}, {row.fault}: {row.lost} lost of {row.sent}, {row.repeated} repeated"
    if row.recovered is not None:
        text += f", recovered after {row.recovered:g} s"
    return Text.assemble(_verdict(row), text, (f"; {row.error}" if row.error else "", "red"))


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a list of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [{**msgspec.to_builtins(row), "ok": row.ok} for row in rows]
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_docs(rows: Sequence[Row], path: Path, versions: Iterable[str]) -> None:
    """Put the rows between the markers of the page. Raises ValueError when it has none."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{path} has no markers {START} and {END}")
    path.write_text(f"{before}{START}\n\n{markdown(rows, versions)}\n{END}{after}", encoding="utf-8")


def markdown(rows: Sequence[Row], versions: Iterable[str]) -> str:
    """When and where, what the faults are, and the rows as a table for each broker."""
    found = {(row.broker, row.fault): _verdict(row).plain for row in rows}
    brokers = list(dict.fromkeys(broker for broker, _ in found))
    faults = [fault for fault in FAULTS if any(fault.name == name for _, name in found)]
    lines = [f"{datetime.now(UTC):%Y-%m-%d}, {', '.join(dict.fromkeys(versions))}, on {machine()}.", ""]
    lines += [f"| fault | what happens | {' | '.join(brokers)} |", f"| --- | --- |{' :---: |' * len(brokers)}"]
    for fault in faults:
        marks = [found.get((broker, fault.name), "–") for broker in brokers]
        lines += [f"| {fault.name} | {fault.what} | {' | '.join(marks)} |"]
    lines += ["", "–: a broker cannot have that fault."]
    for broker in brokers:
        lines += ["", f"### {broker}", "", f"| {' | '.join(COLUMNS[1:])} | | what the log said |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"]
        lines += [_line(row) for row in rows if row.broker == broker]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    told = [PORT.sub("127.0.0.1", one) for one in ([row.error] if row.error else row.log)]
    said = "<br>".join(one.replace("|", "\\|").replace("<", "&lt;") for one in told)
    return f"| {' | '.join(cells(row)[1:])} | {_verdict(row).plain} | {said or 'nothing'} |"


def cells(row: Row) -> tuple[str, ...]:
    deleted = f" ({row.deleted} deleted)" if row.deleted else ""
    repeated = f"{row.repeated} of {row.at_most}" if row.at_most else str(row.repeated)
    return (
        row.broker, row.fault, f"{row.sent:,}", f"{row.handled:,}{deleted}", f"{row.lost:,}",
        "" if row.overtaken is None else f"{row.overtaken:,}", repeated,
        _seconds(row.recovered), _seconds(row.caught_up),
    )  # fmt: skip


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _verdict(row: Row) -> Text:
    return Text("ok", style="green") if row.ok else Text("FAIL", style="bold red")
