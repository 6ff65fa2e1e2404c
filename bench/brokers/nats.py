"""NATS by hand: nats-py, which is the only client, through its public API."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import nats

from ..payload import Order, decode, encode, handle

PULL = 500  # messages per request
STREAM = "sluiceway"


async def consume(url: str, topic: str, group: str, count: int) -> float:
    """One subscription, two pulls outstanding; decode, handle and ack as they come. Returns seconds."""
    client = await nats.connect(url)
    name = await _consumer(client, topic)
    inbox = client.new_inbox()
    done = 0
    all_done = asyncio.Event()

    async def pull() -> None:
        await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{name}", b'{"batch": %d}' % PULL, reply=inbox)

    async def take(message: Any) -> None:
        nonlocal done
        handle(decode(message.data))
        await client.publish(message.reply)
        done += 1
        if done == count:
            all_done.set()
        elif done % PULL == 0:
            await pull()

    await client.subscribe(inbox, cb=take, pending_msgs_limit=-1, pending_bytes_limit=-1)
    began = perf_counter()
    await pull()
    await pull()
    await all_done.wait()
    await client.flush()
    elapsed = perf_counter() - began
    await client.close()
    return elapsed


async def _consumer(client: Any, topic: str) -> str:
    infos = await client.jetstream().consumers_info(STREAM)
    return next(str(one.name) for one in infos if one.config.filter_subject == topic)


async def publish(url: str, topic: str, orders: Sequence[Order], chunk: int) -> float:
    """`chunk` at a time, confirmed before the next go out; each message with an id and a time, as ours have. Returns
    seconds."""
    client = await nats.connect(url)
    confirmed = asyncio.Semaphore(0)
    inbox = client.new_inbox()

    async def take(message: Any) -> None:
        assert b'"seq"' in message.data, message.data
        confirmed.release()

    await client.subscribe(inbox, cb=take, pending_msgs_limit=-1, pending_bytes_limit=-1)
    began = perf_counter()
    for start in range(0, len(orders), chunk):
        some = orders[start : start + chunk]
        for number, one in enumerate(some, start):
            headers = {"sluiceway-id": f"{number:022}", "sluiceway-time": repr(time.time())}
            await client.publish(topic, encode(one), reply=inbox, headers=headers)
        for _ in some:
            await confirmed.acquire()
    elapsed = perf_counter() - began
    await client.close()
    return elapsed


@contextlib.contextmanager
def held(url: str, topic: str, group: str) -> Iterator[Callable[[], int]]:
    """Counts what the consumer has given and not seen acked."""
    with asyncio.Runner() as runner:
        client = runner.run(nats.connect(url))
        manager = client.jetstream()
        name = runner.run(_consumer(client, topic))

        def count() -> int:
            return int(runner.run(manager.consumer_info(STREAM, name)).num_ack_pending or 0)

        yield count
        runner.run(client.close())
