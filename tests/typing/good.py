"""What users write, as pyright (strict) and mypy (--strict) must read it. `test_typing.py` runs both over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, assert_type

import msgspec

from sluiceway import (
    App,
    Batch,
    Batching,
    BatchMiddleware,
    Consumer,
    FunctionConsumer,
    Message,
    Middleware,
    Pause,
    Reject,
    Release,
    Retry,
    RetryLater,
    consumer,
)
from sluiceway.batch import BatchHandler
from sluiceway.message import Handler
from sluiceway.middleware.decode import Decode
from sluiceway.middleware.idempotency import Idempotency, MemoryStore
from sluiceway.middleware.logging import Logging
from sluiceway.middleware.metrics import Metrics
from sluiceway.middleware.timeout import Timeout
from sluiceway.middleware.tracing import Tracing, trace_headers
from sluiceway.telemetry import MessageFailed


class Payment(msgspec.Struct):
    id: str
    cents: int
    currency: str = "USD"


class Entry(msgspec.Struct):
    payment: str
    currency: str


class Ledger:
    async def price(self, payment: str) -> Entry:
        return Entry(payment, "USD")

    async def insert_many(self, entries: Sequence[Entry]) -> list[tuple[int, Exception]]:
        return []


@asynccontextmanager
async def lifespan() -> AsyncGenerator[Ledger, None]:
    yield Ledger()


app = App("memory://", group="shop", lifespan=lifespan)


# -- functions ---------------------------------------------------------------------------------------------------------


@app.consumer("greetings")
async def greet(message: Message[str]) -> None:
    print(f"Hello, {message.payload}!")


@app.consumer("payments.created", concurrency=10, retry=Retry(attempts=5, base_delay=0.5))
async def payments(message: Message[Payment], ledger: Ledger) -> Entry:
    if message.payload.cents < 0:
        raise Reject("negative amount")
    return await ledger.price(message.payload.id)


@payments.batch(size=50, timeout=1.0, key=lambda entry: entry.currency)
async def book(batch: Batch[Entry], ledger: Ledger) -> None:
    for index, error in await ledger.insert_many(batch.values):
        batch[index].fail(error)


@payments.batch("audit", size=10)
def audit(batch: Batch[Entry]) -> None:
    for message, entry in zip(batch, batch.values, strict=True):
        if entry.currency == "XXX":
            message.fail("no such currency")


@payments.handle_error
async def on_error(message: Message[Payment], error: BaseException) -> Release | RetryLater | None:
    if isinstance(error, ConnectionError):
        return RetryLater(30.0, counted=False)
    return Release() if message.attempt > 3 else None


@payments.handle_failed
def on_failed(messages: Sequence[Message[Payment]]) -> None:
    print([message.payload.id for message in messages])


@app.consumer("orders.*", "returns.#", name="orders", order_by="key", timeout=None, max_demand=None, start="latest")
def orders(message: Message[dict[str, int]]) -> int:
    message.to("s3", key=message.key, flush=message.payload["last"] == 1)
    message.publish("orders.seen", message.payload, key=message.key, headers={"a": "b"}, delay=1.0)
    return message.payload["cents"]


async def timed(message: Message[Any], call_next: Handler) -> Any:
    return await call_next(message)


async def announced(batch: Batch[Any], call_next: BatchHandler) -> None:
    await call_next(batch)


around: Middleware = timed
around_batches: BatchMiddleware = announced
metrics = Metrics()
watched = App(
    middleware=[Tracing(), metrics, Logging(), Timeout(5.0), Decode(), timed, Idempotency(MemoryStore())],
    batch_middleware=[Tracing(), metrics, announced],
    publish_headers=trace_headers,
)
pause = Pause()


@consumer(
    "raw",
    middleware=[around],
    batch_middleware=[around_batches],
    gates=[pause],
    exhausted="drop",
    payload=bytes,
    batch_size=1,
    batch_timeout=0.5,
)
async def raw(message: Message[bytes]) -> bytes:
    await message.ack()
    return message.body


assert_type(greet, FunctionConsumer[str, None])
assert_type(payments, FunctionConsumer[Payment, Entry])
assert_type(orders, FunctionConsumer[dict[str, int], int])
assert_type(raw, FunctionConsumer[bytes, bytes])


async def call_by_itself() -> None:
    message = Message("payments.created", b"{}", "id-1", payload=Payment("p1", 5))
    assert_type(message.payload, Payment)
    await payments(message, Ledger())


# -- classes -----------------------------------------------------------------------------------------------------------


@app.consumer("payments.deleted", concurrency=10, batch_size=50, batch_timeout=1.0, batchers={"s3": Batching(size=5)})
class Payments(Consumer[Payment]):
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def handle(self, message: Message[Payment]) -> Entry:
        return await self.ledger.price(message.payload.id)

    async def handle_batch(self, batch: Batch[Entry]) -> None:
        await self.ledger.insert_many(batch.values)

    async def handle_error(self, message: Message[Payment], error: BaseException) -> RetryLater | None:
        return RetryLater(5.0)

    async def handle_failed(self, messages: Sequence[Message[Payment]]) -> None:
        print(len(messages))


@consumer("plain")
class Plain(Consumer[str]):
    def handle(self, message: Message[str]) -> int:
        return len(message.payload)

    def handle_batch(self, batch: Batch[int]) -> None:
        print(sum(batch.values))


assert_type(Payments(Ledger()).ledger, Ledger)
declared_apart = App("memory://", consumers=[raw, Plain])


# -- running and publishing --------------------------------------------------------------------------------------------


def told(event: MessageFailed) -> None:
    print(event.error)


async def main() -> None:
    app.telemetry.attach(told, MessageFailed)
    assert_type(await app.publish("greetings", "Ada", key="k", headers={"a": "b"}, delay=0.5), str)
    assert_type(await app.publish_many("greetings", ["Ada", "Bob"], key=str.lower), list[str])
    async with app.running("greet") as manager:
        await manager.stop("greet")
        for stats in manager.stats():
            print(stats.consumer, stats.held)
    await app.run(stop=asyncio.Event())


def wraps_handlers(handler: Handler) -> Awaitable[Any]:
    return handler(Message("t", b"", "1"))
