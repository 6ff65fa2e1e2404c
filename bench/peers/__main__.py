"""`python -m bench.peers`: measure, show the table, write the rows; exit 1 when one fails or misses its floor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from ..child import ROOT, MeasureFailed
from ..front import progress, run, show
from ..report import machine
from ..servers import server
from .environments import python_of
from .measures import Row, compared, failed, row
from .report import table, write_docs, write_json
from .table import PEERS, Peer

RESULTS = ROOT / "bench" / "results" / "peers.json"
DOCS = ROOT / "docs" / "benchmarks.md"
QUICK = 0.1  # of the messages


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a row is not ok, 2 for wrong usage, 130 after Ctrl-C."""
    options = _parse(arguments)
    only = options.only.lower()
    chosen = [peer for peer in PEERS if only in f"{peer.name} over {peer.broker}".lower()]
    if not chosen:
        print(f"no library and broker have {options.only!r} in their names", file=sys.stderr)
        return 2
    try:
        rows = measure_all(chosen, options.rounds, QUICK if options.quick else 1.0)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    show(table(rows))
    write_json(rows, options.json)
    if options.docs:
        write_docs(rows, DOCS, options.rounds)
    missed = [one for one in rows if not one.ok]
    for one in missed:
        print(f"\n{one.error or f'{one.peer} over {one.broker} misses its floor'}", file=sys.stderr)
    print(f"{len(rows)} rows, {len(missed)} failed; medians of {options.rounds}; {machine()}; {options.json}")
    return 1 if missed else 0


def measure_all(peers: Sequence[Peer], rounds: int, scale: float) -> list[Row]:
    """Measure all, broker by broker, and show how far it is."""
    rows: list[Row] = []
    with progress() as bar:
        task = bar.add_task("", total=len(peers) * rounds)
        for broker, those in groupby(peers, lambda peer: peer.broker):
            some = list(those)
            for library in dict.fromkeys(peer.library for peer in some):
                bar.update(task, description=f"installing {library}")
                with suppress(MeasureFailed):  # its rows say it, they try again
                    python_of(library)
            with TemporaryDirectory(prefix="sluiceway-peers-") as folder:
                try:
                    with server(broker, Path(folder)) as url:
                        for peer in some:
                            bar.update(task, description=f"{peer.name} over {broker}")
                            rows.append(row(peer, url, rounds, lambda: bar.advance(task), scale=scale))
                            bar.update(task, completed=len(rows) * rounds)
                except MeasureFailed as error:
                    rows += [failed(peer, str(error)) for peer in some]
    return compared(peers, rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description="Measure other libraries and Sluiceway over the same brokers; docs/benchmarks.md says how.",
        epilog="example: make bench-peers ARGS='--only rabbitmq'",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only those with TEXT in their names: 'arq over redis'"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measures of each; 3 unless given")
    parser.add_argument("--quick", action="store_true", help="a tenth of the messages: to see that it runs")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH", help="where the rows go")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if options.docs and (options.only or options.quick):
        parser.error("--docs needs all rows in full: leave --only and --quick out")
    return options


if __name__ == "__main__":
    run(main)
