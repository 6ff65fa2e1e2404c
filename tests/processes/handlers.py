"""Handlers that run in worker processes, and apps for them. What a message asks for is in its body; each notes what it
does in the file that LEDGER names."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from sluiceway import App, Batch, Consumer, Message, Reject, Release, Retry, RetryLater, consumer

LEDGER = "PROCESSES_LEDGER"


def note(event: str, what: object = "-") -> None:
    """One line in one write: the kernel has it whatever happens to this process then."""
    file = os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(file, f"{os.getpid()} {event} {what}\n".encode())
    os.close(file)


class Told:
    """What the ledger says: `(pid, event, what)` of each line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self, event: str) -> list[tuple[int, str]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        split = (line.split(" ", 2) for line in lines)
        return [(int(pid), what) for pid, name, what in split if name == event]


class Picky(Exception):
    """It cannot be made from its `args`, as pickle would."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


class Closed(Exception):
    """Its state cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("closed")
        self.file = open(os.devnull)  # noqa: PTH123, SIM115

    def __reduce__(self) -> Any:
        raise TypeError("never")


def act(message: Message[bytes]) -> Any:
    """Do what the body says."""
    verb, _, rest = message.body.decode().partition(" ")
    note("start", message.body.decode())
    match verb:
        case "sleep":
            time.sleep(float(rest))
        case "meet":  # until as many processes are in it
            deadline = time.monotonic() + 30
            while len({pid for pid, _ in Told(Path(os.environ[LEDGER])).all("start")}) < int(rest):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        case "spin":
            end = time.process_time() + float(rest)
            while time.process_time() < end:
                pass
        case "exit":
            os._exit(int(rest))
        case "crash":
            ctypes.string_at(0)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            say(message, verb, rest)
    note("end", message.body.decode())
    return message.body.decode()


def say(message: Message[bytes], verb: str, rest: str) -> None:
    match verb:
        case "reject":
            raise Reject(rest)
        case "later":
            raise RetryLater(float(rest), counted=False)
        case "release":
            raise Release(rest)
        case "fail":
            message.fail(rest)
        case "exit-app":
            raise SystemExit(int(rest))
        case "chain":
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("outer") from error
        case "picky":
            raise Picky(7, reason="no")
        case "closed":
            raise Closed
        case "publish":
            message.publish("out", {"a": 1}, key="k", headers={"h": "v"}, delay=2.0)
        case "configure":
            message.configure(on_failure="dead_letter")
            raise ValueError("configured")
        case "wrong-batcher":
            message.to("nowhere")
        case "ack":
            asyncio.run(message.ack())


async def act_async(message: Message[bytes]) -> Any:
    verb, _, rest = message.body.decode().partition(" ")
    if verb == "ack":
        await message.ack()
    if verb == "wait":
        note("start", message.body.decode())
        try:
            await asyncio.sleep(float(rest))
        except asyncio.CancelledError:
            note("cancelled")
            raise
    if verb == "ignore":
        note("start", message.body.decode())
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                note("ignored")
    return act(message)


async def publish_and_wait(message: Message[bytes]) -> None:
    await message.publish("out", 1)  # type: ignore[func-returns-value]


def route(message: Message[bytes]) -> Any:
    """For batches: the body's first letter is the batch key."""
    if message.body == b"unpicklable":
        return lambda: None
    message.to(key=message.body[:1])
    return message.body.decode().upper()


def tell_attempt(message: Message[bytes]) -> None:
    note("attempt", f"{message.id} {message.attempt} {message.key!r} {dict(message.headers)} {message.topic}")


class Number(msgspec.Struct):
    n: int


def typed(message: Message[Number]) -> int:
    if message.payload.n < 0:
        raise ValueError("negative")
    return message.payload.n


# -- apps ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan() -> AsyncIterator[str]:
    note("enter")
    yield f"made in {os.getpid()}"
    note("leave")


@consumer("t", executor="process", concurrency=2)
def with_context(message: Message[int], context: str) -> None:
    note("context", f"{message.payload} {context}")
    time.sleep(0.05)


@consumer("numbers", executor="process", concurrency=1, batch_size=2, batch_timeout=0.05)
class Numbers(Consumer[Number]):
    def __init__(self, context: str) -> None:
        self.context = context

    def handle(self, message: Message[Number]) -> int:
        note("handle", self.context)
        return message.payload.n * 2

    async def handle_batch(self, batch: Batch[int]) -> None:
        note("batch", f"{batch.values} {[message.payload.n for message in batch]}")


@asynccontextmanager
async def lifespan_that_fails_in_workers() -> AsyncIterator[None]:
    if os.getpid() != int(os.environ["PARENT"]):
        raise ConnectionError("no database here")
    yield


@consumer("t", executor="process", concurrency=1, retry=Retry(attempts=2, base_delay=0.05))
def plain(message: Message[Any]) -> None:
    note("plain", message.payload)
    if message.payload == "sleep":
        time.sleep(60)


async def serve() -> None:
    """A program of its own, for tests that kill it."""
    app = App("memory://", consumers=[plain], shutdown_timeout=5.0)
    async with app:
        await app.publish("t", "quick")
        await app.publish("t", "sleep")
        await app.run()


if __name__ == "__main__":
    from tests.processes import handlers  # not from here: workers do not run __main__

    asyncio.run(handlers.serve())
