"""Two pictures: how late each airline lands, and what the workers did around the kill."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import duckdb
import matplotlib as mpl
from msgspec import Struct

from examples.flights.publish import DATA

mpl.use("Agg")  # needs no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, SOFT, GRID = "#1b2733", "#66788a", "#e3e9ef"
GOOD, BAD, LINK = "#1f6f8b", "#e4572e", "#cfd8e0"
KILLED, OTHERS = "#c0473a", ("#1f6f8b", "#5fa8a0")


class Airline(Struct):
    """One airline's year. Delays are minutes at arrival, shares of 1."""

    code: str
    name: str
    flights: int
    median: float
    p90: float
    on_time: float  # at most 15 minutes late
    cancelled: float  # of all its flights


def airlines(db: duckdb.DuckDBPyConnection) -> list[Airline]:
    """What the tables say of each airline, the one with the fewest late flights first."""
    with DATA.with_name("airlines.csv").open(encoding="utf-8", newline="") as file:
        names = {row["carrier"]: row["name"] for row in csv.DictReader(file)}
    rows = db.execute(
        "SELECT carrier, count(*), median(arr_delay), quantile_cont(arr_delay, 0.9),"
        " avg(CAST(arr_delay <= 15 AS INTEGER)),"
        " (SELECT count(DISTINCT id) FROM dead WHERE dead.carrier = flights.carrier) AS cancelled"
        " FROM flights GROUP BY carrier ORDER BY 4, 3, 1"
    ).fetchall()
    return [
        Airline(
            code, _short(names[code]), flights, float(median), float(p90), on_time, cancelled / (cancelled + flights)
        )
        for code, flights, median, p90, on_time, cancelled in rows
    ]


def draw_delays(db: duckdb.DuckDBPyConnection, path: Path) -> Path:
    """Median and 90th percentile of the arrival delay, per airline."""
    data = airlines(db)
    figure, axes = _figure(11, 1.9 + 0.37 * len(data))
    y = range(len(data) - 1, -1, -1)
    axes.axvline(0, color=SOFT, linewidth=1, zorder=1)
    axes.hlines(
        y, [one.median for one in data], [one.p90 for one in data], color=LINK, linewidth=5, zorder=2, capstyle="round"
    )
    axes.scatter([one.median for one in data], y, s=80, color=GOOD, edgecolor="white", linewidth=1.2, zorder=3)
    axes.scatter([one.p90 for one in data], y, s=80, color=BAD, edgecolor="white", linewidth=1.2, zorder=3)
    for at, one in zip(y, data, strict=True):
        _mark(axes, one.median, at, GOOD, left=True)
        _mark(axes, one.p90, at, BAD, left=False)
    axes.set_yticks(list(y), [one.name for one in data], fontsize=11, color=INK)
    axes.set_xlim(min(0.0, *(one.median for one in data)) - 12, max(one.p90 for one in data) + 10)
    axes.set_ylim(-0.7, len(data) - 0.3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{signed(value)} min" if value else "on time")
    for at, one in zip(y, data, strict=True):
        axes.annotate(
            f"{one.flights:,}", (1.0, at), xycoords=("axes fraction", "data"), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=9, color=SOFT,
        )  # fmt: skip
    axes.annotate(
        "flights", (1.0, len(data) - 0.35), xycoords=("axes fraction", "data"), xytext=(8, 0),
        textcoords="offset points", va="center", fontsize=9, color=SOFT, style="italic",
    )  # fmt: skip
    total = sum(one.flights for one in data)
    _title(
        figure, "How late do they land?", f"Arrival delay of {total:,} flights that left New York in 2013, per airline"
    )
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=8, color=colour, label=label)
        for colour, label in ((GOOD, "half land later"), (BAD, "one in ten lands later"))
    ]
    figure.legend(
        handles=handles, loc="upper right", ncols=2, frameon=False, fontsize=10.5, labelcolor=INK, handletextpad=0.2,
        bbox_to_anchor=(0.99, 0.985),
    )  # fmt: skip
    return _save(figure, path)


def draw_throughput(db: duckdb.DuckDBPyConnection, killed_at: float, killed: int, path: Path) -> Path:
    """Rows on disk per second, per worker, with the kill of process `killed`."""
    step = 0.5
    rows: list[tuple[str, float, float]] = db.execute(
        "SELECT worker, floor((returned - start) / ?1) * ?1, sum(rows) / ?1 FROM batches,"
        " (SELECT min(published) AS start FROM deliveries) GROUP BY 1, 2",
        [step],
    ).fetchall()
    row = db.execute("SELECT min(published) FROM deliveries").fetchone()
    start = row[0] if row is not None else 0.0
    order = db.execute(
        "SELECT worker FROM batches GROUP BY worker ORDER BY min(returned) > ?, min(returned)", [killed_at]
    ).fetchall()
    workers = sorted((worker for (worker,) in order), key=lambda worker: f"-{killed}-" in worker)
    bins = [number * step for number in range(math.ceil(max(at for _, at, _ in rows) / step) + 1)]
    figure, axes = _figure(11, 3.4)
    parts = []
    for worker in workers:
        found = {at: rate for name, at, rate in rows if name == worker}
        parts.append([found.get(at, 0.0) for at in bins])
    names = [f"process {worker.split('-')[1]}" + (", killed" if f"-{killed}-" in worker else "") for worker in workers]
    colours = [KILLED if f"-{killed}-" in worker else OTHERS[at % len(OTHERS)] for at, worker in enumerate(workers)]
    axes.stackplot(bins, parts, labels=names, colors=colours, alpha=0.9, step="post", linewidth=0)
    if killed_at:
        axes.axvline(killed_at - start, color=INK, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            "SIGKILL", (killed_at - start, 1.0), xycoords=("data", "axes fraction"), xytext=(6, -4),
            textcoords="offset points", va="top", fontsize=10, color=INK, weight="bold",
        )  # fmt: skip
    axes.set_xlim(0, bins[-1] + step)
    axes.set_ylim(0, max(map(sum, zip(*parts, strict=True))) * 1.15)
    axes.grid(axis="y", color=GRID)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(frameon=False, fontsize=10, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0), labelcolor=INK)
    _title(figure, "Messages per second", "on disk, per worker process")
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 1 - 0.85 / height))  # type: ignore[union-attr,call-arg]
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=10, labelcolor=SOFT)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    return figure, axes


def _title(figure: Figure, title: str, below: str) -> None:
    height: Any = figure.get_size_inches()[1]
    figure.text(0.015, 1 - 0.14 / height, title, fontsize=17, weight="bold", color=INK, va="top")
    figure.text(0.015, 1 - 0.50 / height, below, fontsize=11, color=SOFT, va="top")


def _mark(axes: Axes, value: float, at: float, colour: str, *, left: bool) -> None:
    axes.annotate(
        signed(value), (value, at), xytext=(-9 if left else 9, 0), textcoords="offset points",
        ha="right" if left else "left", va="center", fontsize=10, color=colour, weight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip


def signed(value: float) -> str:
    """Whole minutes with their sign."""
    return f"{value:+.0f}".replace("-", "−") if round(value) else "0"


def _short(name: str) -> str:
    for tail in (" Inc.", " Co.", " Corporation", " Airlines", " Air Lines"):
        name = name.removesuffix(tail)
    return name


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
    return path
