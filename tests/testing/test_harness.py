"""An app under test: its real pipelines over a broker in memory, in virtual time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from sluiceway import App, Batch, Message, Reject, Retry, Unsupported
from sluiceway.testing import Harness, running
from sluiceway.transports.sqlite import SQLiteTransport

pytestmark = pytest.mark.virtual_time


def shop() -> App:
    app = App(group="shop")

    @app.consumer("orders", retry=Retry(attempts=3, base_delay=3600, max_delay=7200, jitter=0))
    async def orders(message: Message[int]) -> None:
        if message.payload < 0:
            raise Reject("negative")
        if message.payload == 13:
            raise ValueError("unlucky")
        message.publish("bills", message.payload * 2)

    @app.consumer("bills")
    async def bills(message: Message[int]) -> int:
        await app.publish("mails", f"bill over {message.payload}")
        return message.payload

    @bills.batch(size=2, timeout=60)
    async def book(batch: Batch[int]) -> None:
        pass

    return app


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_follow_up_messages_are_handled_too_and_seen() -> None:
    async with running(shop()) as harness:
        ids = await harness.publish_many("orders", [1, 2])
        await harness.idle()
        assert [[end.outcome for end in harness.of(sent)] for sent in ids] == [["ack"], ["ack"]]
        assert harness.payloads("bills", int) == [2, 4]
        assert harness.payloads("mails") == ["bill over 2", "bill over 4"]
        assert [one.topic for one in harness.published()] == ["bills", "bills", "mails", "mails"]
        assert [(one.info.trigger, one.values) for one in harness.batches] == [("size", [2, 4])]
        assert [one.batch for one in harness.deliveries if one.message.topic == "bills"] == harness.batches * 2


async def test_hours_of_retries_pass_at_once_and_end_in_a_dead_letter() -> None:
    began = time.monotonic()
    async with running(shop()) as harness:
        sent = await harness.publish("orders", 13)
        await harness.idle()
        retried = [(one.outcome, one.delay, one.at) for one in harness.of(sent)]
    assert [(outcome, delay) for outcome, delay, _ in retried] == [("retry", 3600), ("retry", 7200), ("dead_letter", 0)]
    assert [at for _, _, at in retried] == [0, pytest.approx(3600), pytest.approx(10800)]
    assert time.monotonic() - began < 5


async def test_dead_letters_are_seen_by_the_topic_of_their_message() -> None:
    async with running(shop()) as harness:
        await harness.publish("orders", -1)
        await harness.idle()
        (dead,) = harness.dead_letters("orders")
        assert dead.dead_letter is not None
        assert (dead.group, dead.dead_letter.topic) == ("shop", "orders.shop.dead")
        assert harness.dead_letters("bills") == []
        assert harness.published() == []


async def test_a_consumer_of_the_dead_letters_gets_them() -> None:
    app = shop()
    seen = []

    @app.consumer("orders.shop.dead")
    async def dead(message: Message[Any]) -> None:
        seen.append(message.headers["sluiceway-dead-error"])

    async with running(app) as harness:
        await harness.publish("orders", -1)
        await harness.idle()
    assert seen == ["negative"]


async def test_only_the_consumers_named_run() -> None:
    async with running(shop(), "orders") as harness:
        await harness.publish("orders", 1)
        await harness.idle()
        assert harness.payloads("bills") == [2]
        assert harness.batches == []


async def test_a_forming_batch_goes_when_it_is_flushed() -> None:
    async with running(shop()) as harness:
        await harness.publish("bills", 5)
        await harness.until(lambda: any(one.forming for one in harness.manager.stats()))
        harness.flush("bills")
        await harness.idle()
        assert [one.info.trigger for one in harness.batches] == ["flush"]
        assert now() < 60


async def test_delays_pass_in_virtual_time() -> None:
    async with running(shop(), "orders") as harness:
        sent = await harness.publish("orders", 1, delay=86400)
        await harness.idle()
        assert harness.of(sent)[0].at == pytest.approx(86400)


async def test_idle_raises_what_made_the_app_stop() -> None:
    app = App()

    @app.consumer("t")
    async def leave(message: Message[Any]) -> None:
        raise SystemExit(3)

    async def use() -> None:
        async with running(app) as harness:
            await harness.publish("t", 1)
            await harness.idle()

    with pytest.raises(SystemExit):
        await use()


async def test_what_a_start_raises_is_raised_and_the_app_has_its_broker_again() -> None:
    app = App()
    transport, consumers = app.transport, app.consumers

    @app.consumer("t")
    async def takes(message: Message[Any], context: str) -> None: ...

    with pytest.raises(ValueError, match="there is no lifespan"):
        async with running(app):
            pass
    assert app.transport is transport
    assert app.consumers is consumers
    async with running(app, context="c"):
        assert app.transport is not transport
    assert app.transport is transport


# -- crashes -----------------------------------------------------------------------------------------------------


def counting() -> tuple[App, Counter[str], Counter[str]]:
    """An app that counts how often each message's handler was entered, and how often it reached its end."""
    app = App()
    entered: Counter[str] = Counter()
    finished: Counter[str] = Counter()

    @app.consumer("t", concurrency=2)
    async def handle(message: Message[int]) -> None:
        entered[message.id] += 1
        for _ in range(3):
            await asyncio.sleep(0)
        finished[message.id] += 1
        message.publish("out", message.payload)

    return app, entered, finished


