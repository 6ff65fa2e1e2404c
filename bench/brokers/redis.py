"""Redis by hand: redis-py's connection, the fastest way of a client that `bench.clients.redis` found; and, to see what
is left, hiredis behind a protocol of asyncio, which is no client but what one would be made of."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import hiredis
import redis
from redis.asyncio import Connection

from ..clients.redis import Wire
from ..payload import Order, decode, encode, handle

COUNT = 1_000  # entries per read

pack: Callable[[Any], bytes] = hiredis.pack_command


async def _wire(url: str) -> Wire:
    port = urlsplit(url).port or 6379
    _, wire = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", port)
    return wire


async def consume(url: str, topic: str, group: str, count: int) -> float:
    """Read, decode, handle; then ack all in one command, together with the next read. Returns seconds."""
    line = Connection(host="127.0.0.1", port=urlsplit(url).port or 6379, protocol=2)
    await line.connect()
    read = line.pack_command(
        "XREADGROUP", "GROUP", group, "by-hand", "COUNT", COUNT, "BLOCK", 1000, "STREAMS", topic, ">"
    )
    began = perf_counter()
    done = 0
    await line.send_packed_command(read, check_health=False)
    while done < count:
        entries = (await line.read_response())[0][1]
        for _, fields in entries:
            handle(decode(fields[1]))
        done += len(entries)
        acks = line.pack_command("XACK", topic, group, *[one for one, _ in entries])
        await line.send_packed_command([*acks, *read] if done < count else acks, check_health=False)
        await line.read_response()
    elapsed = perf_counter() - began
    await line.disconnect()
    return elapsed


async def consume_bare(url: str, topic: str, group: str, count: int) -> float:
    """The same over the bare parser."""
    wire = await _wire(url)
    read = pack(("XREADGROUP", "GROUP", group, "by-hand", "COUNT", COUNT, "BLOCK", 1000, "STREAMS", topic, ">"))
    began = perf_counter()
    done, reading = 0, wire.call(read)
    while done < count:
        entries = (await reading)[0][1]
        for _, fields in entries:
            handle(decode(fields[1]))
        done += len(entries)
        acked = wire.call(pack(("XACK", topic, group, *[one for one, _ in entries])))
        if done < count:
            reading = wire.call(read)
        await acked
    elapsed = perf_counter() - began
    wire.transport.close()
    return elapsed


async def publish(url: str, topic: str, orders: Sequence[Order], chunk: int) -> float:
    """`chunk` at a time, confirmed before the next go out; each entry with an id and a time, as ours have. Returns
    seconds."""
    wire = await _wire(url)
    began = perf_counter()
    for start in range(0, len(orders), chunk):
        answers: list[asyncio.Future[Any]] = []
        commands: list[bytes] = []
        loop = asyncio.get_running_loop()
        for number, one in enumerate(orders[start : start + chunk], start):
            fields = ("body", encode(one), "sluiceway-id", f"{number:022}", "sluiceway-time", repr(time.time()))
            commands.append(pack(("XADD", topic, "*", *fields)))
            answers.append(loop.create_future())
        wire.answers += answers
        wire.transport.write(b"".join(commands))
        for answer in answers:
            await answer
    elapsed = perf_counter() - began
    wire.transport.close()
    return elapsed


@contextlib.contextmanager
def held(url: str, topic: str, group: str) -> Iterator[Callable[[], int]]:
    """Counts what the group has read and not acked."""
    with redis.Redis.from_url(url, protocol=2) as client:
        yield lambda: int(client.xpending(topic, group)["pending"])
