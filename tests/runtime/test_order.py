"""Order: with `order_by="key"` messages of one key are handled one at a time, in arrival order, also over retries."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from typing import Any

import pytest

from sluiceway import App, Batch, Message, Pipeline, Retry, RetryLater
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, running

pytestmark = pytest.mark.virtual_time


class Shop:
    """An app over memory with one ordered consumer that notes what it handles, per key."""

    def __init__(self, *, batched: bool = False, **options: Any) -> None:
        self.transport = MemoryTransport()
        self.app = App(self.transport, shutdown_timeout=5)
        self.handled: dict[str, list[int]] = defaultdict(list)
        self.at_once: dict[str, int] = defaultdict(int)
        self.most = 0
        self.fails: set[tuple[int, int]] = set()  # number, attempt
        self.draw = random.Random(7)
        retry = Retry(attempts=5, base_delay=1, jitter=0)

        @self.app.consumer("orders", order_by="key", retry=retry, **options)
        async def orders(message: Message[int]) -> int:
            key = message.key or ""
            self.at_once[key] += 1
            self.most = max(self.most, self.at_once[key])
            try:
                await asyncio.sleep(self.draw.random())
                if (message.payload, message.attempt) in self.fails:
                    raise ValueError("not yet")
                self.handled[key].append(message.payload)
                return message.payload
            finally:
                self.at_once[key] -= 1

        self.consumer = orders
        if batched:

            @orders.batch(size=4, timeout=0.2)
            async def book(batch: Batch[int]) -> None:
                await asyncio.sleep(0.1)

    async def publish(self, count: int, keys: str) -> None:
        for number in range(count):
            await self.app.publish("orders", number, key=keys[number % len(keys)])

    async def run(self, count: int, keys: str) -> None:
        async with self.app.running() as manager:
            await self.publish(count, keys)
            await manager.idle()

    def check(self, count: int, keys: str) -> None:
        for index, key in enumerate(keys):
            assert self.handled[key] == list(range(index, count, len(keys)))
        assert self.most == 1


async def test_one_key_is_handled_one_at_a_time_in_arrival_order_and_keys_side_by_side() -> None:
    shop = Shop()
    await shop.run(60, "abc")
    shop.check(60, "abc")
    assert asyncio.get_running_loop().time() < 18  # one after another would take about 30


async def test_the_order_holds_over_retries_while_other_keys_flow() -> None:
    shop = Shop()
    shop.fails = {(0, 1), (0, 2), (6, 1), (9, 1)}
    await shop.run(30, "abc")
    shop.check(30, "abc")


async def test_the_order_holds_with_batches() -> None:
    shop = Shop(batched=True)
    shop.fails = {(2, 1), (7, 1)}
    await shop.run(30, "abc")
    shop.check(30, "abc")


async def test_a_message_failed_in_its_batch_is_not_overtaken() -> None:
    transport = MemoryTransport()
    app = App(transport)
    booked: list[int] = []

    @app.consumer("orders", order_by="key", retry=Retry(attempts=3, base_delay=5, jitter=0))
    async def orders(message: Message[int]) -> int:
        return message.payload

    @orders.batch(size=2, timeout=0.1)
    async def book(batch: Batch[int]) -> None:
        for message in batch:
            if message.payload == 1 and message.attempt == 1:
                message.fail("later")
            else:
                booked.append(message.payload)

    async with app.running() as manager:
        for number in range(5):
            await app.publish("orders", number, key="k")
        await manager.idle()
    assert booked == [0, 1, 2, 3, 4]


async def test_the_order_holds_over_restarts_of_the_consumer() -> None:
    shop = Shop(concurrency=3)
    shop.fails = {(n, 1) for n in range(0, 40, 6)}
    async with shop.app.running() as manager:
        await shop.publish(40, "ab")
        for _ in range(10):
            await asyncio.sleep(1.3)
            await manager.restart("orders")
        await manager.idle()
    shop.check(40, "ab")


async def test_an_early_ack_does_not_let_the_next_of_its_key_start() -> None:
    for batched in (False, True):
        broker = Broker()
        for number in range(4):
            broker.put(str(number), key="k")
        at_once = most = 0

        async def handle(message: Message[bytes]) -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await message.ack()
            await asyncio.sleep(1)
            at_once -= 1
            if message.body == b"2":
                raise ValueError("after the ack")

        async def book(batch: Batch[Any]) -> None: ...

        async with running(Pipeline(broker.open, handle, batch=book if batched else None, order_by="key"), broker):
            await broker.settled(4)
            await asyncio.sleep(2)
        assert most == 1
        assert broker.acked == ["m1", "m2", "m3", "m4"]


async def test_an_early_ack_in_a_batch_opens_its_lane_when_the_batch_ends() -> None:
    broker = Broker()
    for number in range(3):
        broker.put(str(number), key="k")
    at_once = most = 0

    async def handle(message: Message[bytes]) -> None: ...

    async def book(batch: Batch[Any]) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await batch[0].ack()
        await asyncio.sleep(1)
        at_once -= 1

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=1, order_by="key")
    async with running(pipeline, broker):
        await broker.settled(3)
    assert most == 1


async def test_messages_behind_one_that_goes_back_are_parked_in_order() -> None:
    broker = Broker()
    for number in range(5):
        broker.put(str(number), key="k")

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"0" and message.failures == 0:
            await asyncio.sleep(1)
            raise RetryLater(10)

    async with running(Pipeline(broker.open, handle, order_by="key"), broker):
        await broker.until(lambda: len(broker.ended) >= 5)
        assert [(one.id, one.outcome) for one in broker.ended[:5]] == [
            ("m1", "retry"), ("m2", "park"), ("m3", "park"), ("m4", "park"), ("m5", "park"),
        ]  # fmt: skip


async def test_messages_without_a_key_have_no_order_and_do_not_wait() -> None:
    broker = Broker()
    for number in range(10):
        broker.put(str(number))

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, handle, order_by="key", concurrency=10), broker):
        await broker.settled(10)
        assert asyncio.get_running_loop().time() < 1.5


async def test_a_drain_releases_what_waits_in_lanes() -> None:
    broker = Broker()
    for number in range(6):
        broker.put(str(number), key="k")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, handle, order_by="key"), broker):
        await asyncio.sleep(0.5)
    assert broker.acked == ["m1"]
    assert [one.outcome for one in broker.ended].count("release") == 5


async def test_the_order_holds_when_the_broker_takes_a_leased_message_away() -> None:
    shop = Shop(concurrency=2)
    async with shop.app.running() as manager:
        await shop.publish(20, "ab")
        await asyncio.sleep(2.2)
        running_now = manager._running["orders"].supervisor._flow
        assert running_now is not None
        waiting = [one for one in running_now.settler.held if one.state == 0][:3]
        running_now.settler.forget(waiting)
        await running_now.source.settle(waiting, ())  # whoever has them now handles them
        await asyncio.sleep(60)
    lost = {one.payload if one.payload is not None else int(one.body) for one in waiting}
    for index, key in enumerate("ab"):
        seen = [number for number in shop.handled[key] if number not in lost]
        assert seen == [number for number in range(index, 20, 2) if number not in lost]
    assert shop.most == 1
