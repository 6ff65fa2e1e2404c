"""FastStream: consumer groups on Redis streams, a pull consumer of JetStream, a quorum queue of RabbitMQ."""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop
from common import BATCH, BROKER, COUNT, ORDER, SIZE, TOPIC, URL, seen, seen_batch
from pydantic import BaseModel

PREFETCH = 100


class Order(BaseModel):
    id: str
    customer: str
    cents: int
    currency: str
    lines: list[str]
    note: str


async def handle(order: Order) -> None:
    seen()


async def handle_batch(orders: list[Order]) -> None:
    seen_batch(len(orders))


async def redis() -> None:
    from faststream.redis import RedisBroker, StreamSub
    from redis.asyncio import Redis

    async with Redis.from_url(URL) as client:  # before the messages: a group that FastStream makes begins at the end
        await client.xgroup_create(TOPIC, "bench", id="0", mkstream=True)
    broker = RedisBroker(URL, logger=None)
    await broker.connect()
    await publish(lambda: broker.publish(ORDER, stream=TOPIC))
    sub = StreamSub(TOPIC, group="bench", consumer="one", max_records=SIZE, batch=BATCH)
    more: dict[str, Any] = {} if BATCH else {"max_workers": 10}
    broker.subscriber(stream=sub, **more)(handle_batch if BATCH else handle)
    await broker.start()


async def nats() -> None:
    from faststream.nats import JStream, NatsBroker, PullSub
    from nats import connect

    stream = JStream(name=TOPIC, subjects=[TOPIC])
    broker = NatsBroker(URL, logger=None)
    pull = PullSub(batch_size=PREFETCH, batch=BATCH)
    more: dict[str, Any] = {} if BATCH else {"max_workers": 10}
    broker.subscriber(TOPIC, stream=stream, durable="bench", pull_sub=pull, **more)(handle_batch if BATCH else handle)
    await broker.connect()
    client = await connect(URL)  # before the messages: FastStream makes the stream when it starts
    await client.jetstream().add_stream(name=TOPIC, subjects=[TOPIC])
    await client.close()
    await publish(lambda: broker.publish(ORDER, TOPIC, stream=TOPIC))
    await broker.start()


async def rabbitmq() -> None:
    from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

    queue = RabbitQueue(TOPIC, durable=True, queue_type=QueueType.QUORUM)
    broker = RabbitBroker(URL, logger=None)
    await broker.connect()
    await broker.declare_queue(queue)
    await publish(lambda: broker.publish(ORDER, queue=queue, persist=True))
    broker.subscriber(queue, channel=Channel(prefetch_count=PREFETCH))(handle)
    await broker.start()


async def publish(one: Any) -> None:
    for start in range(0, COUNT, 100):
        await asyncio.gather(*[one() for _ in range(min(100, COUNT - start))])


async def main() -> None:
    await {"redis": redis, "nats": nats, "rabbitmq": rabbitmq}[BROKER]()
    await asyncio.sleep(3600)


uvloop.run(main())
