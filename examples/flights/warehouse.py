"""The analytical table: DuckDB, a file per worker process, read as one.

Only one process at a time can write a DuckDB file, so each worker has its own and `read` puts them together. A batch is
one INSERT, on disk when `add` returns: only then are its messages acked. A worker that is killed after the INSERT and
before the ack leaves rows that another worker writes once more, so every row carries its message's id: `deliveries` has
them all, `flights` and `incomplete` each message once.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import msgspec
from msgspec.structs import asdict

from sluiceway import Batch

FLIGHT = {
    "row": "INTEGER",
    "year": "SMALLINT",
    "month": "SMALLINT",
    "day": "SMALLINT",
    "dep_time": "SMALLINT",
    "sched_dep_time": "SMALLINT",
    "dep_delay": "SMALLINT",
    "arr_time": "SMALLINT",
    "sched_arr_time": "SMALLINT",
    "arr_delay": "SMALLINT",
    "carrier": "VARCHAR",
    "flight": "SMALLINT",
    "tailnum": "VARCHAR",
    "origin": "VARCHAR",
    "dest": "VARCHAR",
    "air_time": "SMALLINT",
    "distance": "SMALLINT",
}
DELIVERY = {"id": "VARCHAR", "delivery": "SMALLINT", "published": "DOUBLE", "batch": "INTEGER", **FLIGHT}
JOURNAL = {
    "batch": "INTEGER",
    "table": "VARCHAR",
    "key": "VARCHAR",
    "rows": "INTEGER",
    "trigger": "VARCHAR",
    "returned": "DOUBLE",
}
TABLES = ("flights", "incomplete")

_columns = ", ".join(f'"{name}" {kind}' for name, kind in DELIVERY.items())
_shape = msgspec.json.encode([DELIVERY]).decode()


class Warehouse:
    """One worker's DuckDB file in `folder`, made anew; beside it a journal with a line for each batch."""

    def __init__(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        stem = Path(folder, f"worker-{os.getpid()}-{time.time_ns():x}")
        self._db = duckdb.connect(stem.with_suffix(".duckdb"), config={"threads": 1})
        self._journal = stem.with_suffix(".jsonl").open("ab", buffering=0)
        self._batches = 0
        for table in TABLES:
            self._db.execute(f"CREATE TABLE {table} ({_columns})")

    def add(self, table: str, batch: Batch[Any]) -> None:
        """Write a batch in one transaction. On disk when it returns. Several threads may call it."""
        self._batches += 1
        number = self._batches
        rows = [
            {"id": one.id, "delivery": one.deliveries, "published": one.timestamp, "batch": number} | asdict(one.value)
            for one in batch
        ]
        with self._db.cursor() as cursor:
            cursor.execute(
                f"INSERT INTO {table} BY NAME SELECT unnest(from_json(?, '{_shape}'), recursive := true)",
                [msgspec.json.encode(rows).decode()],
            )
        self._note(table, number, batch)

    def _note(self, table: str, number: int, batch: Batch[Any]) -> None:
        """What the demo's figures are made of: when each batch was on disk, and why it was emitted."""
        line = {"batch": number, "table": table, "key": batch.key, "rows": len(batch)}
        line |= {"trigger": batch.info.trigger, "returned": time.time()}
        self._journal.write(msgspec.json.encode(line) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._journal.close()


def read(folder: str | Path) -> duckdb.DuckDBPyConnection:
    """All workers' files as one database.

    `deliveries`: every row that was written, with its `worker` and `target` table. `flights`, `incomplete`: each
    message once, as it was first written. `batches`: the journals.
    """
    db = duckdb.connect()
    parts = []
    for number, path in enumerate(sorted(Path(folder).glob("*.duckdb"))):
        db.execute(f"ATTACH '{_quoted(path)}' AS worker{number}")
        parts += [
            f"SELECT '{path.stem}' AS worker, '{table}' AS target, * FROM worker{number}.{table}" for table in TABLES
        ]
    db.execute(f"CREATE TABLE deliveries AS {' UNION ALL BY NAME '.join(parts)}")
    for table in TABLES:
        db.execute(
            f"CREATE VIEW {table} AS SELECT * EXCLUDE (worker, target) FROM deliveries WHERE target = '{table}'"
            " QUALIFY row_number() OVER (PARTITION BY id ORDER BY delivery) = 1"
        )
    db.execute(
        "CREATE TABLE batches AS SELECT parse_filename(filename, true) AS worker, * EXCLUDE (filename)"
        " FROM read_json(?, format = 'newline_delimited', filename = true, columns = "
        f"{JOURNAL!r})",
        [f"{folder}/*.jsonl"],
    )
    return db


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
