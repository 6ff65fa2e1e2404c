"""Write docs/reference/guarantees.md anew, from what the acceptance suite showed: tests/results/guarantees.json.

python -m scripts.guarantees
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sluiceway.testing.acceptance.guarantees import GUARANTEES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "guarantees.md"
RESULTS = ROOT / "tests" / "results" / "guarantees.json"

HEAD = """\
# What is shown, of which transport

The [acceptance suite](../how-to/write-a-transport.md) runs over every transport. Each of its tests says which
[guarantee](../explanation/design.md#guarantees) it shows. The numbers are tests that passed, counted when the suite
last ran whole over the transport and none failed. Brokers are the real ones, started by the tests. A dash says that the
guarantee does not apply; [why](#what-does-not-apply) stands below.

`make test` writes the figures, `make docs` this page.
"""


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The page for the rows of some transports."""
    names = sorted(rows)
    lines = [HEAD, f"| guarantee | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for guarantee, text in GUARANTEES.items():
        title = f"**{guarantee}** {text}" if guarantee[-1].isdigit() else text
        cells = [str(rows[name].get(guarantee, {}).get("shown", "–")) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "## What does not apply", "", "Tests that a transport has no need of, and why.", ""]
    lines += ["| transport | guarantee | tests | why |", "| --- | --- | --- | --- |"]
    for name in names:
        for guarantee in GUARANTEES:
            for why, count in rows[name].get(guarantee, {}).get("not applicable", {}).items():
                lines.append(f"| {name} | {guarantee} | {count} | {why} |")
    return "\n".join(lines) + "\n"


def results() -> dict[str, dict[str, Any]]:
    """What the suite showed, by transport."""
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return rows


if __name__ == "__main__":
    PAGE.write_text(page(results()), encoding="utf-8")
