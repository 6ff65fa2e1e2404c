"""Consumers of a real broker that wait for messages: how soon they have one, and what they need meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from time import perf_counter
from typing import Any

from sluiceway import App, Message

from ..child import Job, started, unpin
from ..latency import idle_cpu, quantile, two_processes
from ..pairs import Case, Figure
from ..payload import Order, order
from ..watch import Watch
from .throughput import GROUP, filled, new_topic

CONSUMERS = 100
IDLE = 4.0  # seconds in which CPU time is measured
SECONDS = 3.0  # of load
TICK = 0.005  # seconds between publishes under load


def one_at_a_time(url: str, scale: float, options: str) -> dict[str, float]:
    """One process publishes, another consumes."""
    return two_processes(url + options, scale, samples=150, idle=IDLE)


async def many(url: str, scale: float, options: str) -> dict[str, float]:
    """A hundred consumers in one app: how long they take to start when their groups are made and when they are there,
    and the share of a core that all need while nothing happens."""
    taken = []
    for _ in range(2):
        app = App(url + options)
        for number in range(max(2, int(CONSUMERS * scale))):

            @app.consumer(f"many.{number}", name=f"consumer-{number}")
            async def consume(message: Message[bytes]) -> None:
                return

        began = perf_counter()
        async with app.running() as manager:
            taken.append(perf_counter() - began)
            assert all(one.state == "running" for one in manager.stats())
            if len(taken) == 2:
                await asyncio.sleep(1.0)  # what is done once at the start is not idling
                cpu = await idle_cpu(max(0.5, IDLE * scale))
    return {"new": taken[0], "start": taken[1], "cpu": cpu * 100}


# -- under load -------------------------------------------------------------------------------------------------------


def loaded(url: str, scale: float, count: int) -> dict[str, float]:
    """One process publishes half as fast as another could, or as that one can take, which it has measured before."""
    unpin()
    topic, seconds = new_topic(), max(0.2, SECONDS * scale)
    given = {"url": url, "topic": topic, "count": max(1_000, int(count * scale))}
    with started([json.dumps([f"{__name__}:taker", given, False, True, 55])], session=False) as other:
        assert other.stdout is not None
        line = other.stdout.readline()
        assert line, other.communicate()[1]
        rate = float(line) / 2
        sent = asyncio.run(_publish(url, topic, rate, seconds))
        out, err = other.communicate(f"{sent}\n", timeout=40)
        assert other.returncode == 0, err
    figures: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return {**figures, "rate": sent / seconds}


async def _publish(url: str, topic: str, rate: float, seconds: float) -> int:
    """Evenly, `rate` messages/s for so many seconds; what is late goes with the next. `cents`: when each went out."""
    sent = 0
    made = order(0)
    async with App(url, group=GROUP) as app:
        began = time.monotonic()
        while (past := time.monotonic() - began) < seconds:
            due = int(rate * past) - sent
            if due > 0:
                made.cents = time.monotonic_ns()
                await app.publish_many(topic, [made] * due)
                sent += due
            await asyncio.sleep(TICK)
    return sent


async def taker(url: str, topic: str, count: int) -> dict[str, float]:
    """The other process: says how many messages/s it publishes or takes, whichever are fewer, then how long those took
    that came later."""
    begun: list[int] = []
    taken: list[float] = []

    async def note(message: Message[Order]) -> None:
        begun.append(message.payload.cents)

    def settled(number: int) -> None:
        now = time.monotonic_ns()
        taken.extend((now - one) / 1e6 for one in begun[:number])
        del begun[:number]

    began = perf_counter()
    async with filled(url, topic, count, note) as (app, gate):
        publishing = perf_counter() - began
        watch = Watch(app)
        watch.on_settled = settled
        began = perf_counter()
        gate.open()
        await watch.until(count)
        print(count / max(publishing, perf_counter() - began), flush=True)
        taken.clear()
        sent = int(await asyncio.to_thread(input))
        await watch.until(count + sent)
    assert len(taken) == sent
    return {"p50": quantile(taken, 0.5), "p99": quantile(taken, 0.99)}


def cases(broker: str, name: str, *, count: int, p50: float, alive: str) -> list[Case]:
    """The rows of one broker, which `name` begins. `p50`: milliseconds, the bound of an idle pipeline. `alive`: the
    option of its URL for leases or heartbeats, which must be short enough to be part of what is idle."""

    def job(call: str, **given: Any) -> Job:
        return Job(f"{__name__}:{call}", given, pinned=False)

    return [
        Case(
            (
                Figure(f"{name}, two processes, idle: publish to settled, p50", "ms", "p50", "bound", p50, 1.0),
                Figure(f"{name}, two processes, idle: publish to settled, p99", "ms", "p99", "bound"),
                Figure(f"{name}, idle consumer, CPU", "% of a core", "cpu", "bound", 1.0, 1.0),
            ),
            job("one_at_a_time", options=f"?{alive}=3"), server=broker, most=3,
        ),
        Case(
            (
                Figure(f"{name}, two processes, at half the throughput: publish to settled, p99", "ms", "p99", "bound"),
                Figure(f"{name}, two processes, at half the throughput: published meanwhile"),
            ),
            job("loaded", count=count), server=broker, most=3,
        ),
        Case(
            (
                Figure(f"{name}, {CONSUMERS} consumers in one app, start", "s", "start", "bound", 2.0, 1.0),
                Figure(f"{name}, {CONSUMERS} consumers in one app, first start: makes groups", "s", "new", "bound"),
                Figure(f"{name}, {CONSUMERS} idle consumers in one app, CPU", "% of a core", "cpu", "bound", 3.0, 1.0),
            ),
            Job(f"{__name__}:many", {"options": f"?{alive}=10"}), server=broker, most=3,
        ),
    ]  # fmt: skip
