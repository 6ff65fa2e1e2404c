"""`python -m bench`: measure, show the table, write the rows; exit 1 when a floor is missed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import brokers, latency, memory, memory_use, processes, sqlite, threads
from .child import ROOT
from .front import progress, run, show
from .pairs import Case, Outcome, run_case
from .report import line, machine, table, write_docs, write_json

EMBEDDED: tuple[Case, ...] = (
    *memory.CASES,
    *threads.CASES,
    *processes.CASES,
    *sqlite.CASES,
    *latency.CASES,
    *memory_use.CASES,
)
CASES = (*EMBEDDED, *brokers.CASES)
RESULTS = ROOT / "bench" / "results" / "latest.json"
DOCS = ROOT / "docs" / "benchmarks.md"
QUICK = 0.1  # of the messages and seconds
BUSY = 0.5  # load average before the bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a floor is missed or a case failed, 2 for wrong usage, 130 after Ctrl-C."""
    options = _parse(arguments)
    offered = CASES if options.brokers else EMBEDDED
    chosen = [case for case in offered if any(options.only.lower() in one.case.lower() for one in case.figures)]
    if not chosen:
        print(f"no case has {options.only!r} in its name; --list shows them all", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(figure.case for case in chosen for figure in case.figures))
        return 0
    load = os.getloadavg()[0]
    try:
        outcomes = measure_all(chosen, options.rounds, QUICK if options.quick else 1.0)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    rows = [row for outcome in outcomes for row in outcome.rows]
    show(table(rows))
    write_json(rows, options.json)
    if options.docs:
        write_docs(rows, DOCS, options.rounds)
    for outcome in outcomes:
        if outcome.error is not None:
            print(f"\n{outcome.rows[0].case} failed:\n{outcome.error}", file=sys.stderr)
    missed = [row for row in rows if not row.ok]
    print(f"{len(rows)} rows, {len(missed)} missed; medians of {options.rounds}; {machine()}; {options.json}")
    if load > BUSY:
        print(f"Others used {load:.1f} cores when this began: the figures are worth little.", file=sys.stderr)
    return 1 if missed else 0


def measure_all(cases: Sequence[Case], rounds: int, scale: float) -> list[Outcome]:
    """Measure all cases, one after the other, and show how far it is."""
    outcomes = []
    with progress() as bar:
        task = bar.add_task("", total=len(cases) * rounds)
        for number, case in enumerate(cases, 1):
            bar.update(task, description=case.figures[0].case)
            outcomes.append(run_case(case, rounds, lambda: bar.advance(task), scale=scale))
            bar.update(task, completed=number * rounds)
            for row in outcomes[-1].rows:
                bar.console.print(line(row), highlight=False, soft_wrap=True)
    return outcomes


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure Sluiceway against its floors; docs/benchmarks.md says what each row means.",
        epilog="example: make bench ARGS='--only sqlite --rounds 3'",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with TEXT in their name")
    parser.add_argument(
        "--no-brokers", dest="brokers", action="store_false", help="only what needs no server: memory and SQLite"
    )
    parser.add_argument("--rounds", type=_count, default=5, metavar="N", help="pairs per case; 5 unless given")
    parser.add_argument("--quick", action="store_true", help="a tenth of the messages: to see that it runs")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH", help="where the rows go")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/benchmarks.md")
    parser.add_argument("--list", action="store_true", help="only show the names of the cases")
    options = parser.parse_args(arguments)
    if options.docs and (options.only or options.quick or not options.brokers):
        parser.error("--docs needs all rows in full: leave --only, --no-brokers and --quick out")
    return options


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("a whole number, 1 or more")
    return count


if __name__ == "__main__":
    run(main)
