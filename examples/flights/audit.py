"""The audit: what the warehouse and the dead letters hold, compared row by row with the CSV."""

from __future__ import annotations

import csv
import lzma
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from examples.flights.publish import DATA, ROWS, chosen
from examples.flights.warehouse import FLIGHT
from sluiceway.message import Stored

Sums = dict[str, tuple[int, int, int, int]]
"""Per carrier: flights, and the sums of arr_delay, air_time and distance."""


class Expected(msgspec.Struct):
    """What must come out, counted from the CSV by nothing but Python's csv module."""

    rows: int
    flights: int
    incomplete: int
    cancelled: int
    sums: Sums


class Check(msgspec.Struct):
    """One number that must be right."""

    name: str
    expected: Any
    found: Any

    @property
    def good(self) -> bool:
        return bool(self.expected == self.found)


class Figures(msgspec.Struct):
    """What the run came to. Times are seconds."""

    published: int
    handled: int
    lost: int
    batches: int
    batch_median: int
    dead: dict[str, int]  # by reason
    repeated: int
    suspects: int  # what the killed worker had in hand and another one handled
    seconds: float
    rate: float
    busiest: float  # messages a second, the best whole second
    p50: float
    p99: float
    pause: float  # the longest time without a batch on disk after the kill
    resumed: float  # from the kill to the first batch with what the killed worker had in hand
    recovered: float  # from the kill to the last such batch
    checks: list[Check]

    @property
    def wrong(self) -> list[Check]:
        return [check for check in self.checks if not check.good]


def expect(rows: int) -> Expected:
    """Count the CSV."""
    kinds: Counter[str] = Counter()
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    with lzma.open(DATA, "rt", encoding="utf-8", newline="") as file:
        table = csv.reader(file)
        header = next(table)
        departed, delay, air, distance, carrier = map(
            header.index, ("dep_time", "arr_delay", "air_time", "distance", "carrier")
        )
        for row in compress(table, chosen(rows)):
            if not row[departed]:
                kinds["cancelled"] += 1
            elif not row[delay] or not row[air]:
                kinds["incomplete"] += 1
            else:
                kinds["flights"] += 1
                sum_ = sums[row[carrier]]
                sum_[0] += 1
                sum_[1] += int(row[delay])
                sum_[2] += int(row[air])
                sum_[3] += int(row[distance])
    return Expected(
        rows=kinds.total(),
        flights=kinds["flights"],
        incomplete=kinds["incomplete"],
        cancelled=kinds["cancelled"],
        sums={code: (a, b, c, d) for code, (a, b, c, d) in sorted(sums.items())},
    )


def load_dead(db: duckdb.DuckDBPyConnection, dead: Sequence[Stored]) -> None:
    """Put the dead letters beside the tables: `dead` holds them, decoded, with why they died."""
    letters = [
        {
            "id": one.id,
            "reason": one.headers["sluiceway-dead-error"],
            "delivery": int(one.headers["sluiceway-dead-deliveries"]),
            "published": float(one.headers["sluiceway-dead-published-at"]),
            "died": float(one.headers["sluiceway-dead-failed-at"]),
            "flight": msgspec.Raw(one.body),
        }
        for one in dead
    ]
    shape = {"id": "VARCHAR", "reason": "VARCHAR", "delivery": "INTEGER", "published": "DOUBLE", "died": "DOUBLE"}
    shape_json = msgspec.json.encode([{**shape, "flight": FLIGHT}]).decode()
    db.execute(
        f"CREATE TABLE dead AS SELECT unnest(from_json(?, '{shape_json}'), recursive := true)",
        [msgspec.json.encode(letters).decode()],
    )


def load_source(db: duckdb.DuckDBPyConnection, rows: int, scratch: Path) -> None:
    """Put the CSV beside the tables: `source`, with the number of each row and where it belongs."""
    with lzma.open(DATA) as packed:
        scratch.write_bytes(packed.read())
    columns = {name: kind for name, kind in FLIGHT.items() if name != "row"}
    with scratch.open(encoding="utf-8") as file:
        order = {name: columns[name] for name in file.readline().strip().split(",")}
    db.execute(
        "CREATE TABLE source AS SELECT CAST(row_number() OVER () AS INTEGER) AS row, *, CASE"
        " WHEN dep_time IS NULL THEN 'dead' WHEN arr_delay IS NULL OR air_time IS NULL THEN 'incomplete'"
        " ELSE 'flights' END AS target"
        f" FROM read_csv(?, header = true, columns = {order!r}, parallel = false)",
        [str(scratch)],
    )
    db.execute("DELETE FROM source WHERE (row * $1::BIGINT) // $2 = ((row - 1) * $1::BIGINT) // $2", [rows, ROWS])


