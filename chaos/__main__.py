"""`python -m chaos`: every broker through every fault; shows the matrix and writes the rows; exit 1 when one fails."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .broker import Broker
from .brokers import BROKERS
from .cell import Row, run_cell
from .faults import FAULTS, Fault
from .report import line, table, write_docs, write_json
from .site import ROOT

RESULTS = ROOT / "chaos" / "results" / "latest.json"
DOCS = ROOT / "docs" / "reference" / "faults.md"
WIDTH = 160  # of the table in a file


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a row is not ok, 2 for wrong usage, 130 after Ctrl-C."""
    options = _parse(arguments)
    chosen = choose(options.only)
    if not chosen:
        print(f"no cell has {options.only!r} in its name; --list shows them all", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{make.name}, {fault.name}: {fault.what}" for make, faults in chosen for fault in faults))
        return 0
    rows: list[Row] = []
    versions: list[str] = []
    skipped: list[str] = []
    try:
        run_all(chosen, rows, versions, skipped, options.keep)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table(rows))
    write_json(rows, options.json)
    if options.docs and not skipped:
        write_docs(rows, DOCS, versions)
    for text in skipped:
        print(f"left out: {text}", file=sys.stderr)
    failed = [row for row in rows if not row.ok]
    print(f"{len(rows)} cells, {len(failed)} failed; {options.json}")
    return 1 if failed or (options.docs and skipped) else 0


def choose(only: str) -> list[tuple[type[Broker], list[Fault]]]:
    """The brokers and the faults that each can have and whose name, with the broker's, has `only` in it."""
    wanted = only.lower()
    found = []
    for make in BROKERS:
        faults = [one for one in FAULTS if one.fits(make) and wanted in f"{make.name}, {one.name}".lower()]
        if faults:
            found.append((make, faults))
    return found


def run_all(
    chosen: Sequence[tuple[type[Broker], Sequence[Fault]]], rows: list[Row], versions: list[str], skipped: list[str],
    keep: Path | None,
) -> None:  # fmt: skip
    """Run the cells one after the other, and show how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2)
    with progress:
        task = progress.add_task("", total=sum(len(faults) for _, faults in chosen))
        for make, faults in chosen:
            try:
                with TemporaryDirectory(prefix="sluiceway-chaos-") as folder, make(Path(folder)) as broker:
                    versions.append(broker.version())
                    for fault in faults:
                        progress.update(task, description=f"{make.name}, {fault.name}")
                        rows.append(run_cell(broker, fault, keep=keep))
                        progress.console.print(line(rows[-1]), highlight=False, soft_wrap=True)
                        progress.advance(task)
            except pytest.skip.Exception as missing:
                skipped.append(f"{make.name}: {missing}")
                progress.advance(task, len(faults))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m chaos",
        description="Every broker through every fault; docs/reference/faults.md says what each means.",
        epilog="example: make chaos ARGS='--only redis'",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells with TEXT in 'broker, fault'")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH", help="where the rows go")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep log and ledger of each cell that fails there")
    parser.add_argument("--docs", action="store_true", help="put the rows into docs/reference/faults.md")
    parser.add_argument("--list", action="store_true", help="only show the cells")
    options = parser.parse_args(arguments)
    if options.docs and options.only:
        parser.error("--docs needs all rows: leave --only out")
    return options


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
