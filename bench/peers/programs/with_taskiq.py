"""taskiq, with the receiver that its command line starts."""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop
from common import BROKER, COUNT, ORDER, TOPIC, URL, seen
from pydantic import BaseModel
from taskiq.acks import AcknowledgeType
from taskiq.api import run_receiver_task

AHEAD = 100  # messages that are read at once


class Order(BaseModel):
    id: str
    customer: str
    cents: int
    currency: str
    lines: list[str]
    note: str


def made() -> Any:
    if BROKER == "redis":
        from taskiq_redis import RedisStreamBroker

        return RedisStreamBroker(URL, queue_name=TOPIC, consumer_id="0", xread_count=AHEAD)
    if BROKER == "nats":
        from taskiq_nats import PullBasedJetStreamBroker

        return PullBasedJetStreamBroker(
            [URL], subject=TOPIC, stream_name=TOPIC, durable="bench", pull_consume_batch=AHEAD, pull_consume_timeout=1
        )
    from taskiq_aio_pika import AioPikaBroker, Exchange, Queue

    queue = Queue(name=TOPIC)
    return AioPikaBroker(URL, qos=AHEAD, exchange=Exchange(name=TOPIC), task_queues=[queue])


broker = made()


@broker.task
async def handle(order: Order) -> None:
    seen()


async def main() -> None:
    producer, order = made(), Order(**ORDER)
    await producer.startup()
    kicker = handle.kicker().with_broker(producer)
    for start in range(0, COUNT, 100):
        await asyncio.gather(*[kicker.kiq(order) for _ in range(min(100, COUNT - start))])
    await producer.shutdown()
    broker.is_worker_process = True
    await run_receiver_task(
        broker, max_async_tasks=100, max_prefetch=AHEAD, ack_time=AcknowledgeType.WHEN_EXECUTED, run_startup=True
    )


uvloop.run(main())
