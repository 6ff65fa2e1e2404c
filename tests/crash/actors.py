"""What the crash tests run in processes of their own: workers, and publishers that can be killed at any instant.

`python -m tests.crash.actors worker` runs the app as a user's program would; `sluiceway run tests.crash.actors:app`
runs it from the command line. What they are told is in the environment variable CRASH_CONFIG, as JSON. What they did is
in a ledger of their own, which owes nothing to the product.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from sluiceway import App, Batch, Message, PublishError, Retry

VARIABLE = "CRASH_CONFIG"
PARENT = "CRASH_PARENT"
TOPIC = "jobs"
OUTPUT = "done"


class Config(msgspec.Struct, kw_only=True):
    """What one process of a test does. `fates` are given to the published messages in turn."""

    db: str
    ledger: str
    lease: float = 30.0
    mode: str = "async"  # async, thread, or block: `time.sleep` in an async def
    work: tuple[float, float] = (0.0, 0.0)  # seconds that a handler takes, at least and at most
    gate: str | None = None  # a file that has to be there before a handler returns
    ordered: bool = False
    outputs: bool = False  # each message publishes one more, to OUTPUT, with its settle
    concurrency: int = 10
    max_demand: int | None = None
    batch: int = 0
    batch_timeout: float = 0.05
    batch_work: float = 0.0
    attempts: int = 0  # 0: the default Retry
    base_delay: float = 0.02
    shutdown_timeout: float = 25.0
    fates: tuple[str, ...] = ("ok",)
    first: int = 0
    chunk: int = 1
    pause: float = 0.0
    padding: int = 0
    keys: int = 0

    @property
    def url(self) -> str:
        return f"sqlite:///{self.db}?lease={self.lease}"


class Job(msgspec.Struct):
    """The payload. `fate`: ok, fail:2 (fails twice, then is well), always (fails), poison, batch-poison, die:2 (kills
    its process at its first two attempts), die-fail (kills its process, then fails, then is well)."""

    n: int
    fate: str = "ok"
    padding: str = ""


class Ledger:
    """One line per event, `pid count nanoseconds event n attempt id`, each in one write at the end of the file.

    The kernel has a line as soon as `os.write` returns, so no SIGKILL takes it back.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._count = itertools.count()

    def note(self, event: str, n: int = -1, attempt: int = 0, what: str = "-") -> None:
        line = f"{os.getpid()} {next(self._count)} {time.monotonic_ns()} {event} {n} {attempt} {what}\n"
        os.write(self._file, line.encode())


class Failure(Exception):
    """What fate wanted."""


def make_app(config: Config) -> App:
    ledger = Ledger(config.ledger)

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        ledger.note("up")
        yield
        ledger.note("down")

    def begin(message: Message[Job]) -> float:
        ledger.note("start", message.payload.n, message.attempt, message.id)
        deadly = {"poison": 99, "die:1": 1, "die:2": 2, "die-fail": 1}.get(message.payload.fate, 0)
        if message.attempt <= deadly:
            os._exit(1)
        return random.uniform(*config.work)

    def end(message: Message[Job]) -> int:
        job = message.payload
        kind, _, times = job.fate.partition(":")
        if kind == "always" or message.failures < {"fail": int(times or 0), "die-fail": 1}.get(kind, 0):
            ledger.note("fail", job.n, message.attempt, message.id)
            raise Failure(job.fate)
        if config.outputs:
            message.publish(OUTPUT, job)
        ledger.note("end", job.n, message.attempt, message.id)
        return job.n

    async def handle(message: Message[Job]) -> int:
        seconds = begin(message)
        if config.mode == "block":
            time.sleep(seconds)  # noqa: ASYNC251 - what a careless handler does
        elif seconds:
            await asyncio.sleep(seconds)
        while config.gate is not None and not Path(config.gate).exists():  # noqa: ASYNC110, ASYNC240 - of a test
            await asyncio.sleep(0.02)
        return end(message)

    def handle_on_thread(message: Message[Job]) -> int:
        time.sleep(begin(message))
        return end(message)

    app = App(config.url, lifespan=lifespan, shutdown_timeout=config.shutdown_timeout)
    retry = Retry(attempts=config.attempts, base_delay=config.base_delay) if config.attempts else Retry()
    batching = {"batch_size": config.batch, "batch_timeout": config.batch_timeout} if config.batch else {}
    declare = app.consumer(
        TOPIC,
        name=TOPIC,
        payload=Job,
        concurrency=config.concurrency,
        max_demand=config.max_demand,
        retry=retry,
        order_by="key" if config.ordered else None,
        **batching,
    )
    consumer = declare(handle_on_thread if config.mode == "thread" else handle)

    async def handle_batch(batch: Batch[int]) -> None:
        for message in batch:
            ledger.note("batch-start", message.payload.n, message.attempt, message.id)
        if any(message.payload.fate == "batch-poison" for message in batch):
            os._exit(1)
        await asyncio.sleep(config.batch_work)
        for message in batch:
            ledger.note("batch-end", message.payload.n, message.attempt, message.id)

    if config.batch:
        consumer.batch()(handle_batch)
    return app


async def work(config: Config) -> None:
    """Run the app until a signal, and note each change of the pipeline's state."""
    app = make_app(config)
    ledger = Ledger(config.ledger)

    async def watch() -> None:
        before = None
        while True:
            (stats,) = app.manager.stats()
            if stats.state != before:
                before = stats.state
                ledger.note(f"state:{before}")
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    try:
        await app.run()
    finally:
        watching.cancel()


async def publish(config: Config) -> None:
    """Publish until SIGTERM or a PublishError, one by one or in chunks.

    `offer` is noted before the call, with the number of its last message; `accept` for each message it returned for.
    """
    ledger = Ledger(config.ledger)
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    async with App(config.url) as app:
        ledger.note("up")
        for first in itertools.count(config.first, config.chunk):
            jobs = [
                Job(n, config.fates[n % len(config.fates)], "x" * config.padding)
                for n in range(first, first + config.chunk)
            ]
            ledger.note("offer", first, what=str(first + config.chunk - 1))
            try:
                if config.chunk == 1:
                    ids = [await app.publish(TOPIC, jobs[0], key=str(first % config.keys) if config.keys else None)]
                else:
                    ids = await app.publish_many(TOPIC, jobs)
            except PublishError as error:
                ledger.note("refuse", first, what=type(error.__cause__).__name__)
                return
            for job, id_ in zip(jobs, ids, strict=True):
                ledger.note("accept", job.n, what=id_)
            if asked.is_set():
                return
            await asyncio.sleep(config.pause)


def die_with(parent: int) -> None:
    """End when the test's process has ended, however it did."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(9)
        time.sleep(1.0)


if VARIABLE in os.environ:
    threading.Thread(target=die_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    _config = msgspec.json.decode(os.environ[VARIABLE], type=Config)
    if __name__ == "__main__":
        asyncio.run({"worker": work, "publisher": publish}[sys.argv[1]](_config))
    else:
        app = make_app(_config)
