"""Soak: at random, everything happens to a pipeline; each message ends exactly once and each drain ends."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import Batch, Message, Pipeline, Reject, Release, Retry, RetryLater
from sluiceway.message import Refused, Settlement

from .recording import Broker, running

pytestmark = pytest.mark.virtual_time


class Chaos:
    """A consumer and a broker that do anything that they may, drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.batched = self.draw.random() < 0.5
        self.ordered = self.draw.random() < 0.3
        self.concurrency = self.draw.choice([1, 2, 10])
        self.timeout = self.draw.choice([None, 2.0])
        self.messages = 120
        self.broker = Broker()
        for number in range(self.messages):
            deaths = self.draw.choice([1, 2]) if self.draw.random() < 0.02 else 0
            key = self.draw.choice([None, "a", "b"])
            self.broker.put(str(number), key=key, suspect=deaths > 0, deliveries=1 + deaths)
        self.broker.on_settle = self.settle
        self.broker.on_receive = self.receive
        self.broker.on_suspect = self.suspect
        self.finished: Counter[str] = Counter()
        self.running = 0
        self.keys: Counter[str] = Counter()

    def pipeline(self) -> Pipeline:
        options: dict[str, Any] = {"batch": self.book, "batch_size": 5, "batch_timeout": 1.0} if self.batched else {}
        if self.ordered:
            options["order_by"] = "key"
        return Pipeline(
            self.broker.open, self.handle, concurrency=self.concurrency, timeout=self.timeout, shutdown_timeout=3,
            retry=Retry(attempts=4, base_delay=0.5), max_restarts=1000, **options,
        )  # fmt: skip

    async def handle(self, message: Message[bytes]) -> str:
        self.running += 1
        if self.running > self.concurrency:
            self.broker.violation("more at once than concurrency allows")
        key = message.key if self.ordered else None
        if key is not None:
            self.keys[key] += 1
            if self.keys[key] > 1:
                self.broker.violation("two of one key at once")
            if self.broker.has_earlier(message):
                self.broker.violation(f"{message.id} passed an earlier one of its key")
        try:
            await self.something(message)
        finally:
            self.running -= 1
            if key is not None:
                self.keys[key] -= 1
        return message.id

    async def something(self, message: Message[bytes]) -> None:
        luck = self.draw.random()
        if luck < 0.5:
            await asyncio.sleep(self.draw.choice([0, 0, 0.01, 0.5]))
        if luck < 0.05:
            raise ValueError("broken")
        if luck < 0.08:
            raise self.draw.choice([Reject(), Release(), RetryLater(1), RetryLater(0.1, counted=False)])
        if luck < 0.10:
            await asyncio.sleep(10)  # perhaps over the timeout, or over the time to drain
        if luck < 0.12:
            message.publish("out", 1)
        if luck < 0.14 and not self.ordered:
            await message.ack()
            await asyncio.sleep(0.1)
        if luck < 0.15:
            inner = asyncio.ensure_future(asyncio.sleep(1))
            inner.cancel()
            await inner
        if luck < 0.16:
            try:
                await asyncio.sleep(2.5)
            except asyncio.CancelledError:
                await asyncio.sleep(0.2)  # swallowed
        self.finished[message.id] += 1

    async def book(self, batch: Batch[str]) -> None:
        luck = self.draw.random()
        await asyncio.sleep(self.draw.choice([0, 0.3]))
        if luck < 0.1:
            raise ValueError("batch")
        if luck < 0.3:
            self.draw.choice(list(batch)).fail("just this")
        if luck < 0.35:
            await asyncio.sleep(20)
        if luck < 0.37:
            await batch[0].ack()

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> list[Refused]:
        luck = self.draw.random()
        if luck < 0.3:
            await asyncio.sleep(self.draw.choice([0, 0.05, 0.5]))
        if luck < 0.05:
            raise OSError("the broker is away")
        if luck < 0.07:
            raise asyncio.CancelledError  # what the source awaited was cancelled by its reconnect
        if luck < 0.1 and others and others[0].outcome == "dead_letter":
            return [Refused(others[0].message, "rejected", "disk full")]
        return []

    async def receive(self, demand: int) -> None:
        luck = self.draw.random()
        if luck < 0.2:
            await asyncio.sleep(self.draw.choice([0, 0.05]))
        if luck < 0.02:
            raise ConnectionError("cannot be mended")

    async def suspect(self, message: Message[Any]) -> bool:
        await asyncio.sleep(0.01)
        if self.draw.random() < 0.2:
            raise OSError("away")
        if self.running:
            self.broker.violation("a suspect does not run alone")
        return True


@pytest.mark.parametrize("seed", range(60))
async def test_every_message_ends_exactly_once_whatever_happens(seed: int) -> None:
    chaos = Chaos(seed)
    broker = chaos.broker
    for _ in range(8):
        pipeline = chaos.pipeline()
        life = chaos.draw.choice([0.0, 0.1, 1.0, 5.0])
        before = asyncio.get_running_loop().time()
        async with running(pipeline, broker):
            await asyncio.sleep(life)
            before = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - before < 3 + 4 + 2.1, "the drain took too long"
        assert not broker.held
    chaos.broker.on_settle = chaos.broker.on_receive = None
    async with running(chaos.pipeline(), broker):
        await broker.settled(chaos.messages)
    assert sorted(broker.done) == sorted(f"m{n}" for n in range(1, chaos.messages + 1))


async def test_a_stop_after_any_number_of_turns_settles_everything_once() -> None:
    for batched in (False, True):
        for turns in range(60):
            broker = Broker(*map(str, range(30)))

            async def handle(message: Message[bytes]) -> None:
                await asyncio.sleep(0)
                if int(message.body) % 7 == 3:
                    raise ValueError("broken")
                await asyncio.sleep(0)

            async def book(batch: Batch[Any]) -> None:
                await asyncio.sleep(0)

            pipeline = Pipeline(
                broker.open, handle, batch=book if batched else None, concurrency=3, retry=Retry(attempts=1),
                **({"batch_size": 4} if batched else {}),
            )  # fmt: skip
            async with running(pipeline, broker):
                for _ in range(turns):
                    await asyncio.sleep(0)
            assert len(broker.waiting) + len(broker.done) == 30
            assert not broker.held


async def test_a_cancel_after_any_number_of_turns_closes_the_source_and_loses_nothing() -> None:
    for turns in range(60):
        broker = Broker(*map(str, range(30)))

        async def handle(message: Message[bytes]) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        pipeline = Pipeline(broker.open, handle, concurrency=3)
        task = asyncio.create_task(pipeline.run())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(turns % 5):
            await asyncio.sleep(0)
            task.cancel()  # again and again, also in the close
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(1)
        broker.check()
        assert len(broker.waiting) + len(broker.done) == 30
        assert not broker.held


async def test_a_stop_and_a_cancel_at_any_two_turns_close_the_source() -> None:
    for first in range(0, 40, 3):
        for second in range(0, 20, 2):
            broker = Broker(*map(str, range(10)))

            async def handle(message: Message[bytes]) -> None:
                for _ in range(5):
                    await asyncio.sleep(0)

            pipeline = Pipeline(broker.open, handle, concurrency=3)
            task = asyncio.create_task(pipeline.run())
            for _ in range(first):
                await asyncio.sleep(0)
            pipeline.stop()
            for _ in range(second):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))
            await asyncio.sleep(1)
            broker.check()
            assert len(broker.waiting) + len(broker.done) == 10
