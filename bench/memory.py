"""Messages/s over the memory transport, against a bare loop."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

from sluiceway import App, Batch, Message
from sluiceway.message import Handler
from sluiceway.middleware import Middleware
from sluiceway.transports.memory import MemoryTransport

from .child import Job
from .pairs import Case, Figure
from .watch import Watch

COUNT = 300_000
NAPS = 200_000  # messages, where each handler sleeps
NAP = 0.010  # seconds
WARM_UP = 0.1  # of the count, before the clock
BODY = b"x" * 200


async def handle(message: Message[bytes]) -> None:
    """The handler that does nothing, of every loop here."""
    return


async def bare(scale: float) -> dict[str, float]:
    """Make a message, await the handler."""
    count = int(COUNT * scale)

    async def run(count: int) -> None:
        for _ in range(count):
            await handle(Message("t", BODY, "id"))

    await run(int(count * WARM_UP))
    started = perf_counter()
    await run(count)
    return {"rate": count / (perf_counter() - started)}


async def step(message: Message[bytes], call_next: Handler) -> Any:
    """The middleware that does nothing."""
    return await call_next(message)


async def sleeper(message: Message[bytes]) -> None:
    await asyncio.sleep(NAP)


async def pipeline(
    scale: float,
    concurrency: int = 10,
    max_demand: int | None = None,
    batch: int = 0,
    publish: bool = False,
    middleware: int = 0,
    metrics: bool = False,
    sleep: bool = False,
) -> dict[str, float]:
    """A consumer over the memory transport, whose messages wait there; with `publish` they are published meanwhile.

    `middleware`: so many that do nothing round the handler; `metrics`: and the metrics round those. `sleep`: a handler
    that sleeps for `NAP` seconds.
    """
    count = int((NAPS if sleep else COUNT) * scale)
    transport = MemoryTransport()
    app = App(transport)
    chain: list[Middleware] = [step] * middleware
    if metrics:
        from prometheus_client import CollectorRegistry

        from sluiceway.middleware.metrics import Metrics

        chain.insert(0, Metrics(registry=CollectorRegistry()))
    consume = app.consumer("t", concurrency=concurrency, max_demand=max_demand, middleware=chain)(
        sleeper if sleep else handle
    )

    if batch:

        @consume.batch(size=batch)
        async def take(batch: Batch[None]) -> None:
            return

    async with app.running() as manager:
        watch = Watch(app, lambda: transport.held("default"))
        warm_up = int(count * WARM_UP) // 100 * 100
        await app.publish_many("t", [BODY] * warm_up)
        await watch.until(warm_up)
        if not publish:
            await app.publish_many("t", [BODY] * count)  # the pipeline runs when this function waits, so not yet
            assert manager.stats()[0].held == 0
        started = perf_counter()
        for _ in range(count // 1000 if publish else 0):
            await app.publish_many("t", [BODY] * 1000)
            await asyncio.sleep(0)
        await watch.until(warm_up + (count // 1000 * 1000 if publish else count))
        return {"rate": count / (perf_counter() - started), "window": watch.largest_window}


async def bare_tasks(scale: float, at_once: int = 1_000) -> dict[str, float]:
    """So many tasks that each make a message and await the sleeping handler, again and again."""
    count = int(NAPS * scale)

    async def run(count: int) -> None:
        for _ in range(count):
            await sleeper(Message("t", BODY, "id"))

    started = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(run(count // at_once))
    return {"rate": count // at_once * at_once / (perf_counter() - started)}


async def queue(scale: float, workers: int = 10) -> dict[str, float]:
    """What one writes by hand: an asyncio.Queue and some workers."""
    count = int(COUNT * scale)
    messages: asyncio.Queue[Message[bytes]] = asyncio.Queue(1000)

    async def work() -> None:
        while True:
            message = await messages.get()
            await handle(message)
            messages.task_done()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work()) for _ in range(workers)]
        started = perf_counter()
        for _ in range(count):
            await messages.put(Message("t", BODY, "id"))
        await messages.join()
        elapsed = perf_counter() - started
        for task in tasks:
            task.cancel()
    return {"rate": count / elapsed}


async def task_each(scale: float, at_once: int = 10) -> dict[str, float]:
    """What most libraries do: a task per message, behind a semaphore."""
    count = int(COUNT * scale)
    slots = asyncio.Semaphore(at_once)
    tasks: set[asyncio.Task[None]] = set()

    async def run(message: Message[bytes]) -> None:
        try:
            await handle(message)
        finally:
            slots.release()

    started = perf_counter()
    for _ in range(count):
        await slots.acquire()
        task = asyncio.create_task(run(Message("t", BODY, "id")))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    while tasks:
        await asyncio.wait(tasks)
    return {"rate": count / (perf_counter() - started)}


BARE, PIPELINE = "bench.memory:bare", "bench.memory:pipeline"
TUNED, PLAIN = "gc set", "gc default"
LINE = Job(PIPELINE)


def _row(name: str, given: dict[str, Any], *, least: float | None = None, tuned: bool = True) -> Case:
    figure = Figure(f"memory, {name}, {TUNED if tuned else PLAIN}", least=least)
    return Case((figure,), Job(PIPELINE, given, tuned=tuned), Job(BARE, tuned=tuned))


def _against_first(name: str, given: dict[str, Any], *, least: float | None = None, tuned: bool = True) -> Case:
    """A row whose limit is the first row's pipeline."""
    figure = Figure(f"memory, {name}, {TUNED if tuned else PLAIN}", least=least)
    return Case((figure,), Job(PIPELINE, given, tuned=tuned), Job(PIPELINE, tuned=tuned))


def _other(name: str, call: str) -> Case:
    return Case((Figure(f"for comparison: {name}, {TUNED}"),), Job(call), Job(BARE))


CASES = [
    _row("async no-op", {}, least=0.24),
    _row("async no-op", {}, tuned=False),
    _against_first("one batcher of 100", {"batch": 100}, least=0.75),
    _against_first("one batcher of 100", {"batch": 100}, tuned=False),
    _against_first("metrics and one middleware", {"middleware": 1, "metrics": True}, least=0.65),
    _against_first("8 middleware", {"middleware": 8}, least=0.3),
    _against_first("concurrency=1,000", {"concurrency": 1000}, least=0.6),
    Case(
        (Figure("memory, asyncio.sleep(0.010) in 1,000 processors", least=0.9),),
        Job(PIPELINE, {"concurrency": 1000, "sleep": True}),
        Job("bench.memory:bare_tasks"),
    ),
    _row("publishing inside the clock", {"publish": True}),
    *(_row(f"max_demand={size}", {"max_demand": size}) for size in (20, 100, 1000)),
    _other("asyncio.Queue, 10 workers", "bench.memory:queue"),
    _other("a task per message behind a semaphore of 10", "bench.memory:task_each"),
]
