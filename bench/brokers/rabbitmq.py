"""RabbitMQ by hand: pika's AsyncioConnection in the loop, among the fastest by `bench.clients.rabbitmq`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import pika
from pika.adapters.asyncio_connection import AsyncioConnection

from ..payload import Order, decode, encode, handle

PREFETCH = 1_000


async def _channel(url: str) -> Any:
    opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    AsyncioConnection(pika.URLParameters(url), lambda one: one.channel(on_open_callback=opened.set_result))
    return await opened


async def _close(channel: Any) -> None:
    channel.connection.close()
    while not channel.connection.is_closed:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def consume(url: str, topic: str, group: str, count: int) -> float:
    """Decode and handle what is pushed; one ack for all that came, at each half of the prefetch. Returns seconds."""
    channel = await _channel(url)
    done = 0
    all_done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        nonlocal done
        handle(decode(body))
        done += 1
        if done % (PREFETCH // 2) == 0 or done == count:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if done == count:
            all_done.set_result(None)

    began = perf_counter()
    channel.basic_qos(prefetch_count=PREFETCH)
    channel.basic_consume(f"sluiceway|{group}|{topic}", take)
    await all_done
    await _close(channel)  # answered when the acks are
    return perf_counter() - began


async def publish(url: str, topic: str, orders: Sequence[Order], chunk: int) -> float:
    """`chunk` at a time, confirmed before the next go out; each message with an id and a time, as ours have. Returns
    seconds."""
    channel = await _channel(url)
    sent = confirmed = 0
    all_confirmed = asyncio.Event()

    def take(frame: Any) -> None:
        nonlocal confirmed
        assert isinstance(frame.method, pika.spec.Basic.Ack), frame.method
        tag = frame.method.delivery_tag
        confirmed = tag if frame.method.multiple else confirmed + 1
        if confirmed >= sent:
            all_confirmed.set()

    channel.confirm_delivery(take)
    began = perf_counter()
    for start in range(0, len(orders), chunk):
        some = orders[start : start + chunk]
        sent += len(some)
        all_confirmed.clear()
        for number, one in enumerate(some, start):
            headers = {"sluiceway-time": repr(time.time())}
            properties = pika.BasicProperties(message_id=f"{number:022}", delivery_mode=2, headers=headers)
            channel.basic_publish("sluiceway", topic, encode(one), properties, mandatory=True)
        await all_confirmed.wait()
    elapsed = perf_counter() - began
    await _close(channel)
    return elapsed


@contextlib.contextmanager
def held(url: str, topic: str, group: str) -> Iterator[Callable[[], int]]:
    """Counts nothing: the server tells only its own tools, which take a second each time. The prefetch bounds it."""
    yield lambda: 0
