"""dramatiq: a function on its threads, the fields made an object in it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

os.environ["dramatiq_queue_prefetch"] = "100"  # noqa: SIM112 - its name; read when it is imported

import dramatiq
from common import BROKER, COUNT, ORDER, TOPIC, URL, seen


@dataclass
class Order:
    id: str
    customer: str
    cents: int
    currency: str
    lines: list[str]
    note: str


def made() -> Any:
    if BROKER == "redis":
        from dramatiq.brokers.redis import RedisBroker

        return RedisBroker(url=URL, namespace=TOPIC)
    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    return RabbitmqBroker(url=URL)


broker = made()
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=TOPIC)
def handle(order: dict[str, Any]) -> None:
    Order(**order)
    seen()


for _ in range(COUNT):
    handle.send(ORDER)
dramatiq.Worker(broker, worker_threads=8).start()
time.sleep(3600)
