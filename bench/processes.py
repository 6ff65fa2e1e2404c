"""Messages/s of a handler that keeps a CPU busy, in worker processes over the memory transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from time import perf_counter

from sluiceway import App, Message, consumer
from sluiceway.transports.memory import MemoryTransport

from .child import Job
from .pairs import Case, Figure

COUNT = 3_000  # messages
WORK = 0.001  # seconds of CPU that each takes
WARM_UP = 300


@consumer("t", name="consume", executor="process")
def busy(message: Message[bytes]) -> None:
    end = time.thread_time() + WORK
    while time.thread_time() < end:
        pass


async def pipeline(scale: float, workers: int) -> dict[str, float]:
    """The rate with so many worker processes."""
    count = int(COUNT * scale)
    app = App(MemoryTransport(), consumers=[busy])
    app.consumers["consume"].override("concurrency", str(workers))
    async with app.running() as manager:
        await app.publish_many("t", [b"x"] * WARM_UP)
        await _until(lambda: manager.stats()[0].finished, WARM_UP)
        started = perf_counter()
        await app.publish_many("t", [b"x"] * count)
        await _until(lambda: manager.stats()[0].finished, WARM_UP + count)
        return {"rate": count / (perf_counter() - started)}


async def _until(finished: Callable[[], int], count: int) -> None:
    while finished() < count:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


OURS = "bench.processes:pipeline"

CASES = [
    Case(
        (Figure("processes, 1 ms of CPU on 2 workers, against 1", least=1.8),),
        Job(OURS, {"workers": 2}, pinned=False),
        Job(OURS, {"workers": 1}, pinned=False),
    ),
]
