"""NATS: what stands between nats-py and the wire, in loops that pull 200-byte JSON, decode it and ack it.

`python -m bench.clients.nats` starts a nats-server of its own on loopback. `fetch` is the loop that nats-py's documents
show; `pull` is one subscription with a callback and pull requests of our own; `wire` is nats-py with the parser and the
write of `sluiceway.transports.nats.wire`; `bare` speaks the protocol over a plain asyncio stream, the least that Python
can do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nats

from ..payload import decode, encode, order

TOTAL = 40_000
SUBJECT, GROUP = "orders", "bench"
NEXT = f"$JS.API.CONSUMER.MSG.NEXT.{SUBJECT}.{GROUP}"


def body(number: int) -> bytes:
    return encode(order(number))


async def fetch(port: int, count: int, total: int) -> None:
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    pull = await client.jetstream().pull_subscribe_bind(GROUP, SUBJECT)
    done = 0
    while done < total:
        messages = await pull.fetch(count)
        for message in messages:
            decode(message.data)
            await message.ack()
        done += len(messages)
    await client.flush()
    await client.close()


async def pull(port: int, count: int, total: int) -> None:
    """The public API alone: one callback for all messages, the acks published one by one."""
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    got: list[Any] = []
    full = asyncio.Event()

    async def take(message: Any) -> None:
        got.append(message)
        if len(got) == count:
            full.set()

    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=take, pending_msgs_limit=-1, pending_bytes_limit=-1)
    for _ in range(0, total, count):
        await client.publish(NEXT, b'{"batch": %d}' % count, reply=inbox)
        await full.wait()
        full.clear()
        messages, got = got, []
        for message in messages:
            decode(message.data)
            await client.publish(message.reply)
    await client.flush()
    await client.close()


async def wire(port: int, count: int, total: int) -> None:
    from sluiceway.transports.nats.wire import Frame, WireClient

    got: list[Frame] = []
    full = asyncio.Event()

    def take(found: dict[bytes, list[Frame]]) -> None:
        for frames in found.values():
            got.extend(frames)
        if len(got) >= count:
            full.set()

    client = WireClient(take)
    await client.connect(f"nats://127.0.0.1:{port}")
    inbox = client.new_inbox()
    await client.subscribe(inbox)
    for _ in range(0, total, count):
        await client.publish(NEXT, b'{"batch": %d}' % count, reply=inbox)
        await full.wait()
        full.clear()
        for _, _, _, data in got:
            decode(data)
        client.write(b"".join([b"PUB %b 0\r\n\r\n" % reply for _, reply, _, _ in got]))
        got.clear()
    await client.flush()
    await client.close()


async def bare(port: int, count: int, total: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.readline()
    writer.write(b'CONNECT {"verbose": false, "headers": true, "no_responders": true}\r\nSUB in 1\r\n')
    request, rest = b'{"batch": %d}' % count, b""
    for _ in range(0, total, count):
        writer.write(b"PUB %b in %d\r\n%b\r\n" % (NEXT.encode(), len(request), request))
        replies: list[bytes] = []
        while len(replies) < count:
            data = rest + await reader.read(262_144)
            at = 0
            while (end := data.find(b"\r\n", at)) >= 0:
                words = data[at:end].split()
                size = int(words[-1]) if words[0] == b"MSG" else -2
                if end + size + 4 > len(data):
                    break
                if size >= 0:
                    decode(data[end + 2 : end + 2 + size])
                    replies.append(words[3])
                at = end + 4 + size
            rest = data[at:]
        writer.write(b"".join([b"PUB %b 0\r\n\r\n" % reply for reply in replies]))
    writer.write(b"PING\r\n")
    while b"PONG" not in await reader.readline():
        pass
    writer.close()


LOOPS: dict[str, Callable[[int, int, int], Awaitable[None]]] = {
    "fetch": fetch,
    "pull": pull,
    "wire": wire,
    "bare": bare,
}


@contextmanager
def server() -> Iterator[int]:
    """A nats-server on a free port, with its data in a folder that goes."""
    program = shutil.which("nats-server")
    if program is None:
        raise SystemExit("nats-server is not installed; on Debian or Ubuntu: apt-get install nats-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nats.conf"
        config.write_text(json.dumps({"listen": f"127.0.0.1:{port}", "jetstream": {"store_dir": folder}}))
        process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.02)
            yield port
        finally:
            process.kill()
            process.wait()


async def fill(port: int, total: int) -> None:
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    manager = client.jetstream()
    await manager.add_stream(name=SUBJECT, subjects=[SUBJECT])
    for number in range(total):
        await client.publish(SUBJECT, body(number))
    await client.flush()
    while (await manager.stream_info(SUBJECT)).state.messages < total:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    await client.close()


async def measure(port: int, name: str, count: int, total: int) -> float:
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    manager = client.jetstream()
    await manager.add_consumer(SUBJECT, durable_name=GROUP, ack_policy="explicit", max_ack_pending=-1)
    began = time.perf_counter()
    await asyncio.wait_for(LOOPS[name](port, count, total), 60)
    elapsed = time.perf_counter() - began
    while (await manager.consumer_info(SUBJECT, GROUP)).num_ack_pending:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await manager.delete_consumer(SUBJECT, GROUP)
    await client.close()
    return total / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=500, help="messages per pull")
    given = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in LOOPS}
    with server() as port:
        asyncio.run(fill(port, TOTAL))
        for _ in range(given.rounds):
            for name in LOOPS:
                rates[name].append(asyncio.run(measure(port, name, given.count, TOTAL)))
    for name, found in rates.items():
        print(f"{name:8} {statistics.median(found):>10,.0f} messages/s")


if __name__ == "__main__":
    main()
