"""The table, the JSON, and the figures in docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import apsw
import msgspec
from rich.table import Table
from rich.text import Text

from .pairs import Row

START, END = "<!-- figures: python -m bench --docs writes from here -->", "<!-- to here -->"


def table(rows: Sequence[Row]) -> Table:
    """All rows, for a terminal."""
    caption = "gc set: as the command line sets it. Ratio: ours / limit, or limit / ours where less is better."
    shown = Table(title="Sluiceway's benchmark", title_justify="left", caption=caption, caption_justify="left")
    shown.add_column("case", overflow="fold", ratio=1)
    for name in ("ours", "unit", "limit", "ratio", "at least", ""):
        shown.add_column(name, justify="left" if name in ("unit", "") else "right", no_wrap=True)
    for row in rows:
        case, *cells = _cells(row)
        style = "" if row.least is not None else "dim"
        shown.add_row(Text(case), *map(Text, cells), _verdict(row), style=style)
    return shown


def line(row: Row) -> Text:
    """One row, while the others are still measured."""
    case, rate, unit, _, ratio, least = _cells(row)
    text = f" {case}: {rate} {unit}"
    if ratio:
        text += f", ratio {ratio}" + (f" (at least {least})" if least else "")
    return Text.assemble(_verdict(row) or Text("    "), text)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a list of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(msgspec.to_builtins(rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_docs(rows: Sequence[Row], path: Path, rounds: int) -> None:
    """Put the rows between the markers of a page. Raises ValueError when it has none."""
    write_between(START, END, markdown(rows, rounds), path)


def write_between(start: str, end: str, text: str, path: Path) -> None:
    """Replace what stands between two markers of a page. Raises ValueError when it has them not."""
    before, found, rest = path.read_text(encoding="utf-8").partition(start)
    _, last, after = rest.partition(end)
    if not (found and last):
        raise ValueError(f"{path} has no markers {start} and {end}")
    path.write_text(f"{before}{start}\n\n{text}\n{end}{after}", encoding="utf-8")


def markdown(rows: Sequence[Row], rounds: int) -> str:
    """When and where, and the rows as a table."""
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, medians of {rounds}, on {machine()}.",
        "",
        "| case | ours | unit | limit | ratio | at least | |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    lines += [f"| {' | '.join(_cells(row))} | {_verdict(row).plain} |" for row in rows]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """What the figures depend on."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
                 platform.processor() or platform.machine())  # fmt: skip
    system = next((line.partition("=")[2].strip('"') for line in _lines("/etc/os-release") if "PRETTY_NAME" in line),
                  platform.platform())  # fmt: skip
    return (
        f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, {system}, Linux {platform.release()}, "
        f"SQLite {apsw.sqlite_lib_version()}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cells(row: Row) -> tuple[str, str, str, str, str, str]:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}" if row.ratio < 100 else "> 100"
    least = "" if row.least is None else f"{row.least:g}"
    return row.case, _number(row.rate), row.unit, _number(row.limit), ratio, least


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _verdict(row: Row) -> Text:
    if not row.ok:
        return Text("FAIL", style="bold red")
    return Text("ok" if row.least is not None else "", style="green")
