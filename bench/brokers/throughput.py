"""Messages/s over a real broker, against what one writes by hand over its fastest client."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from sluiceway import App, Message, Pause

from .. import together
from ..child import Job, pin, unpin
from ..pairs import Case, Figure
from ..payload import Order, order
from ..watch import Watch

CHUNK = 1_000  # messages per publish
GROUP = "bench"
WORK = 0.0001  # seconds of CPU that the busy handler takes


def by_hand(broker: str) -> Any:
    """What is written by hand for a broker: `consume` and `publish`, which return seconds, and `held`."""
    return importlib.import_module(f"{__package__}.{broker}")


def new_topic() -> str:
    """A topic of this measure's own."""
    return f"orders-{os.getpid()}"


async def nothing(message: Message[Order]) -> None:
    """The handler that does nothing."""


async def compute(message: Message[Order]) -> None:
    """A handler that keeps a CPU busy."""
    end = time.thread_time() + WORK
    while time.thread_time() < end:
        pass


Handler = Callable[[Message[Order]], Awaitable[None]]


def consumer(url: str, topic: str, handler: Handler = nothing) -> tuple[App, Pause]:
    """The app under test: typed decode, the handler, ack after it. Its gate is shut."""
    app, gate = App(url, group=GROUP), Pause()
    gate.close()
    app.consumer(topic, name="consume", concurrency=10, gates=[gate])(handler)
    return app, gate


@asynccontextmanager
async def filled(url: str, topic: str, count: int, handler: Handler = nothing) -> AsyncIterator[tuple[App, Pause]]:
    """The app, running, with `count` messages that wait at the broker for its gate to open."""
    app, gate = consumer(url, topic, handler)
    async with app.running():
        for start in range(0, count, CHUNK):
            await app.publish_many(topic, map(order, range(start, min(count, start + CHUNK))))
        yield app, gate


async def ours(url: str, scale: float, broker: str, count: int) -> dict[str, float]:
    """A consumer takes everything that waits."""
    count, topic = int(count * scale), new_topic()
    async with filled(url, topic, count) as (app, gate):
        watch = Watch(app)
        with watch.sampling(by_hand(broker).held(url, topic, GROUP)):
            began = perf_counter()
            gate.open()
            await watch.until(count)
            elapsed = perf_counter() - began
        watch.check()
    return {"rate": count / elapsed, "window": watch.largest_window}


async def limit(url: str, scale: float, broker: str, count: int, loop: str = "consume") -> dict[str, float]:
    """The same messages of the same group, taken by hand."""
    count, topic = int(count * scale), new_topic()
    async with filled(url, topic, count):
        pass
    return {"rate": count / await asyncio.wait_for(getattr(by_hand(broker), loop)(url, topic, GROUP, count), 60)}


# -- several processes ------------------------------------------------------------------------------------------------


def workers(url: str, scale: float, processes: int, count: int) -> dict[str, float]:
    """Some processes take everything that waits; the handler computes. The second shares the server's core."""
    unpin()
    count, topic = int(count * scale), new_topic()

    async def fill() -> None:
        async with filled(url, topic, count):
            pass

    asyncio.run(fill())
    given = [{"url": url, "topic": topic, "core": number % 2 - 1, "count": count} for number in range(processes)]
    return {"rate": together.rate(f"{__name__}:worker", given, count)}


async def worker(url: str, topic: str, core: int, count: int) -> dict[str, float]:
    pin(core)
    return await together.work(*consumer(url, topic, compute), count)


# -- publishing -------------------------------------------------------------------------------------------------------


async def publish(url: str, scale: float, broker: str, count: int) -> dict[str, float]:
    """Publish to a group that waits, so many per call; each call is confirmed when it returns."""
    topic, orders = new_topic(), _orders(count, scale)
    app, _ = consumer(url, topic)
    async with app.running():
        began = perf_counter()
        for start in range(0, len(orders), CHUNK):
            await app.publish_many(topic, orders[start : start + CHUNK])
        return {"rate": len(orders) / (perf_counter() - began)}


async def publish_by_hand(url: str, scale: float, broker: str, count: int) -> dict[str, float]:
    """The same by hand."""
    topic, orders = new_topic(), _orders(count, scale)
    async with filled(url, topic, 0):
        pass
    return {"rate": len(orders) / await asyncio.wait_for(by_hand(broker).publish(url, topic, orders, CHUNK), 60)}


def _orders(count: int, scale: float) -> Sequence[Order]:
    return [order(number) for number in range(int(count * scale))]


def cases(broker: str, name: str, *, count: int, least: float) -> list[Case]:
    """The rows of one broker, which `name` begins; `count` messages per measure, so that each takes about a second."""
    given = {"broker": broker, "count": count}

    def job(call: str, **more: Any) -> Job:
        return Job(f"{__name__}:{call}", {**given, **more})

    one, two = (Job(f"{__name__}:workers", {"processes": n, "count": 8_000}, pinned=False) for n in (1, 2))
    bare = [
        Case(
            (Figure(f"{name}, against the bare parser"),), job("ours"), job("limit", loop="consume_bare"), server=broker
        )
    ]
    return [
        *(bare if hasattr(by_hand(broker), "consume_bare") else ()),
        Case(
            (Figure(f"{name}, typed 200-byte JSON, gc set", least=least),), job("ours"), job("limit"), server=broker
        ),
        Case(
            (Figure(f"{name}, publish 1,000 at a time, confirmed when it returns", least=0.8),),
            job("publish"), job("publish_by_hand"), server=broker,
        ),
        Case((Figure(f"{name}, 100 µs of CPU in 2 processes, against 1"),), two, one, server=broker, most=3),
    ]  # fmt: skip