async def test_a_crash_at_any_turn_of_the_loop_loses_nothing_and_acks_nothing_twice() -> None:
    repeated = 0
    for turns in range(40):
        app, entered, finished = counting()
        async with running(app) as harness:
            ids = await harness.publish_many("t", range(5))
            for _ in range(turns):
                await asyncio.sleep(0)
            await harness.crash()
            await harness.idle()
            assert all([one.outcome for one in harness.of(sent)].count("ack") == 1 for sent in ids)
            assert sorted(harness.payloads("out")) == [0, 1, 2, 3, 4]
        assert all(finished[sent] >= 1 for sent in ids)
        repeated += sum(entered.values()) > 5
    assert repeated > 5, "no crash hit a handler that ran"


async def test_a_crash_inside_a_handler_ends_it_there() -> None:
    app = App()
    entered, passed = [], []
    harnesses: list[Harness] = []

    @app.consumer("t")
    async def write(message: Message[int]) -> None:
        entered.append(message.suspect or message.deliveries > 1)
        if len(entered) == 1:
            await harnesses[0].crash()
        passed.append(message.payload)

    async with running(app) as harness:
        harnesses.append(harness)
        await harness.publish("t", 7)
        await harness.idle()
    assert entered == [False, True]
    assert passed == [7]


async def test_what_a_dying_handler_publishes_does_not_reach_the_broker() -> None:
    app = App()
    refused = []

    @app.consumer("t")
    async def last_words(message: Message[int]) -> None:
        try:
            await asyncio.sleep(5 if message.deliveries == 1 else 0)
        except asyncio.CancelledError:
            try:
                await app.publish("out", "alas")
            except ConnectionError as error:
                refused.append(str(error))
            raise

    async with running(app) as harness:
        await harness.publish("t", 1)
        await asyncio.sleep(1)
        await harness.crash()
        await harness.idle()
        assert harness.published() == []
    assert len(refused) == 1


async def test_a_broker_that_cannot_tell_of_a_death_refuses_it(tmp_path: Any) -> None:
    app, _, _ = counting()
    with asyncio.get_running_loop().external():  # type: ignore[attr-defined]  # SQLite works on threads
        async with running(app, broker=SQLiteTransport(tmp_path / "t.db")) as harness:
            sent = await harness.publish("t", 1)
            await harness.idle()
            assert [one.outcome for one in harness.of(sent)] == ["ack"]
            with pytest.raises(Unsupported, match="SQLiteTransport cannot be told that a process died"):
                await harness.crash()
