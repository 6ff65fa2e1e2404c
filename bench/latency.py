"""From publish to settled, in an idle pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from time import perf_counter_ns

from sluiceway import App, Message
from sluiceway.telemetry import Settled
from sluiceway.transports.memory import MemoryTransport

from .child import Job, started, unpin
from .pairs import Case, Figure

SAMPLES = 3_000
TURNS = 20  # of the loop, between two messages


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def memory(scale: float, pause: float = 0.0, plain: bool = False) -> dict[str, float]:
    """In the loop that the command line takes, which is uvloop's where that is installed; or in asyncio's own."""
    factory = asyncio.new_event_loop
    if not plain:
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_memory(scale, pause))


async def _memory(scale: float, pause: float) -> dict[str, float]:
    """One message at a time through a pipeline that waits for it, `pause` seconds after the one before."""
    app = App(MemoryTransport())

    @app.consumer("t", concurrency=10)
    async def consume(message: Message[bytes]) -> None:
        return

    micros: list[float] = []
    samples = max(20, int(SAMPLES * scale))
    settled: asyncio.Future[int]

    async with app.running() as manager:
        app.telemetry.attach(lambda event: settled.set_result(perf_counter_ns()), Settled)
        for number in range(samples + samples // 10):
            for _ in range(TURNS):  # all that was to be done for the one before is done
                await asyncio.sleep(0)
            if pause:
                await asyncio.sleep(pause)
            if number % 50 == 0:  # not each time: to look takes longer than what is measured
                (stats,) = manager.stats()
                assert stats.demand > 0
                assert stats.held == 0
            settled = asyncio.get_running_loop().create_future()
            began = perf_counter_ns()
            await app.publish("t", b"x")
            micros.append((await settled - began) / 1000)
    kept = micros[samples // 10 :]
    return {"p50": quantile(kept, 0.5), "p99": quantile(kept, 0.99)}


def sqlite(folder: str, scale: float) -> dict[str, float]:
    """Over a file of its own."""
    return two_processes(f"sqlite:///{Path(folder)}/latency-{os.getpid()}.db", scale)


def two_processes(url: str, scale: float, samples: int = 250, idle: float = 5.0) -> dict[str, float]:
    """One process publishes, another consumes; before that, what the consumer needs in `idle` seconds of nothing."""
    unpin()
    topic, samples = f"idle-{os.getpid()}", max(10, int(samples * scale))
    given = {"url": url, "topic": topic, "samples": samples, "idle": idle * scale}
    with started([json.dumps(["bench.latency:consumer", given, False, True, 55])], session=False) as other:
        assert other.stdout is not None
        cpu = float(other.stdout.readline() or "nan")
        published = asyncio.run(_publish(url, topic, samples))
        out, err = other.communicate(timeout=30)
        assert other.returncode == 0, err
    settled: list[float] = json.loads(out.strip().splitlines()[-1])["settled"]
    millis = [(end - begin) * 1000 for begin, end in zip(published, settled, strict=True)]
    return {"p50": quantile(millis, 0.5), "p99": quantile(millis, 0.99), "cpu": cpu * 100}


async def _publish(url: str, topic: str, samples: int) -> list[float]:
    begun = []
    async with App(url) as app:
        for _ in range(samples):
            await asyncio.sleep(random.uniform(0.005, 0.035))
            begun.append(time.monotonic())
            await app.publish(topic, b"x")
    return begun


async def consumer(url: str, topic: str, samples: int, idle: float) -> dict[str, list[float]]:
    """The other process: says what share of a core it needed while idle, then when each settle returned."""
    app = App(url)

    @app.consumer(topic, concurrency=10)
    async def consume(message: Message[bytes]) -> None:
        return

    times: list[float] = []
    all_settled = asyncio.Event()

    def settled(event: Settled) -> None:
        times.extend([time.monotonic()] * event.count)
        if event.outcome != "ack" or len(times) >= samples:
            all_settled.set()

    async with app.running():
        app.telemetry.attach(settled, Settled)  # and nothing else, so that the way is that of an app without listeners
        await asyncio.sleep(min(1.0, idle))  # what is done once at the start is not idling
        print(await idle_cpu(idle), flush=True)
        await all_settled.wait()
    assert len(times) == samples, f"{len(times)} of {samples} messages ended, and one in another way than an ack"
    return {"settled": times}


async def idle_cpu(seconds: float) -> float:
    """The share of a core that this process needs while it does nothing."""
    before, began = time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    return (time.process_time() - before) / (time.monotonic() - began)


def import_time(scale: float) -> dict[str, float]:
    """`import sluiceway` in a new interpreter, the bytecode cached as it is after an installation."""
    code = "import time; t = time.perf_counter(); import sluiceway; print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(2):
            told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    return {"ms": float(told.stdout) * 1000}


CASES = [
    Case(
        (
            Figure("memory, idle: publish to settled, p50", "µs", "p50", "bound", 30.0, 1.0),
            Figure("memory, idle: publish to settled, p99", "µs", "p99", "bound", 120.0, 1.0),
        ),
        Job("bench.latency:memory"),
    ),
    Case(
        (
            Figure("memory, idle, asyncio's own loop: publish to settled, p50", "µs", "p50", "bound", 30.0, 1.0),
            Figure("memory, idle, asyncio's own loop: publish to settled, p99", "µs", "p99", "bound", 120.0, 1.0),
        ),
        Job("bench.latency:memory", {"plain": True}),
    ),
    Case(
        (
            Figure("memory, idle for 1 ms, the core asleep: publish to settled, p50", "µs", "p50", "bound"),
            Figure("memory, idle for 1 ms, the core asleep: publish to settled, p99", "µs", "p99", "bound"),
        ),
        Job("bench.latency:memory", {"pause": 0.001}),
    ),
    Case(
        (
            Figure("SQLite, two processes, idle: publish to settled, p50", "ms", "p50", "bound", 5.0, 1.0),
            Figure("SQLite, two processes, idle: publish to settled, p99", "ms", "p99", "bound", 25.0, 1.0),
            Figure("SQLite, idle consumer, CPU", "% of a core", "cpu", "bound", 1.0, 1.0),
        ),
        Job("bench.latency:sqlite", pinned=False),
        folder=True,
    ),
    Case((Figure("import sluiceway", "ms", "ms", "bound", 100.0),), Job("bench.latency:import_time", tuned=False)),
]
