"""Redis clients compared: a batched XREADGROUP and XACK loop, written by hand over each of them.

`python -m bench.clients.redis` starts a redis-server of its own on loopback. What is not importable is left out, with
how to install it. Each loop decodes its messages (200 bytes of JSON, typed) and acks them in one command per read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from ..payload import decode, encode, order

STREAM, GROUP, CONSUMER, FIELD = "orders", "bench", "one", b"body"
TOTAL = 60_000


def body(number: int) -> bytes:
    return encode(order(number))


def handle(fields: list[bytes]) -> None:
    decode(fields[1])


# -- the loops: each reads `total` messages, `count` at a time ---------------------------------------------------------


async def redis_py(port: int, count: int, total: int) -> None:
    from redis.asyncio import Redis

    client = Redis(port=port, protocol=2)
    done = 0
    while done < total:
        for _, entries in await client.xreadgroup(GROUP, CONSUMER, {STREAM: ">"}, count=count, block=1000):
            for _, fields in entries:
                decode(fields[FIELD])
            await client.xack(STREAM, GROUP, *[one for one, _ in entries])
            done += len(entries)
    await client.aclose()


async def redis_py_connection(port: int, count: int, total: int) -> None:
    """The same library, without its Redis class: what it packs and parses, on one connection."""
    from redis.asyncio import Connection

    line = Connection(port=port, protocol=2)
    await line.connect()
    pack = line.pack_command
    read = pack("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", count, "BLOCK", 1000, "STREAMS", STREAM, ">")
    done = 0
    while done < total:
        await line.send_packed_command(read, check_health=False)
        reply = await line.read_response()
        for _, entries in reply:
            for _, fields in entries:
                handle(fields)
            await line.send_packed_command(pack("XACK", STREAM, GROUP, *[one for one, _ in entries]), False)
            await line.read_response()
            done += len(entries)
    await line.disconnect()


def redis_py_sync(port: int, count: int, total: int) -> None:
    from redis import Redis

    client = Redis(port=port, protocol=2)
    done = 0
    while done < total:
        for _, entries in client.xreadgroup(GROUP, CONSUMER, {STREAM: ">"}, count=count, block=1000):  # type: ignore[union-attr]
            for _, fields in entries:
                decode(fields[FIELD])
            client.xack(STREAM, GROUP, *[one for one, _ in entries])
            done += len(entries)
    client.close()


async def redis_py_thread(port: int, count: int, total: int) -> None:
    await asyncio.to_thread(redis_py_sync, port, count, total)


class Wire(asyncio.Protocol):
    """hiredis alone: its parser and its packer behind a protocol of asyncio."""

    def __init__(self) -> None:
        import hiredis

        self.reader = hiredis.Reader()
        self.answers: list[asyncio.Future[Any]] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not False:
            self.answers.pop(0).set_result(reply)

    def call(self, command: bytes) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        self.transport.write(command)
        return answer


async def hiredis_protocol(port: int, count: int, total: int) -> None:
    import hiredis

    _, wire = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", port)
    pack = hiredis.pack_command
    read = pack(("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", count, "BLOCK", 1000, "STREAMS", STREAM, ">"))
    done = 0
    while done < total:
        for _, entries in await wire.call(read):
            for _, fields in entries:
                handle(fields)
            await wire.call(pack(("XACK", STREAM, GROUP, *[one for one, _ in entries])))
            done += len(entries)
    wire.transport.close()


async def coredis(port: int, count: int, total: int) -> None:
    import coredis as library

    async with library.Redis(host="127.0.0.1", port=port) as client:
        done = 0
        while done < total:
            found = await client.xreadgroup(GROUP, CONSUMER, streams={STREAM: ">"}, count=count, block=1000)
            for entries in (found or {}).values():
                for one in entries:
                    decode(one.field_values[FIELD])
                await client.xack(STREAM, GROUP, [one.identifier for one in entries])
                done += len(entries)


async def valkey_glide(port: int, count: int, total: int) -> None:
    import glide

    address = glide.NodeAddress("127.0.0.1", port)
    client = await glide.GlideClient.create(glide.GlideClientConfiguration([address], request_timeout=5000))
    options = glide.StreamReadGroupOptions(count=count, block_ms=1000)
    done = 0
    while done < total:
        found = await client.xreadgroup({STREAM: ">"}, GROUP, CONSUMER, options)
        for entries in (found or {}).values():
            for fields in entries.values():
                decode(fields[0][1])
            await client.xack(STREAM, GROUP, list(entries))
            done += len(entries)
    await client.close()


CLIENTS: dict[str, tuple[str, str, Callable[[int, int, int], Awaitable[None]]]] = {
    "redis-py, Redis": ("redis", "redis hiredis", redis_py),
    "redis-py, Redis, in a thread": ("redis", "redis hiredis", redis_py_thread),
    "redis-py, Connection": ("redis", "redis hiredis", redis_py_connection),
    "hiredis, asyncio.Protocol": ("hiredis", "hiredis", hiredis_protocol),
    "coredis": ("coredis", "coredis", coredis),
    "valkey-glide": ("glide", "valkey-glide", valkey_glide),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(port: int, folder: str) -> Iterator[None]:
    """A redis-server that keeps an append-only file, as one that must lose nothing does."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed; on Debian: apt-get install redis-server")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "yes"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(500):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(20)