def audit(db: duckdb.DuckDBPyConnection, *, published: int, expected: Expected, left: int, killed_at: float) -> Figures:
    """Compare row by row, and count. `left` is how many messages the broker still has."""

    def one(sql: str, *values: Any) -> Any:
        row = db.execute(sql, values).fetchone()
        assert row is not None
        return row[0] if len(row) == 1 else row

    fields = ", ".join(f'"{name}"' for name in FLIGHT)
    here, there = f"SELECT {fields}, target FROM source", f"SELECT {fields}, target FROM found"
    db.execute(
        f"CREATE VIEW found AS SELECT {fields}, 'flights' AS target FROM flights"
        f" UNION ALL SELECT {fields}, 'incomplete' FROM incomplete"
        f" UNION ALL SELECT {fields}, 'dead' FROM (SELECT DISTINCT ON (id) * FROM dead)"
    )
    db.execute(
        "CREATE VIEW timed AS SELECT returned, returned - published AS latency, delivery"
        " FROM deliveries JOIN batches USING (worker, batch)"
    )
    db.execute("CREATE VIEW spaced AS SELECT returned, lag(returned) OVER (ORDER BY returned) AS before FROM batches")
    db.execute("CREATE VIEW first AS SELECT worker, batch FROM deliveries WHERE delivery = 1")
    lost = one("SELECT count(*) FROM source WHERE row NOT IN (SELECT row FROM found)")
    differs = one(f"SELECT count(*) FROM ({here} EXCEPT ALL {there})")
    foreign = one(f"SELECT count(*) FROM ({there} EXCEPT ALL {here})")
    sums = db.execute(
        "SELECT carrier, count(*), sum(arr_delay), sum(air_time), sum(distance)"
        " FROM flights GROUP BY carrier ORDER BY carrier"
    ).fetchall()
    dead = db.execute("SELECT reason, count(DISTINCT id) FROM dead GROUP BY reason ORDER BY 2 DESC").fetchall()
    repeated = one(
        "SELECT count(*) - count(DISTINCT id) FROM (SELECT id FROM deliveries UNION ALL SELECT id FROM dead)"
    )
    strangers = one(
        "SELECT count(*) FROM (SELECT id FROM deliveries GROUP BY id HAVING count(*) > 1 AND max(delivery) = 1)"
    )
    began = one("SELECT min(published) FROM (SELECT published FROM deliveries UNION ALL SELECT published FROM dead)")
    ended = one("SELECT max(done) FROM (SELECT returned AS done FROM batches UNION ALL SELECT died FROM dead)")
    p50, p99 = one("SELECT quantile_cont(latency, 0.5), quantile_cont(latency, 0.99) FROM timed")
    handled = one("SELECT count(*) FROM found")
    pause = one("SELECT max(returned - greatest(before, ?1)) FROM spaced WHERE returned > ?1", killed_at)
    resumed, recovered = one("SELECT min(returned), max(returned) FROM timed WHERE delivery > 1")
    checks = [
        Check("lost: rows of the CSV that are nowhere", 0, lost),
        Check("rows that differ from the CSV in any field, or are in the wrong place", 0, differs - lost),
        Check("rows that the CSV does not have", 0, foreign),
        Check("messages left at the broker", 0, left),
        Check("messages repeated that the killed worker did not hold", 0, strangers),
        Check("published", expected.rows, published),
        Check("complete flights in the table", expected.flights, one("SELECT count(*) FROM flights")),
        Check("incomplete flights set aside", expected.incomplete, one("SELECT count(*) FROM incomplete")),
        Check("dead letters, by reason", _reasons(expected), dict(dead)),
        Check("flights, delays, air time and distance per airline", expected.sums, {row[0]: row[1:] for row in sums}),
    ]
    return Figures(
        published=published,
        handled=handled,
        lost=lost,
        batches=one("SELECT count(*) FROM batches"),
        batch_median=one(
            "SELECT quantile_disc(rows, 0.5) FROM batches WHERE (worker, batch) IN (SELECT worker, batch FROM first)"
        ),
        dead=dict(dead),
        repeated=repeated,
        suspects=one("SELECT count(DISTINCT id) FROM deliveries WHERE delivery > 1")
        + one("SELECT count(DISTINCT id) FROM dead WHERE delivery > 1"),
        seconds=ended - began,
        rate=handled / (ended - began),
        busiest=one("SELECT max(n) FROM (SELECT sum(rows) AS n FROM batches GROUP BY CAST(floor(returned) AS BIGINT))"),
        p50=p50,
        p99=p99,
        pause=pause or 0.0,
        resumed=0.0 if resumed is None else resumed - killed_at,
        recovered=0.0 if recovered is None else recovered - killed_at,
        checks=checks,
    )


def _reasons(expected: Expected) -> dict[str, int]:
    return {"cancelled: never departed": expected.cancelled} if expected.cancelled else {}
