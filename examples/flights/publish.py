"""The publisher: sends the rows of the CSV to the broker as JSON messages, in their order.

python -m examples.flights.publish --rows 100000 --rate 10000
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import lzma
import time
from collections.abc import Iterator
from pathlib import Path

from examples.flights.app import BROKER
from sluiceway import App

DATA = Path(__file__).parent / "data" / "flights-2013.csv.xz"
TOPIC = "flights.departed"
ROWS = 336_776
CHUNK = 1_000  # messages per call: one commit, one fsync
TEXT = {"carrier", "tailnum", "origin", "dest"}


def chosen(rows: int) -> list[bool]:
    """Which rows of the CSV make up a smaller set of `rows`, spread evenly over the year."""
    return [number * rows // ROWS > (number - 1) * rows // ROWS for number in range(1, ROWS + 1)]


def read_rows(rows: int = ROWS) -> Iterator[dict[str, int | str]]:
    """The rows as what goes over the wire: numbers as numbers, nothing for what is missing, and the row's number."""
    with lzma.open(DATA, "rt", encoding="utf-8", newline="") as file:
        table = csv.reader(file)
        names = [(name, str if name in TEXT else int) for name in next(table)]
        for number, values in itertools.compress(enumerate(table, 1), chosen(rows)):
            row: dict[str, int | str] = {"row": number}
            row |= {name: kind(value) for (name, kind), value in zip(names, values, strict=True) if value}
            yield row


async def publish(limit: int, rate: float | None) -> None:
    """Publish at most `rate` messages a second, and say after each chunk how many the broker has."""
    async with App(BROKER) as app:
        started, sent = time.monotonic(), 0
        rows = read_rows(limit)
        while chunk := list(itertools.islice(rows, CHUNK)):
            await app.publish_many(TOPIC, chunk, key=lambda row: row["carrier"])
            sent += len(chunk)
            print(sent, flush=True)
            if rate is not None:
                await asyncio.sleep(started + sent / rate - time.monotonic())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Publish flights to the broker.")
    parser.add_argument("--rows", type=int, default=ROWS, help="so many rows, spread evenly over the year")
    parser.add_argument("--rate", type=float, help="messages a second, at most; as fast as it goes if not given")
    options = parser.parse_args()
    asyncio.run(publish(options.rows, options.rate))
