"""Messages/s of plain functions, on ten threads over the memory transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Thread, get_ident
from time import perf_counter

from sluiceway import App, Message
from sluiceway.transports.memory import MemoryTransport

from .child import Job
from .memory import BODY, LINE, PLAIN, TUNED
from .pairs import Case, Figure
from .watch import Watch

THREADS = 10
COUNT = 100_000
SLEEPS = 5_000  # messages, where each sleeps
SLEEP = 0.001  # seconds


async def pipeline(scale: float, sleep: bool = False) -> dict[str, float]:
    """A consumer whose handler is a plain function."""
    count = int((SLEEPS if sleep else COUNT) * scale)
    transport = MemoryTransport()
    app = App(transport)
    seen: set[int] = set()
    saw = seen.add

    if sleep:

        @app.consumer("t", name="consume", concurrency=THREADS)
        def nap(message: Message[bytes]) -> None:
            saw(get_ident())
            time.sleep(SLEEP)

    else:

        @app.consumer("t", name="consume", concurrency=THREADS)
        def nothing(message: Message[bytes]) -> None:
            saw(get_ident())

    async with app.running() as manager:
        watch = Watch(app, lambda: transport.held("default"))
        warm_up = max(THREADS, count // 10)
        await app.publish_many("t", [BODY] * warm_up)
        await watch.until(warm_up)
        seen.clear()
        await app.publish_many("t", [BODY] * count)
        assert manager.stats()[0].held == 0
        started = perf_counter()
        await watch.until(warm_up + count)
        elapsed = perf_counter() - started
    assert len(seen) >= 2 or scale < 1, f"{len(seen)} threads took all {count} messages"
    return {"rate": count / elapsed, "threads": len(seen)}


def bare_pool(scale: float) -> dict[str, float]:
    """Ten threads without us, the better of two: the standard library's pool, and threads that pull from one queue."""
    count = int(SLEEPS * scale)
    ways: tuple[Callable[[int], None], ...] = (_mapped, _pulled)
    for way in ways:
        way(count // 10)
    rates = []
    for way in ways:
        started = perf_counter()
        way(count)
        rates.append(count / (perf_counter() - started))
    return {"rate": max(rates), "mapped": rates[0], "pulled": rates[1]}


def _nap(message: Message[bytes]) -> None:
    time.sleep(SLEEP)


def _mapped(count: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(_nap, (Message("t", BODY, "id") for _ in range(count))):
            pass


def _pulled(count: int) -> None:
    waiting: SimpleQueue[Message[bytes] | None] = SimpleQueue()

    def work() -> None:
        while (message := waiting.get()) is not None:
            _nap(message)

    threads = [Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for _ in range(count):
        waiting.put(Message("t", BODY, "id"))
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()


async def executor_each(scale: float) -> dict[str, float]:
    """What most libraries do: `run_in_executor` per message, behind a semaphore."""
    count = int(COUNT // 5 * scale)
    loop = asyncio.get_running_loop()
    slots = asyncio.Semaphore(THREADS)
    tasks: set[asyncio.Task[None]] = set()

    def nothing(message: Message[bytes]) -> None:
        return

    async def run(message: Message[bytes]) -> None:
        try:
            await loop.run_in_executor(pool, nothing, message)
        finally:
            slots.release()

    with ThreadPoolExecutor(THREADS) as pool:
        started = perf_counter()
        for _ in range(count):
            await slots.acquire()
            task = asyncio.create_task(run(Message("t", BODY, "id")))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
        return {"rate": count / (perf_counter() - started)}


OURS, LINE_PLAIN = "bench.threads:pipeline", Job(LINE.call, tuned=False)

CASES = [
    Case((Figure(f"threads, sync no-op on 10, {TUNED}", least=0.5),), Job(OURS), LINE),
    Case((Figure(f"threads, sync no-op on 10, {PLAIN}"),), Job(OURS, tuned=False), LINE_PLAIN),
    Case(
        (Figure("threads, time.sleep(0.001) on 10", least=0.85),),
        Job(OURS, {"sleep": True}),
        Job("bench.threads:bare_pool"),
    ),
    Case((Figure("for comparison: run_in_executor per message, sync no-op on 10"),),
         Job("bench.threads:executor_each"), LINE),
]  # fmt: skip
