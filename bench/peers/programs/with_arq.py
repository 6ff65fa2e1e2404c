"""arq, which pickles arguments, so that they arrive as objects."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker, func
from common import COUNT, ORDER, TOPIC, URL, seen


@dataclass
class Order:
    id: str
    customer: str
    cents: int
    currency: str
    lines: list[str]
    note: str


async def handle(context: dict[Any, Any], order: Order) -> None:
    seen()


async def main() -> None:
    settings = RedisSettings.from_dsn(URL)
    pool = await create_pool(settings, default_queue_name=TOPIC)
    order = Order(**ORDER)
    for start in range(0, COUNT, 100):
        await asyncio.gather(*[pool.enqueue_job("handle", order) for _ in range(min(100, COUNT - start))])
    worker = Worker(
        [func(handle, name="handle", keep_result=0)], queue_name=TOPIC, redis_settings=settings, max_jobs=100,
        poll_delay=0.01, handle_signals=False,
    )  # fmt: skip
    await worker.async_run()


uvloop.run(main())
