"""What the tests of the SQLite transport share."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sluiceway.message import Message, Outgoing
from sluiceway.source import Subscription
from sluiceway.transports.sqlite import SQLiteSource, SQLiteTransport

SOON = 20.0  # seconds after which what should come is said to be lost


@asynccontextmanager
async def connected(path: Path, **options: Any) -> AsyncIterator[SQLiteTransport]:
    transport = SQLiteTransport(path, **options)
    await transport.connect()
    try:
        yield transport
    finally:
        await transport.aclose()


async def subscribe(transport: SQLiteTransport, *topics: str, group: str = "g", **options: Any) -> SQLiteSource:
    return await transport.subscribe(Subscription(topics=topics, group=group, **{"window": 1000, **options}))


async def publish(transport: SQLiteTransport, topic: str, *bodies: bytes, **fields: Any) -> None:
    await transport.publish([Outgoing(topic, body, **fields) for body in bodies])


async def get(source: SQLiteSource, count: int) -> list[Message[Any]]:
    messages: list[Message[Any]] = []
    async with asyncio.timeout(SOON):
        while len(messages) < count:
            messages += await source.receive(count - len(messages))
    return messages


def bodies(messages: Sequence[Any]) -> list[bytes]:
    return [message.body for message in messages]


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


class Worker:
    """A process that runs `sqlite_worker.py`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, what: str, path: Path, *arguments: object, lease: float = 30.0) -> Worker:
        script = Path(__file__).with_name("sqlite_worker.py")
        pipe = asyncio.subprocess.PIPE
        command = [str(script), what, str(path), str(lease), *map(str, arguments)]
        return cls(await asyncio.create_subprocess_exec(sys.executable, *command, stdin=pipe, stdout=pipe, limit=2**24))

    async def line(self) -> list[str]:
        """What it says next; nothing when it has ended."""
        assert self.process.stdout is not None
        async with asyncio.timeout(SOON):
            line = (await self.process.stdout.readline()).decode()
        return line.split() if line.endswith("\n") else []

    def tell(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()
