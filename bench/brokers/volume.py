"""Memory of a consumer that many messages have passed through."""

from __future__ import annotations

import asyncio
import json
import sys

from sluiceway import App

from ..child import Job, started, unpin
from ..memory_use import MIB, peak_bytes
from ..pairs import Case, Figure
from ..payload import order
from ..watch import Watch
from .throughput import GROUP, consumer, new_topic

CHUNK = 1_000  # messages per publish
AHEAD = 20  # chunks that are published and not yet settled at most
FEW = 20_000  # messages, of the process it is held against


async def passed(url: str, scale: float, count: int) -> dict[str, float]:
    """Take what another process publishes meanwhile, and say how large this one was at most."""
    unpin()
    count, topic = max(1, int(count * scale) // CHUNK) * CHUNK, new_topic()
    app, gate = consumer(url, topic)
    gate.open()
    order = json.dumps([f"{__name__}:feed", {"url": url, "topic": topic, "count": count}, False, True, 110])
    async with app.running():
        watch = Watch(app)
        with started([order], session=False) as feeder:
            given = 0

            def settled(_: int) -> None:
                nonlocal given
                assert feeder.stdin is not None
                due = min(watch.settled, count - AHEAD * CHUNK) // CHUNK - given  # the last ones need no leave
                if due > 0:
                    feeder.stdin.write("more\n" * due)
                    feeder.stdin.flush()
                    given += due

            watch.on_settled = settled
            await asyncio.wait_for(watch.until(count), 110)
    return {"MiB": peak_bytes() / MIB, "window": watch.largest_window}


async def feed(url: str, topic: str, count: int) -> dict[str, float]:
    """The other process: it publishes, and waits when it is far ahead."""
    some = [order(number) for number in range(CHUNK)]
    async with App(url, group=GROUP) as app:
        for number in range(count // CHUNK):
            if number >= AHEAD:
                await asyncio.to_thread(sys.stdin.readline)
            await app.publish_many(topic, some)
    return {}


def cases(broker: str, name: str, *, count: int) -> list[Case]:
    """The row of one broker. It is measured once: memory varies little, and this takes longest."""
    row = f"{name}, {count:,} passed through: rise of peak memory"
    many, few = (Job(f"{__name__}:passed", {"count": one}, pinned=False, limit=120) for one in (count, FEW))
    return [Case((Figure(row, "MiB", "MiB", "rise", 10.0, 1.0),), many, few, server=broker, most=1)]
