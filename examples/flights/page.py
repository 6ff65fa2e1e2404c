"""The HTML page: one file, with its pictures inside."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from pathlib import Path

import duckdb

from examples.flights.audit import Figures
from examples.flights.chart import airlines, signed

_STYLE = """
:root { --ink: #1b2733; --soft: #66788a; --line: #e3e9ef; --accent: #1f6f8b; --good: #2e8b57; --bad: #c0392b; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink); }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0; font-size: 30px; letter-spacing: -.01em; } h2 { margin: 0 0 12px; font-size: 19px; }
p { margin: 6px 0 0; color: var(--soft); max-width: 760px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 26px 0; }
.tile, section { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 25px; font-variant-numeric: tabular-nums; line-height: 1.25; }
.tile span { color: var(--soft); font-size: 13px; }
.tile.good b { color: var(--good); } .tile.bad b { color: var(--bad); }
section { padding: 20px 22px; margin-top: 18px; overflow-x: auto; }
img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: 13px; } th:first-child, td:first-child { text-align: left; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; } code { color: var(--soft); }
"""


def write_page(db: duckdb.DuckDBPyConnection, figures: Figures, delays: Path, throughput: Path, path: Path) -> Path:
    """Write the page to `path`."""
    tiles = [
        ("published", f"{figures.published:,}", ""),
        ("lost", f"{figures.lost:,}", "bad" if figures.lost else "good"),
        ("batches written", f"{figures.batches:,}", ""),
        ("dead letters", f"{sum(figures.dead.values()):,}", ""),
        ("repeated after the kill", f"{figures.repeated:,}", ""),
        ("messages a second", f"{figures.rate:,.0f}", ""),
        ("latency p50", _seconds(figures.p50), ""),
        ("latency p99", _seconds(figures.p99), ""),
        ("longest pause after the kill", _seconds(figures.pause), ""),
        ("until all it held was made good", _seconds(figures.recovered), ""),
    ]
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Flights through Sluiceway</title><style>{_STYLE}</style></head><body><main>
<h1>A year of flights through Sluiceway</h1>
<p>{figures.published:,} flights, one message each, from a publisher through the embedded broker to two worker
processes and into an analytical table, in {figures.seconds:.1f} seconds. Half-way one worker was
killed with SIGKILL while it held {figures.suspects:,} messages.</p>
<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>
<section><img alt="Median and 90th percentile of the arrival delay per airline" src="{_embedded(delays)}"></section>
<section><img alt="Messages per second per worker, with the kill" src="{_embedded(throughput)}"></section>
<section><h2>The airlines</h2>{_airlines(db)}</section>
<section><h2>Counted against the CSV</h2>{_checks(figures)}
<p>Latency runs from the publish to the moment at which the message's batch is on disk. Repeated messages were on disk
when their worker died, but not yet acked; the table keeps each once, by its message id.</p></section>
</main></body></html>
""",
        encoding="utf-8",
    )
    return path


def _tile(name: str, value: str, kind: str) -> str:
    return f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _airlines(db: duckdb.DuckDBPyConnection) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.name)} <code>{escape(one.code)}</code></td><td>{one.flights:,}</td>"
        f"<td>{signed(one.median)} min</td><td>{signed(one.p90)} min</td>"
        f"<td>{one.on_time:.0%}</td><td>{one.cancelled:.1%}</td></tr>"
        for one in airlines(db)
    )
    names = ("airline", "flights", "median delay", "90th percentile", "≤ 15 min late", "cancelled")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _checks(figures: Figures) -> str:
    rows = ""
    for check in figures.checks:
        plain = isinstance(check.expected, int)
        expected = f"{check.expected:,}" if plain else "from the CSV"
        found = f"{check.found:,}" if plain else ("the same" if check.good else "something else")
        mark = '<span class="yes">right</span>' if check.good else '<span class="no">wrong</span>'
        rows += f"<tr><td>{escape(check.name)}</td><td>{expected}</td><td>{found}</td><td>{mark}</td></tr>"
    return f"<table><tr><th>what</th><th>expected</th><th>found</th><th></th></tr>{rows}</table>"


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + b64encode(picture.read_bytes()).decode()


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
