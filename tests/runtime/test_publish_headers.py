"""Headers that an app adds to everything that is published through it."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest

from sluiceway import App, Message, OptionError, Pipeline
from sluiceway.message import Handler
from sluiceway.transports.memory import MemoryTransport
from tests.runtime.recording import Broker, running

pytestmark = pytest.mark.virtual_time
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


async def carry(message: Message[Any], call_next: Handler) -> Any:
    request_id.set(message.headers["request-id"])
    return await call_next(message)


def headers() -> dict[str, str]:
    return {"request-id": request_id.get()}


async def test_they_are_on_what_the_app_and_what_its_messages_publish() -> None:
    app = App(MemoryTransport(), middleware=[carry], publish_headers=headers)
    seen: list[tuple[str, str]] = []

    @app.consumer("first")
    async def first(message: Message[str]) -> None:
        message.publish("second", "by the message")
        await app.publish("second", "by the app")
        await app.publish_many("second", ["by the app, many"])

    @app.consumer("second")
    async def second(message: Message[str]) -> None:
        seen.append((message.payload, message.headers["request-id"]))

    async with app.running() as manager:
        request_id.set("r-7")
        await app.publish("first", "go")
        request_id.set("another")
        await manager.idle()
    assert sorted(seen) == [("by the app", "r-7"), ("by the app, many", "r-7"), ("by the message", "r-7")]


async def test_what_the_publisher_names_wins() -> None:
    app = App(MemoryTransport(), publish_headers=lambda: {"a": "hook", "b": "hook"})
    seen: list[dict[str, str]] = []

    @app.consumer("t")
    async def handle(message: Message[str]) -> None:
        seen.append(dict(message.headers))

    async with app.running() as manager:
        await app.publish("t", "x", headers={"b": "own"})
        await manager.idle()
    assert seen == [{"a": "hook", "b": "own"}]


async def test_wrong_headers_are_an_option_error_with_a_hook_too() -> None:
    app = App(MemoryTransport(), publish_headers=lambda: {"a": "hook"})
    with pytest.raises(OptionError, match="headers must be a mapping"):
        await app.publish("t", "x", headers=["a"])  # type: ignore[arg-type]
    app.publish_headers = lambda: {"a": 5}  # type: ignore[dict-item,return-value]
    with pytest.raises(OptionError, match="headers are strings, got 'a': 5"):
        await app.publish("t", "x")


async def test_a_hook_that_raises_fails_the_publish_and_so_the_message() -> None:
    broker = Broker("a")

    def broken() -> dict[str, str]:
        raise ValueError("no trace")

    async def handle(message: Message[bytes]) -> None:
        if message.attempt == 1:
            message.publish("next", b"x")

    pipeline = Pipeline(broker.open, handle, publish_headers=broken, payload=bytes)
    async with running(pipeline, broker):
        await broker.settled(1)
    assert broker.outcomes("m1") == ["retry", "ack"]
