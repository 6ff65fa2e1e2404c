"""What the processes of a cell run: `python -m chaos.actors worker`, or `publisher`.

What they are told is in the environment variable CHAOS_CONFIG, as JSON; what they did is in the ledger, and what
Sluiceway said in the log.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import msgspec

from sluiceway import App, Message, PublishError, Retry, SluicewayError
from sluiceway.message import Outgoing

from .ledger import Ledger

VARIABLE = "CHAOS_CONFIG"
CONCURRENCY = 10
WINDOW = 40  # so that what a death repeats is known
KEYS = 50  # where order is kept
FAILING = 11  # each such message fails at its first attempt, so that there are retries
RETRY = Retry(base_delay=0.2)
CHUNK = 5  # messages per publish
MOST = 20_000  # messages that a publisher publishes, whatever happens
AGAIN = 0.1  # seconds until what was refused is published again


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What one process does. `rate`: messages/s that the publisher offers. `work`: the most seconds a handler takes.
    `ordered`: messages of a key are handled in order. `skew`: seconds by which its clock is ahead.
    """

    url: str
    topic: str
    ledger: str
    parent: int
    rate: float = 150.0
    work: float = 0.15
    ordered: bool = False
    skew: float = 0.0
    limit: float = 120.0  # seconds after which the process ends itself


class OnPurpose(Exception):
    """What some messages fail with at their first attempt."""


def key_of(n: int) -> str:
    """The key of a message, where order is kept."""
    return f"key-{n % KEYS}"


def make_app(config: Config) -> App:
    """The app under test: a handler that works a little, then writes down that it has."""
    ledger = Ledger(config.ledger)

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        ledger.note("down")

    app = App(config.url, lifespan=lifespan, shutdown_timeout=5.0)

    order: Literal["key"] | None = "key" if config.ordered else None

    @app.consumer(config.topic, name="jobs", concurrency=CONCURRENCY, max_demand=WINDOW, order_by=order, retry=RETRY)
    async def handle(message: Message[bytes]) -> None:
        n = int(message.body)
        ledger.note("start", n)
        await asyncio.sleep(random.uniform(0.0, config.work))
        if n % FAILING == 0 and message.attempt == 1:
            ledger.note("fail", n)
            raise OnPurpose
        ledger.note("end", n)

    return app


async def work(config: Config) -> None:
    """Run the app until SIGTERM."""
    ledger = Ledger(config.ledger)
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    async with make_app(config).running():
        ledger.note("up")
        await asked.wait()


async def publish(config: Config) -> None:
    """Publish numbers, each until it was accepted, and under one id; SIGTERM ends that after the chunk in hand."""
    ledger = Ledger(config.ledger)
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    async with App(config.url) as app:
        ledger.note("up")
        for first in itertools.count(0, CHUNK):
            chunk = [_numbered(config, n) for n in range(first, first + CHUNK)]
            while chunk:
                chunk = await _offer(app, ledger, chunk)
            if asked.is_set() or first >= MOST:
                return
            await asyncio.sleep(CHUNK / config.rate)


def _numbered(config: Config, n: int) -> Outgoing:
    return Outgoing(config.topic, str(n).encode(), key_of(n) if config.ordered else None, id=f"n-{n}")


async def _offer(app: App, ledger: Ledger, chunk: Sequence[Outgoing]) -> list[Outgoing]:
    """Publish a chunk once; returns what was not accepted."""
    for one in chunk:
        ledger.note("offer", int(one.body))
    failed: set[str] = set()
    try:
        await app.transport.publish(chunk)
    except SluicewayError as error:
        ledger.note("refuse", what=type(error).__name__)
        logging.getLogger("publisher").warning("%s: %s", type(error).__name__, error)
        failed = {one.id for one in (error.failed if isinstance(error, PublishError) else chunk)}
        await asyncio.sleep(AGAIN)
    for one in chunk:
        if one.id not in failed:
            ledger.note("accept", int(one.body))
    return [one for one in chunk if one.id in failed]


def end_with(parent: int, limit: float) -> None:
    """End when the cell's process has, however it did, or when the time is up."""
    until = time.monotonic() + limit
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.5)
    os._exit(9)


def main(kind: str) -> None:
    config = msgspec.json.decode(os.environ[VARIABLE], type=Config)
    threading.Thread(target=end_with, args=(config.parent, config.limit), daemon=True).start()
    if config.skew:
        true = time.time
        time.time = lambda: true() + config.skew
    line = f"%(asctime)s {kind} {os.getpid()} %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=line)
    asyncio.run({"worker": work, "publisher": publish}[kind](config))


if __name__ == "__main__":
    main(sys.argv[1])
