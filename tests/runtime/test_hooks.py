"""Hooks: handle_error decides how a failed message ends, handle_failed learns of those that end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import App, Message, Reject, Release, Retry, RetryLater
from sluiceway.transports.memory import MemoryTransport

pytestmark = pytest.mark.virtual_time


class Run:
    """An app over memory with one consumer that fails."""

    def __init__(self, **options: Any) -> None:
        self.transport = MemoryTransport()
        self.app = App(self.transport, shutdown_timeout=5)
        self.attempts: list[int] = []
        self.error: BaseException = ValueError("broken")

        @self.app.consumer("work", retry=Retry(attempts=3, base_delay=1, jitter=0), **options)
        async def work(message: Message[str]) -> None:
            self.attempts.append(message.attempt)
            if message.payload == "bad":
                raise self.error

        self.consumer = work

    async def over(self, *payloads: str) -> list[str]:
        """Handle the payloads; returns those that died."""
        async with self.app.running() as manager:
            await self.app.publish_many("work", payloads)
            await manager.idle()
        return [stored.body.decode().strip('"') async for stored in self.transport.browse("work.default.dead")]


async def test_without_a_choice_the_policy_decides() -> None:
    run = Run()

    @run.consumer.handle_error
    async def on_error(message: Message[str], error: BaseException) -> None: ...

    assert await run.over("bad") == ["bad"]
    assert run.attempts == [1, 2, 3]


async def test_ack_accepts_a_failed_message() -> None:
    run = Run()

    @run.consumer.handle_error
    async def on_error(message: Message[str], error: BaseException) -> str:
        assert message.payload == "bad"
        assert str(error) == "broken"
        return "ack"

    assert await run.over("bad") == []
    assert run.attempts == [1]


@pytest.mark.parametrize("how", ["return", "raise"])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_directive_decides(how: str, kind: str) -> None:
    run = Run()

    def choose(message: Message[str], error: BaseException) -> Any:
        if how == "raise":
            raise Reject("hopeless")
        return Reject("hopeless")

    async def choose_later(message: Message[str], error: BaseException) -> Any:
        await asyncio.sleep(1)
        return choose(message, error)

    run.consumer.handle_error(choose if kind == "sync" else choose_later)
    assert await run.over("bad") == ["bad"]
    assert run.attempts == [1]


async def test_retry_later_and_release_decide_too() -> None:
    run = Run()
    choices = iter([RetryLater(5, counted=False), Release(), RetryLater(2), Reject()])

    @run.consumer.handle_error
    def on_error(message: Message[str], error: BaseException) -> Any:
        return next(choices)

    assert await run.over("bad") == ["bad"]
    assert run.attempts == [1, 1, 1, 2]


@pytest.mark.parametrize("wrong", ["nack", Reject, 3, True])
async def test_a_wrong_answer_is_logged_and_the_policy_decides(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    run.consumer.handle_error(lambda message, error: wrong)
    assert await run.over("bad") == ["bad"]
    assert run.attempts == [1, 2, 3]
    assert 'handle_error must return "ack", Reject, RetryLater, Release or None, got' in caplog.text


async def test_a_hook_that_raises_is_logged_and_the_policy_decides(caplog: pytest.LogCaptureFixture) -> None:
    run = Run()

    @run.consumer.handle_error
    def on_error(message: Message[str], error: BaseException) -> Any:
        raise RuntimeError("hook")

    @run.consumer.handle_failed
    def on_failed(messages: Sequence[Message[str]]) -> None:
        raise RuntimeError("other hook")

    assert await run.over("bad", "good") == ["bad"]
    assert "handle_error raised for message" in caplog.text
    assert "handle_failed raised" in caplog.text


async def test_a_hook_that_exits_stops_the_app_and_loses_nothing() -> None:
    run = Run()

    @run.consumer.handle_error
    def on_error(message: Message[str], error: BaseException) -> Any:
        raise SystemExit(4)

    await run.app.publish("work", "bad")
    with pytest.raises(SystemExit):
        await run.app.run()
    async with run.app:
        source = await run.transport.subscribe(_subscription())
        (message,) = await source.receive(1)
        assert message.attempt == 1
        await source.aclose()


async def test_handle_failed_hears_only_of_those_that_end() -> None:
    run = Run()
    heard: list[tuple[str, int, str]] = []

    @run.consumer.handle_failed
    async def on_failed(messages: Sequence[Message[str]]) -> None:
        heard.extend((one.payload, one.attempt, str(one.error)) for one in messages)

    assert await run.over("bad", "good") == ["bad"]
    assert heard == [("bad", 3, "broken")]


async def test_handle_failed_is_not_called_for_what_handle_error_accepted() -> None:
    run = Run()
    heard: list[Any] = []
    run.consumer.handle_error(lambda message, error: "ack")
    run.consumer.handle_failed(heard.extend)
    assert await run.over("bad") == []
    assert heard == []


def _subscription() -> Any:
    from sluiceway.source import Subscription

    return Subscription(topics=("work",), group="default", window=10)
