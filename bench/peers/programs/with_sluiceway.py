"""Sluiceway, as its command line runs it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import uvloop
from common import BATCH, COUNT, ORDER, SIZE, TOPIC, URL, seen, seen_batch
from msgspec import Struct

from sluiceway import App, Batch, Message, Pause


class Order(Struct):
    id: str
    customer: str
    cents: int
    currency: str
    lines: list[str]
    note: str


async def main() -> None:
    app, gate = App(URL), Pause()
    gate.close()
    if BATCH:

        @app.consumer(TOPIC, concurrency=10, gates=[gate])
        async def consume(message: Message[Order]) -> Any:
            return message.payload

        @consume.batch(size=SIZE)
        async def take(batch: Batch[Order]) -> None:
            seen_batch(len(batch))

    else:

        @app.consumer(TOPIC, concurrency=10, gates=[gate])
        async def handle(message: Message[Order]) -> None:
            seen()

    async with app.running():
        for start in range(0, COUNT, 1_000):
            await app.publish_many(TOPIC, [ORDER] * min(1_000, COUNT - start))
        gc.set_threshold(50_000, 20, 100)
        gc.freeze()
        gate.open()
        await asyncio.sleep(3600)


uvloop.run(main())
