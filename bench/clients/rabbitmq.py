"""Receive and ack over one quorum queue, with each client that there is for Python: `python -m bench.clients.rabbitmq`.

It starts a server of its own. aiormq and aio-pika are not among our extras; what is not installed is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.blocking_connection import BlockingConnection

from tests.servers.rabbitmq import RabbitMQServer

QUEUE = "bench"
BODY = b"x" * 200
HEADERS = {"sluiceway-time": "1763900000.123456"}


def fill(url: str, count: int) -> None:
    """Put `count` messages into the queue, as our transport would write them."""
    connection = BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_purge(QUEUE)
    for number in range(count):
        properties = pika.BasicProperties(delivery_mode=2, message_id=f"0123456789abcdef01-{number:x}", headers=HEADERS)
        channel.basic_publish("", QUEUE, BODY, properties)
    while channel.queue_declare(QUEUE, passive=True).method.message_count < count:
        time.sleep(0.05)
    connection.close()


class Acks:
    """What a good loop by hand does: one ack for all that came, each time that half the prefetch has."""

    def __init__(self, prefetch: int, count: int) -> None:
        self.every = max(1, prefetch // 2)
        self.left = count
        self.since = 0

    def due(self) -> bool:
        """Count a message; whether to acknowledge it, with all before it."""
        self.left -= 1
        self.since += 1
        if self.since >= self.every or self.left == 0:
            self.since = 0
            return True
        return False


async def pika_in_loop(url: str, prefetch: int, count: int) -> None:
    """pika's AsyncioConnection, in the loop of the handlers."""
    done = asyncio.get_running_loop().create_future()
    acks = Acks(prefetch, count)

    def on_message(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        if acks.due():
            channel.basic_ack(method.delivery_tag, multiple=True)
        if not acks.left:
            done.set_result(None)

    def on_channel(channel: Any) -> None:
        channel.basic_qos(prefetch_count=prefetch, callback=lambda _: channel.basic_consume(QUEUE, on_message))

    connection = AsyncioConnection(pika.URLParameters(url), lambda one: one.channel(on_open_callback=on_channel))
    await done
    connection.close()
    await asyncio.sleep(0.05)


async def pika_on_thread(url: str, prefetch: int, count: int) -> None:
    """The same on a thread with a loop of its own; what came in one turn of it goes over in one call."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    acks = Acks(prefetch, count)
    io = asyncio.new_event_loop()
    arrived: list[Any] = []
    opened: list[Any] = []

    def hand_over() -> None:
        nonlocal arrived
        batch, arrived = arrived, []
        loop.call_soon_threadsafe(handle, batch)

    def handle(batch: list[Any]) -> None:
        tag = 0
        for method, _, _ in batch:
            if acks.due():
                tag = method.delivery_tag
        if tag:
            io.call_soon_threadsafe(lambda: opened[0].basic_ack(tag, multiple=True))
        if not acks.left:
            done.set_result(None)

    def on_message(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        if not arrived:
            io.call_soon(hand_over)
        arrived.append((method, properties, body))

    def on_channel(channel: Any) -> None:
        opened.append(channel)
        channel.basic_qos(prefetch_count=prefetch, callback=lambda _: channel.basic_consume(QUEUE, on_message))

    def run() -> None:
        AsyncioConnection(
            pika.URLParameters(url), lambda one: one.channel(on_open_callback=on_channel), custom_ioloop=io
        )
        io.run_forever()
        io.close()

    thread = threading.Thread(target=run)
    thread.start()
    await done
    io.call_soon_threadsafe(opened[0].connection.close)
    io.call_soon_threadsafe(lambda: io.call_later(0.05, io.stop))
    thread.join()


async def pika_blocking(url: str, prefetch: int, count: int) -> None:
    """pika's BlockingConnection in a thread."""

    def run() -> None:
        connection = BlockingConnection(pika.URLParameters(url))
        channel = connection.channel()
        channel.basic_qos(prefetch_count=prefetch)
        acks = Acks(prefetch, count)
        for method, _, _ in channel.consume(QUEUE):
            if acks.due():
                channel.basic_ack(method.delivery_tag, multiple=True)
            if not acks.left:
                break
        connection.close()

    await asyncio.to_thread(run)


async def with_aiormq(url: str, prefetch: int, count: int) -> None:
    import aiormq

    done = asyncio.get_running_loop().create_future()
    acks = Acks(prefetch, count)
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    await channel.basic_qos(prefetch_count=prefetch)

    async def on_message(message: Any) -> None:
        if acks.due():
            await channel.basic_ack(message.delivery_tag, multiple=True, wait=False)
        if not acks.left:
            done.set_result(None)

    await channel.basic_consume(QUEUE, on_message)
    await done
    await connection.close()


async def with_aio_pika(url: str, prefetch: int, count: int) -> None:
    import aio_pika

    acks = Acks(prefetch, count)
    done = asyncio.get_running_loop().create_future()
    connection = await aio_pika.connect_robust(url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=prefetch)
    queue = await channel.get_queue(QUEUE)

    async def on_message(message: Any) -> None:
        if acks.due():
            await message.ack(multiple=True)
        if not acks.left:
            done.set_result(None)

    await queue.consume(on_message)
    await done
    await connection.close()


CLIENTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "pika, AsyncioConnection in the loop": ("pika", pika_in_loop),
    "pika, AsyncioConnection on a thread": ("pika", pika_on_thread),
    "pika, BlockingConnection in a thread": ("pika", pika_blocking),
    "aiormq": ("aiormq", with_aiormq),
    "aio-pika": ("aio_pika", with_aio_pika),
}


def measure(client: Callable[..., Any], url: str, prefetch: int, count: int) -> tuple[float, float]:
    """Messages/s, and µs of our processor per message."""
    fill(url, count)
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    asyncio.run(client(url, prefetch, count))
    elapsed = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return count / elapsed, cpu / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="messages per measure")
    parser.add_argument("--rounds", type=int, default=3, help="measures of each, in turns; the median is shown")
    parser.add_argument("--url", help="a server that runs already")
    options = parser.parse_args()
    clients = {name: run for name, (module, run) in CLIENTS.items() if importlib.util.find_spec(module)}
    with tempfile.TemporaryDirectory() as folder:
        server = None if options.url else RabbitMQServer(Path(folder)).start()
        try:
            url = options.url or (server.url() if server else "")
            for prefetch in (100, 1_000):
                seen: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
                for _ in range(options.rounds):
                    for name, run in clients.items():
                        seen[name].append(measure(run, url, prefetch, options.count))
                for name, figures in seen.items():
                    rate, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
                    print(f"prefetch {prefetch:5}  {name:38} {rate:8,.0f}/s  {cpu:6.1f} µs CPU/message", flush=True)
        finally:
            if server is not None:
                server.stop()


if __name__ == "__main__":
    main()
