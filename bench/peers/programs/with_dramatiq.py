"""dramatiq: a function on its threads, the fields made an object in it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

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
broker.middleware[:] = [one for one in broker.middleware if type(one).__name__ != "Prometheus"]
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=TOPIC)
def handle(order: dict[str, Any]) -> None:
    Order(**order)
    seen()


for _ in range(COUNT):
    handle.send(ORDER)
dramatiq.Worker(broker, worker_threads=8).start()
time.sleep(3600)
