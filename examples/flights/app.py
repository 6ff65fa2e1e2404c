"""The consumer: takes flights from the broker and loads them into an analytical table, one airline per batch.

sluiceway run examples.flights.app:app --workers 2
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from examples.flights.warehouse import Warehouse
from sluiceway import App, Batch, Message, Reject, Retry

BROKER = os.environ.get("FLIGHTS_BROKER", "sqlite:///flights.db")
WAREHOUSE = os.environ.get("FLIGHTS_WAREHOUSE", "warehouse")


class Flight(msgspec.Struct):
    """One row of the CSV. Times are local HHMM, delays and air time minutes; what is missing is None."""

    row: int
    year: int
    month: int
    day: int
    sched_dep_time: int
    sched_arr_time: int
    carrier: str
    flight: int
    origin: str
    dest: str
    distance: int
    dep_time: int | None = None
    dep_delay: int | None = None
    arr_time: int | None = None
    arr_delay: int | None = None
    tailnum: str | None = None
    air_time: int | None = None


@asynccontextmanager
async def lifespan() -> AsyncIterator[Warehouse]:
    with Warehouse(WAREHOUSE) as warehouse:
        yield warehouse


app = App(BROKER, lifespan=lifespan)


@app.consumer("flights.departed", concurrency=4, retry=Retry(attempts=5, base_delay=0.2))
async def flights(message: Message[Flight]) -> Flight:
    flight = message.payload
    if flight.dep_time is None:
        raise Reject("cancelled: never departed")  # a dead letter, no retry
    if flight.arr_delay is None or flight.air_time is None:
        message.to("incomplete")  # diverted, most of them: they have no delay to count
    return flight


@flights.batch(size=200, timeout=1.0, key=lambda flight: flight.carrier)
def load(batch: Batch[Flight], warehouse: Warehouse) -> None:
    warehouse.add("flights", batch)


@flights.batch("incomplete", size=50, timeout=1.0)
def set_aside(batch: Batch[Flight], warehouse: Warehouse) -> None:
    warehouse.add("incomplete", batch)
