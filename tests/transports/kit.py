"""What the contract suite needs of a broker, and the few moves that every test makes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sluiceway.message import Message, Outgoing
from sluiceway.source import Source, Subscription
from sluiceway.transport import Transport
from sluiceway.transports.memory import MemorySource, MemoryTransport

MOMENT = 0.1  # seconds in which nothing that should not come has come; what is delayed waits for some of these
EARLY = 0.01  # seconds that a wall clock and the loop's may differ by
SOON = 20.0  # seconds after which what should come is said to be lost


class Broker(Protocol):
    """One broker, empty at the start of a test. A transport passes the suite when its broker is written like these."""

    def client(self) -> Transport:
        """A transport of its own to this broker, not connected yet."""
        ...

    async def expire(self, source: Source) -> None:
        """Return when the leases of all that the source holds have ended."""
        ...

    async def die_holding(self, topic: str, group: str, count: int) -> None:
        """Let a process receive so many messages and die with them in hand."""
        ...


class MemoryBroker:
    """In the same process, and in virtual time."""

    def __init__(self, folder: Path) -> None:
        self._transport = MemoryTransport(max_payload=100_000)

    def client(self) -> Transport:
        return self._transport

    async def expire(self, source: Source) -> None:
        assert isinstance(source, MemorySource)
        self._transport.expire(source)

    async def die_holding(self, topic: str, group: str, count: int) -> None:
        source = await self._transport.subscribe(Subscription(topics=(topic,), group=group, window=count))
        assert len(await source.receive(count)) == count
        self._transport.crash(source)


class SQLiteBroker:
    """A file; other processes may use it too."""

    LEASE = 0.5
    _DIE = """
import asyncio, os, sys
from sluiceway.source import Subscription
from sluiceway.transports.sqlite import SQLiteTransport

async def main(path, topic, group, count):
    transport = SQLiteTransport(path)
    await transport.connect()
    source = await transport.subscribe(Subscription(topics=(topic,), group=group, window=count))
    held = []
    while len(held) < count:
        held += await source.receive(count - len(held))
    os._exit(0)

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
"""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "contract.db"

    def client(self) -> Transport:
        from sluiceway.transports.sqlite import SQLiteTransport

        return SQLiteTransport(self._path, lease=self.LEASE, max_payload=100_000)

    async def expire(self, source: Source) -> None:
        await asyncio.sleep(self.LEASE * 1.2)  # nobody renews in these tests

    async def die_holding(self, topic: str, group: str, count: int) -> None:
        command = [sys.executable, "-c", self._DIE, str(self._path), topic, group, str(count)]
        await asyncio.to_thread(subprocess.run, command, check=True)


class Kit:
    """A test's hands: it publishes, opens sources and receives, and closes all at the end."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self._clients: list[Transport] = []
        self._sources: list[Source] = []

    @property
    def transport(self) -> Transport:
        return self._clients[0]

    async def client(self) -> Transport:
        """One more transport to the same broker, connected."""
        client = self.broker.client()
        await client.connect()
        self._clients.append(client)
        return client

    async def open(self, *topics: str, group: str = "g", client: Transport | None = None, **options: Any) -> Source:
        """Subscribe."""
        subscription = Subscription(topics=topics, group=group, **{"window": 1000, **options})
        source = await (client or self.transport).subscribe(subscription)
        self._sources.append(source)
        return source

    async def publish(self, topic: str, *bodies: bytes, **fields: Any) -> list[Outgoing]:
        """Publish a message per body, in one call."""
        messages = [Outgoing(topic, body, **fields) for body in bodies]
        await self.transport.publish(messages)
        return messages

    async def get(self, source: Source, count: int) -> list[Message[Any]]:
        """Receive exactly so many messages."""
        messages: list[Message[Any]] = []
        async with asyncio.timeout(SOON):
            while len(messages) < count:
                messages += await source.receive(count - len(messages))
        return messages

    async def one(self, source: Source) -> Message[Any]:
        """Receive one message."""
        return (await self.get(source, 1))[0]

    async def nothing(self, *sources: Source, seconds: float = MOMENT) -> None:
        """Assert that there is nothing to receive now nor shortly."""
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(_receive(source, 1000)) for source in sources]
            done, _ = await asyncio.wait(calls, timeout=seconds)
            assert not done, f"received {[bodies(call.result()) for call in done]}"
            for source in sources:
                source.resize(0)
        assert all(call.result() == [] for call in calls)
        for source in sources:
            source.resize(1000)

    async def at_rest(self, topic: str) -> list[bytes]:
        """The bodies that rest in a topic."""
        return [stored.body async for stored in self.transport.browse(topic)]

    async def aclose(self) -> None:
        for source in self._sources:
            await source.aclose()
        for client in self._clients:
            await client.aclose()


async def _receive(source: Source, demand: int) -> list[Message[Any]]:
    return list(await source.receive(demand))


def start(source: Source, demand: int = 1000) -> asyncio.Task[list[Message[Any]]]:
    """A receive that runs beside the test."""
    return asyncio.create_task(_receive(source, demand))


async def waiting(source: Source, demand: int = 1000) -> asyncio.Task[list[Message[Any]]]:
    """A receive that has found nothing and waits by now."""
    call = start(source, demand)
    done, _ = await asyncio.wait([call], timeout=MOMENT)
    assert not done
    return call


def now() -> float:
    """Seconds on the clock by which delays pass."""
    return asyncio.get_running_loop().time()


def bodies(messages: Sequence[Any]) -> list[bytes]:
    return [message.body for message in messages]


def numbered(count: int) -> list[bytes]:
    """So many different bodies, in order."""
    return [b"%d" % number for number in range(count)]