def fill(port: int, total: int, *, flush: bool = True) -> None:
    from redis import Redis

    with Redis(port=port) as client:
        if flush:
            client.flushall()
            client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        for start in range(0, total, 1000):
            pipe = client.pipeline(transaction=False)
            for number in range(start, start + 1000):
                pipe.xadd(STREAM, {FIELD: body(number)})
            pipe.execute()


async def measured(run: Callable[[int, int, int], Awaitable[None]], port: int, count: int) -> tuple[float, float]:
    """Messages/s, and µs of this process's CPU per message."""
    began, cpu = time.perf_counter(), time.process_time()
    await run(port, count, TOTAL)
    return TOTAL / (time.perf_counter() - began), (time.process_time() - cpu) / TOTAL * 1e6


async def restarted(run: Callable[[int, int, int], Awaitable[None]], port: int, folder: str) -> str:
    """What the loop does when the server is restarted under it."""
    with server(port, folder):
        fill(port, 1000)
        loop = asyncio.ensure_future(run(port, 100, 2000))  # it waits for the second thousand
        await asyncio.sleep(1)
    with server(port, folder):
        await asyncio.sleep(1.5)
        fill(port, 1000, flush=False)
        await asyncio.wait([loop], timeout=3)
        if not loop.done():
            loop.cancel()
            await asyncio.wait([loop], timeout=3)
            return "waits for ever"
        error = loop.exception()
        return f"raises {type(error).__name__}" if error else "reconnects by itself"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measures of each client, in turn; the median is shown")
    rounds = parser.parse_args().rounds
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    present = {}
    for name, (module, install, run) in CLIENTS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: not installed; to measure it: pip install {install}")
        else:
            present[name] = run
    figures: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, server(port, folder):
        for _ in range(rounds):
            for count in (100, 1000):
                for name, run in present.items():
                    fill(port, TOTAL)
                    figures.setdefault((name, count), []).append(asyncio.run(measured(run, port, count)))
    print(f"{'client':32} {'COUNT':>6} {'messages/s':>12} {'CPU µs/message':>16}")
    for (name, count), pairs in figures.items():
        rate, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:32} {count:6} {rate:12,.0f} {cpu:16.1f}")
    for name, run in present.items():
        if "thread" not in name:  # it cannot be cancelled
            with tempfile.TemporaryDirectory() as folder:
                print(f"{name}: the server restarted under it: {asyncio.run(restarted(run, port, folder))}")


if __name__ == "__main__":
    main()
