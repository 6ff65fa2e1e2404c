"""Celery: a function on a pool of threads, in one process, with a pydantic model as argument."""

from __future__ import annotations

from celery import Celery
from common import BROKER, COUNT, ORDER, TOPIC, URL, seen
from kombu import Exchange, Queue
from pydantic import BaseModel

app = Celery("bench", broker=URL.replace("amqp://", "pyamqp://"))
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=64,
    task_default_queue=TOPIC,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
    task_queues=[
        Queue(TOPIC, Exchange(TOPIC), TOPIC, queue_arguments={"x-queue-type": "quorum"} if BROKER == "rabbitmq" else {})
    ],
)


class Order(BaseModel):
    id: str
    customer: str
    cents: int
    currency: str
    lines: list[str]
    note: str


@app.task(name="handle", pydantic=True)
def handle(order: Order) -> None:
    seen()


with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
    for _ in range(COUNT):
        handle.apply_async((ORDER,), producer=producer)
app.worker_main(["worker", "-P", "threads", "-c", "10", "-l", "ERROR", "--without-gossip", "--without-mingle",
                 "--without-heartbeat", "-Q", TOPIC])  # fmt: skip
