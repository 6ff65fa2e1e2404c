"""`Kit`: the hands of a test. It publishes, opens sources, receives, waits, and closes all at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from ...app import App
from ...errors import PublishError
from ...message import Message, Outgoing
from ...source import Source, Subscription
from ...transport import Features, Transport
from .brokers import Broker


class Kit:
    """One broker with a transport connected to it, and the few moves that every test makes."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.moment, self.step, self.soon = broker.moment, broker.step, broker.soon
        self._clients: list[Transport] = []
        self._sources: list[Source] = []

    @property
    def transport(self) -> Transport:
        return self._clients[0]

    @property
    def features(self) -> Features:
        return self.transport.features

    async def client(self) -> Transport:
        """One more transport to the same broker, connected."""
        client = self.broker.client()
        await client.connect()
        if client not in self._clients:
            self._clients.append(client)
        return client

    async def make(self, *topics: str, group: str = "g") -> None:
        """Make a group, so that what is published from now on waits for it."""
        await self.transport.ensure([Subscription(topics=topics, group=group, window=10)], create=True)

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

    async def offer(self, topic: str, *bodies: bytes, **fields: Any) -> None:
        """Publish what perhaps nobody wants, which a transport that retains nothing refuses."""
        try:
            await self.publish(topic, *bodies, **fields)
        except PublishError:
            assert not self.features.retains, f"{topic} was refused, though features.retains"

    async def get(self, source: Source, count: int) -> list[Message[Any]]:
        """Receive exactly so many messages, and hold them. Fails when they do not come."""
        return await self._receive(source, count, ack=False)

    async def take(self, source: Source, count: int) -> list[Message[Any]]:
        """Receive exactly so many messages, and ack them as they come, so that no lease ends meanwhile."""
        return await self._receive(source, count, ack=True)

    async def _receive(self, source: Source, count: int, *, ack: bool) -> list[Message[Any]]:
        messages: list[Message[Any]] = []
        try:
            async with asyncio.timeout(self.soon):
                while len(messages) < count:
                    got = await source.receive(count - len(messages))
                    messages += got
                    if ack:
                        assert not await source.settle(got, [])
        except TimeoutError:
            raise AssertionError(
                f"{len(messages)} of {count} messages came in {self.soon:g} s: {bodies(messages[:20])}; "
                f"the source says {source.status()}"
            ) from None
        return messages

    async def one(self, source: Source) -> Message[Any]:
        """Receive one message."""
        return (await self.get(source, 1))[0]

    async def nothing(self, *sources: Source, seconds: float | None = None) -> None:
        """Assert that there is nothing to receive now nor shortly."""
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(_receive(source, 1000)) for source in sources]
            done, _ = await asyncio.wait(calls, timeout=self.moment if seconds is None else seconds)
            assert not done, f"received {[bodies(call.result()) for call in done]}"
            for source in sources:
                source.resize(0)
        assert all(call.result() == [] for call in calls)
        for source in sources:
            source.resize(1000)

    async def waiting(self, source: Source, demand: int = 1000) -> asyncio.Task[list[Message[Any]]]:
        """A receive that has found nothing and waits by now."""
        call = start(source, demand)
        done, _ = await asyncio.wait([call], timeout=self.moment)
        assert not done, f"received {[bodies(call.result()) for call in done]}"
        return call

    async def end(self, call: asyncio.Task[list[Message[Any]]]) -> list[Message[Any]]:
        """What a receive that runs beside the test returns."""
        return await asyncio.wait_for(call, self.soon)

    async def at_rest(self, topic: str) -> list[bytes]:
        """The bodies that rest in a topic."""
        return [stored.body async for stored in self.transport.browse(topic)]

    def app(self, **options: Any) -> App:
        """An app over a client of its own to this broker, in the group `g`. Retries of its pipelines never end."""
        return App(self.broker.client(), **{"group": "g", "max_restarts": 1_000, **options})

    async def until(self, true: Callable[[], object], what: str) -> None:
        """Return when `true()` holds. Fails when that takes too long."""
        deadline = self.now() + self.soon
        while not true():
            assert self.now() < deadline, f"not within {self.soon:g} s: {what}"
            await asyncio.sleep(0.005)

    async def left(self, topic: str, group: str = "g") -> list[bytes]:
        """What is still there for a group, once nothing more comes; it goes back."""
        source = await self.open(topic, group=group)
        found: list[Message[Any]] = []
        while True:
            call = start(source)
            await asyncio.wait([call], timeout=self.moment)
            source.resize(0)
            messages = await call
            source.resize(1000)
            if not messages:
                break
            found += messages
        await source.aclose()
        return sorted(bodies(found))

    def now(self) -> float:
        """Seconds on the clock by which delays pass."""
        return asyncio.get_running_loop().time() if self.broker.virtual else time.monotonic()

    def passed(self, began: float, delay: float) -> None:
        """Assert that what was delayed at `began` came in its time, now."""
        seconds = self.now() - began
        assert delay - self.broker.early <= seconds <= delay + self.broker.late, f"came after {seconds:.3f} of {delay}"

    def ordered(self, messages: Sequence[Any]) -> list[bytes]:
        """The bodies as they came, where the broker orders all of a group; else sorted: order is not promised then."""
        found = bodies(messages)
        return found if self.features.order == "group" else sorted(found)

    async def __aenter__(self) -> Self:
        await self.broker.open()
        try:
            await self.client()
        except BaseException:
            await self.broker.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            for source in self._sources:
                await source.aclose()
            for client in self._clients:
                await client.aclose()
        finally:
            await self.broker.aclose()


async def _receive(source: Source, demand: int) -> list[Message[Any]]:
    return list(await source.receive(demand))


def start(source: Source, demand: int = 1000) -> asyncio.Task[list[Message[Any]]]:
    """A receive that runs beside the test."""
    return asyncio.create_task(_receive(source, demand))


def bodies(messages: Sequence[Any]) -> list[bytes]:
    return [message.body for message in messages]


def numbered(count: int) -> list[bytes]:
    """So many different bodies, in order, which is their order as bytes too where there are ten or fewer."""
    return [b"%d" % number for number in range(count)]
