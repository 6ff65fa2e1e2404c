"""`test_message` and `test_batch`: what was acked, and what failed and how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from sluiceway import App, AppError, Batch, Consumer, DecodeError, Message, OptionError, Reject, Release, Retry
from sluiceway import RetryLater as Later
from sluiceway import consumer as declare
from sluiceway.testing import Delivery, running, test_batch, test_message

pytestmark = pytest.mark.virtual_time


class Payment(msgspec.Struct):
    cents: int
    currency: str = "USD"


@declare("payments", retry=Retry(attempts=3, base_delay=10, jitter=0))
async def payments(message: Message[Payment]) -> int:
    cents = message.payload.cents
    message.publish("seen", cents)
    if cents < 0:
        raise Reject("negative")
    if cents == 13:
        raise ValueError("unlucky")
    if cents == 7:
        raise Later(60)
    if cents == 8:
        raise Release
    return cents * 2


@declare("numbers", batch_size=3, batch_timeout=5)
class Numbers(Consumer[int]):
    async def handle(self, message: Message[int]) -> int:
        if message.payload < 0:
            raise Reject("negative")
        return message.payload * 10

    async def handle_batch(self, batch: Batch[int]) -> None:
        for message in batch:
            if message.value == 40:
                message.fail("forty")


async def test_a_success_is_acked_with_its_value_and_what_it_published() -> None:
    delivery = await test_message(payments, {"cents": 5})
    assert (delivery.outcome, delivery.value, delivery.error, delivery.attempt) == ("ack", 10, None, 1)
    assert [(one.topic, one.body) for one in delivery.published] == [("seen", b"5")]
    assert delivery.batch is None


async def test_a_typed_payload_and_a_body_of_bytes_go_the_same_way() -> None:
    assert (await test_message(payments, Payment(4))).value == 8
    assert (await test_message(payments, b'{"cents": 4}')).value == 8


async def test_a_failure_is_retried_with_its_delay_and_reason_and_runs_once() -> None:
    delivery = await test_message(payments, {"cents": 13})
    assert (delivery.outcome, delivery.delay, delivery.counted) == ("retry", 10, True)
    assert delivery.reason is not None
    assert (delivery.reason.type, delivery.reason.message) == ("ValueError", "unlucky")
    assert isinstance(delivery.error, ValueError)
    assert delivery.published == ()
    assert "retry in 10.00 s, ValueError('unlucky')" in repr(delivery)


async def test_the_last_attempt_is_dead_lettered() -> None:
    delivery = await test_message(payments, {"cents": 13}, attempt=3)
    assert (delivery.outcome, delivery.attempt) == ("dead_letter", 3)
    assert delivery.dead_letter is not None
    assert delivery.dead_letter.topic == "payments.default.dead"
    assert delivery.dead_letter.headers["sluiceway-dead-attempts"] == "3"


async def test_a_rejection_is_dead_lettered_at_once() -> None:
    delivery = await test_message(payments, {"cents": -1}, key="k", headers={"trace": "t"})
    assert delivery.outcome == "dead_letter"
    assert delivery.dead_letter is not None
    assert (delivery.dead_letter.key, delivery.dead_letter.headers["trace"]) == ("k", "t")
    assert delivery.dead_letter.headers["sluiceway-dead-error"] == "negative"


async def test_what_a_handler_says_of_its_message_is_what_happens() -> None:
    later, back = await test_message(payments, {"cents": 7}), await test_message(payments, {"cents": 8})
    assert (later.outcome, later.delay) == ("retry", 60)
    assert back.outcome == "release"


async def test_what_would_come_again_at_once_does_not() -> None:
    ran = []

    @declare("t", retry=Retry(base_delay=0))
    async def back(message: Message[str]) -> None:
        ran.append(message.payload)
        if message.payload == "slow":
            await asyncio.sleep(10)
        elif message.payload == "release":
            raise Release
        else:
            raise ValueError

    result = await test_batch(back, ["release", "retry", "slow"])
    assert ran == ["release", "retry", "slow"]
    assert [one.outcome for one in result.deliveries] == ["release", "retry", "ack"]


async def test_a_body_that_cannot_be_decoded_is_dead_lettered() -> None:
    delivery = await test_message(payments, b"{")
    assert delivery.outcome == "dead_letter"
    assert isinstance(delivery.error, DecodeError)


async def test_one_message_flushes_its_batch() -> None:
    before = asyncio.get_running_loop().time()
    delivery = await test_message(Numbers, 1)
    assert delivery.batch is not None
    assert (delivery.batch.info.trigger, delivery.batch.values) == ("flush", [10])
    assert asyncio.get_running_loop().time() - before < 5


async def test_bulk_batches_go_by_size_and_then_by_timeout() -> None:
    result = await test_batch(Numbers, [1, 2, 3, 4, -5])
    assert [(one.info.trigger, one.values) for one in result.batches] == [("size", [10, 20, 30]), ("timeout", [40])]
    assert [one.outcome for one in result.deliveries] == ["ack", "ack", "ack", "retry", "dead_letter"]
    assert [one.value for one in result.acked] == [10, 20, 30]
    assert [str(one.error) for one in result.failed] == ["forty", "negative"]
    assert asyncio.get_running_loop().time() >= 5


async def test_flushed_batches_go_once_all_messages_are_handled() -> None:
    result = await test_batch(Numbers, [1, 2, 3, 5, -4], mode="flush")
    assert [(one.info.trigger, one.values) for one in result.batches] == [("size", [10, 20, 30]), ("flush", [50])]
    assert asyncio.get_running_loop().time() < 5


async def test_nothing_is_no_trouble() -> None:
    assert (await test_batch(Numbers, [])).deliveries == ()


async def test_keys_are_made_of_payloads() -> None:
    seen = []

    @declare("t", order_by="key")
    async def note(message: Message[int]) -> None:
        seen.append((message.key, message.payload))
        if message.payload == 1:
            raise ValueError

    result = await test_batch(note, [1, 2, 3], key=lambda number: "odd" if number % 2 else "even")
    assert seen == [("odd", 1), ("even", 2)]
    assert [one.outcome for one in result.deliveries] == ["retry", "ack", "park"]  # the 3 waits for the 1


async def test_handlers_on_threads_are_waited_for_at_real_speed() -> None:
    import time

    @declare("t", timeout=30)
    def slow(message: Message[int]) -> int:
        time.sleep(0.05)  # real: no virtual timeout may overtake it
        return message.payload + 1

    assert [one.value for one in (await test_batch(slow, [1, 2])).deliveries] == [2, 3]


async def test_the_apps_own_lifespan_is_entered_unless_a_context_is_given() -> None:
    entered = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[str]:
        entered.append("in")
        yield "real"
        entered.append("out")

    app = App(lifespan=lifespan)

    @app.consumer("t")
    async def which(message: Message[Any], context: str) -> str:
        return context

    assert (await test_message(app, 1, context="fake")).value == "fake"
    assert entered == []
    assert (await test_message(app, 1)).value == "real"
    assert entered == ["in", "out"]
    assert (await test_message(which, 1, context="fake")).value == "fake"


async def test_what_the_app_publishes_is_caught_and_its_broker_is_left_alone(tmp_path: Any) -> None:
    app = App(f"sqlite:///{tmp_path}/shop.db")
    transport = app.transport

    @app.consumer("t")
    async def forward(message: Message[int]) -> None:
        await app.publish("out", message.payload + 1)

    delivery = await test_message(app, 1)
    assert [(one.topic, one.body) for one in delivery.published] == [("out", b"2")]
    assert app.transport is transport
    assert list(tmp_path.iterdir()) == []


async def test_of_several_consumers_the_topic_chooses() -> None:
    app = App()

    @app.consumer("a.*")
    async def first(message: Message[Any]) -> str:
        return "first"

    @app.consumer("b")
    async def second(message: Message[Any]) -> str:
        return "second"

    assert (await test_message(app, 1, topic="a.x")).value == "first"
    assert (await test_message(app, 1, topic="b")).value == "second"
    with pytest.raises(AppError, match=r"a topic is needed to choose .*; consumers: first on a.\*, second on b"):
        await test_message(app, 1)
    with pytest.raises(AppError, match="topic 'c' reaches none"):
        await test_message(app, 1, topic="c")
    with pytest.raises(AppError, match=r"first reads a.\*: say topic="):
        await test_message(first, 1)


async def test_what_is_not_allowed_is_refused() -> None:
    with pytest.raises(OptionError, match="mode must be 'bulk' or 'flush', got 'fast'"):
        await test_batch(Numbers, [1], mode="fast")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="attempt must be a whole number, 1 or more; got 0"):
        await test_message(Numbers, 1, attempt=0)
    with pytest.raises(AppError, match="is not a consumer"):
        await test_message(lambda message: None, 1)


async def test_an_app_that_runs_is_not_disturbed() -> None:
    app = App("memory://", consumers=[payments])
    async with app.running():
        with pytest.raises(AppError, match="connected already"):
            async with running(app):
                pass
    assert isinstance(await test_message(app, {"cents": 1}), Delivery)
