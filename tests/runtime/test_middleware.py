"""Middleware in a running pipeline: its order, what it may do with a message, and what its failures cost."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sluiceway import App, Batch, Message, Pipeline, Reject, Retry
from sluiceway.message import Handler
from sluiceway.middleware import ConsumerInfo
from sluiceway.transports.memory import MemoryTransport
from tests.runtime.recording import Broker, running

pytestmark = pytest.mark.virtual_time
ONCE = Retry(attempts=1)
TWICE = Retry(attempts=2, base_delay=1, jitter=0)

Traced = Callable[[Message[Any], Handler], Awaitable[Any]]


def traced(name: str, trace: list[str]) -> Traced:
    async def middleware(message: Message[Any], call_next: Handler) -> Any:
        trace.append(f"{name} in")
        try:
            return await call_next(message)
        finally:
            trace.append(f"{name} out")

    return middleware


async def test_the_apps_middleware_goes_round_the_consumers_and_the_first_is_the_outermost() -> None:
    trace: list[str] = []
    app = App(MemoryTransport(), middleware=[traced("app 1", trace), traced("app 2", trace)])

    @app.consumer("t", middleware=[traced("own 1", trace), traced("own 2", trace)])
    async def handle(message: Message[int]) -> None:
        trace.append("handler")

    async with app.running() as manager:
        await app.publish("t", 1)
        await manager.idle()
    names = ["app 1", "app 2", "own 1", "own 2"]
    assert trace == [*(f"{name} in" for name in names), "handler", *(f"{name} out" for name in reversed(names))]


async def test_what_a_handler_raises_passes_through_every_layer_and_is_retried_through_every_layer() -> None:
    trace: list[str] = []
    broker = Broker("a")
    seen: list[BaseException] = []

    async def watch(message: Message[Any], call_next: Handler) -> Any:
        try:
            return await call_next(message)
        except ValueError as error:
            seen.append(error)
            raise

    async def handle(message: Message[bytes]) -> None:
        if message.attempt == 1:
            raise ValueError("no")

    pipeline = Pipeline(broker.open, handle, middleware=[traced("outer", trace), watch], retry=TWICE, payload=bytes)
    async with running(pipeline, broker):
        await broker.settled(1)
    assert trace == ["outer in", "outer out"] * 2
    assert [str(error) for error in seen] == ["no"]
    assert broker.outcomes("m1") == ["retry", "ack"]


async def test_what_a_middleware_raises_fails_its_message_alone() -> None:
    broker = Broker("bad", "good")

    async def refuse(message: Message[Any], call_next: Handler) -> Any:
        if message.body == b"bad":
            raise Reject("not here")
        return await call_next(message)

    handled: list[bytes] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.body)

    async with running(Pipeline(broker.open, handle, middleware=[refuse], payload=bytes), broker):
        await broker.settled(2)
    assert handled == [b"good"]
    assert broker.outcomes("m1") == ["dead_letter"]
    assert broker.outcomes("m2") == ["ack"]


async def test_a_middleware_that_answers_by_itself_skips_the_handler_and_its_answer_is_the_value() -> None:
    broker = Broker("cached", "new")
    handled: list[bytes] = []
    values: list[Any] = []

    async def answer(message: Message[Any], call_next: Handler) -> Any:
        return "mine" if message.body == b"cached" else await call_next(message)

    async def handle(message: Message[bytes]) -> str:
        handled.append(message.body)
        return "the handler's"

    async def take(batch: Batch[Any]) -> None:
        values.extend(batch.values)

    pipeline = Pipeline(broker.open, handle, batch=take, batch_size=2, middleware=[answer], payload=bytes)
    async with running(pipeline, broker):
        await broker.settled(2)
    assert handled == [b"new"]
    assert sorted(values) == ["mine", "the handler's"]
    assert broker.acked == ["m1", "m2"]


async def test_a_middleware_that_calls_on_twice_runs_the_handler_twice_and_the_message_is_settled_once() -> None:
    broker = Broker("a")
    runs: list[str] = []

    async def again(message: Message[Any], call_next: Handler) -> Any:
        try:
            return await call_next(message)
        except ValueError:
            return await call_next(message)

    async def handle(message: Message[bytes]) -> None:
        runs.append(message.id)
        if len(runs) == 1:
            raise ValueError("once")

    async with running(Pipeline(broker.open, handle, middleware=[again], retry=ONCE, payload=bytes), broker):
        await broker.settled(1)
    assert runs == ["m1", "m1"]
    assert broker.outcomes("m1") == ["ack"]


async def test_a_middleware_that_returns_nothing_leaves_nothing_as_the_value() -> None:
    broker = Broker("a")
    values: list[Any] = []

    async def forget(message: Message[Any], call_next: Handler) -> Any:
        await call_next(message)

    async def handle(message: Message[bytes]) -> int:
        return 7

    async def take(batch: Batch[Any]) -> None:
        values.extend(batch.values)

    pipeline = Pipeline(broker.open, handle, batch=take, batch_size=1, middleware=[forget], payload=bytes)
    async with running(pipeline, broker):
        await broker.settled(1)
    assert values == [None]


async def test_a_middleware_may_fail_a_message_that_its_handler_accepted() -> None:
    broker = Broker("a")

    async def check(message: Message[Any], call_next: Handler) -> Any:
        value = await call_next(message)
        message.fail("too small")
        return value

    async def handle(message: Message[bytes]) -> int:
        return 7

    async with running(Pipeline(broker.open, handle, middleware=[check], retry=ONCE, payload=bytes), broker):
        await broker.settled(1)
    assert broker.outcomes("m1") == ["dead_letter"]


async def test_a_handler_cut_off_by_the_timeout_lets_middleware_clean_up() -> None:
    trace: list[str] = []
    broker = Broker("slow")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(60)

    pipeline = Pipeline(broker.open, handle, middleware=[traced("it", trace)], timeout=1, retry=ONCE, payload=bytes)
    async with running(pipeline, broker):
        await broker.settled(1)
    assert trace == ["it in", "it out"]
    assert broker.outcomes("m1") == ["dead_letter"]


async def test_a_middleware_cut_off_in_a_drain_releases_its_message() -> None:
    broker = Broker("slow")
    entered = asyncio.Event()

    async def wait(message: Message[Any], call_next: Handler) -> Any:
        entered.set()
        await asyncio.sleep(60)
        return await call_next(message)

    async def handle(message: Message[bytes]) -> None:
        raise AssertionError("not reached")

    pipeline = Pipeline(broker.open, handle, middleware=[wait], shutdown_timeout=1, payload=bytes)
    async with running(pipeline, broker):
        await entered.wait()
    assert broker.outcomes("m1") == ["release"]


async def test_a_middleware_is_made_once_for_each_consumer_and_told_of_it() -> None:
    made: list[ConsumerInfo] = []

    class PerConsumer:
        def for_consumer(self, consumer: ConsumerInfo) -> Traced:
            made.append(consumer)

            async def middleware(message: Message[Any], call_next: Handler) -> Any:
                return f"{consumer.name}: {await call_next(message)}"

            return middleware

    app = App(MemoryTransport(), group="shop", middleware=[PerConsumer()])
    values: list[Any] = []

    async def route(message: Message[Any], call_next: Handler) -> Any:
        message.to("big")
        return await call_next(message)

    @app.consumer("a", middleware=[route])
    async def first(message: Message[int]) -> int:
        return message.payload

    @first.batch("big", size=1)
    async def take(batch: Batch[Any]) -> None:
        values.extend(batch.values)

    @app.consumer("b", group="other")
    def second(message: Message[bytes]) -> None: ...

    async with app.running("first") as manager:
        await app.publish("a", 1)
        await app.publish("a", 2)
        await manager.idle()
    (info,) = made
    assert (info.name, info.group, info.batchers, info.batcher, info.payload_type, info.is_async) == (
        "first", "shop", ("big",), None, int, True
    )  # fmt: skip
    assert info.decoder("json")(b"5") == 5
    assert info.decoder("msgpack")(b"\x05") == 5
    assert values == ["first: 1", "first: 2"]


user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")


def test_a_sync_handler_sees_the_context_variables_that_middleware_has_set() -> None:
    seen: dict[bytes, str] = {}

    async def identify(message: Message[Any], call_next: Handler) -> Any:
        user.set(message.body.decode())
        return await call_next(message)

    def handle(message: Message[bytes]) -> None:
        seen[message.body] = user.get()

    async def main() -> None:  # threads: in real time
        broker = Broker("ada", "bob", "eve")
        async with running(Pipeline(broker.open, handle, middleware=[identify], payload=bytes), broker):
            await broker.settled(3)

    asyncio.run(main())
    assert seen == {b"ada": "ada", b"bob": "bob", b"eve": "eve"}
