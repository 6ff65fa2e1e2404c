"""Settling: each delivery ends once, and the broker has the last word."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import AlreadySettled, LeaseLost, Message, Pipeline, PipelineStats, Retry
from sluiceway.message import Refused, Settlement

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time


def stats(pipeline: Pipeline) -> PipelineStats:
    found = pipeline.stats()
    assert found is not None
    return found


@pytest.mark.parametrize("error", [OSError("away"), asyncio.CancelledError("reconnect")])
async def test_a_settle_that_raises_is_made_again_with_the_same_messages(error: BaseException) -> None:
    broker = Broker(*bodies(20), limit=20)
    calls: list[list[str]] = []

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        calls.append([one.id for one in acks] or [one.message.id for one in others])
        if broker.trouble:  # type: ignore[attr-defined]
            raise error

    broker.trouble = True  # type: ignore[attr-defined]
    broker.on_settle = settle

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle, concurrency=5, max_demand=20)
    async with running(pipeline, broker):
        await asyncio.sleep(120)
        now = stats(pipeline)
        assert now.state == "blocked"
        assert now.reason is not None
        assert type(error).__name__ in now.reason
        assert now.held == 20
        assert now.demand == 0
        assert len(calls) > 10
        assert all(ids == calls[0] for ids in calls)
        broker.put(*bodies(10))
        broker.trouble = False  # type: ignore[attr-defined]
        await broker.settled(30)
        await asyncio.sleep(1)
        assert stats(pipeline).state == "running"
        assert stats(pipeline).reason is None


async def test_acks_go_on_while_retries_cannot_be_sent() -> None:
    broker = Broker(*bodies(100))

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        if others and asyncio.get_running_loop().time() < 100:
            raise OSError("no room for retries")

    broker.on_settle = settle

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"1":
            raise ValueError

    pipeline = Pipeline(broker.open, handle)
    async with running(pipeline, broker):
        await broker.until(lambda: len(broker.acked) == 99)
        await asyncio.sleep(10)
        assert stats(pipeline).state == "blocked"  # though acks go through
        await broker.settled(100)


async def test_a_rejected_dead_letter_stops_demand_until_the_broker_takes_it() -> None:
    broker = Broker("bad", *bodies(5))
    full = True

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> list[Refused]:
        return [Refused(one.message, "rejected", "disk full") for one in others if full]

    broker.on_settle = settle

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"bad":
            raise ValueError

    pipeline = Pipeline(broker.open, handle, retry=Retry(attempts=1))
    async with running(pipeline, broker):
        await broker.until(lambda: len(broker.acked) == 5)
        await asyncio.sleep(1)
        assert broker.source.paused  # the demand that waited was taken back
        broker.put(*bodies(50))
        asked = len(broker.demands)
        await asyncio.sleep(200)
        assert len(broker.demands) == asked
        assert len(broker.waiting) == 50
        now = stats(pipeline)
        assert (now.state, now.reason) == ("blocked", "the broker rejected what belongs to message m1: disk full")
        assert now.held == 1
        full = False
        await broker.settled(56)
        assert stats(pipeline).state == "running"
    assert broker.outcomes("m1") == ["dead_letter"]


async def test_a_rejected_ack_is_not_lost() -> None:
    broker = Broker("a")
    full = True

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> list[Refused]:
        nonlocal full
        refused = [Refused(message, "rejected", "disk full") for message in acks if full]
        full = False
        return refused

    broker.on_settle = settle

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
    assert broker.outcomes("m1") == ["ack"]


async def test_a_rejected_message_goes_back_to_the_broker_when_the_pipeline_stops() -> None:
    broker = Broker("bad")

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> list[Refused]:
        return [Refused(one.message, "rejected", "disk full") for one in others]

    broker.on_settle = settle

    async def handle(message: Message[bytes]) -> None:
        raise ValueError

    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=1)), broker):
        await asyncio.sleep(20)
    assert [entry.id for entry in broker.waiting] == ["m1"]


async def test_what_another_consumer_has_by_now_is_dropped_without_a_second_settle() -> None:
    broker = Broker(*bodies(3))
    broker.lost = {"m2"}

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(broker.open, handle)
    async with running(pipeline, broker):
        await broker.settled(2)
        await asyncio.sleep(10)
        assert stats(pipeline).held == 0
        assert stats(pipeline).state == "running"
    assert sorted(broker.acked) == ["m1", "m3"]


async def test_an_early_ack_returns_when_the_broker_has_it() -> None:
    broker = Broker("a")
    seen: list[Any] = []

    async def handle(message: Message[bytes]) -> None:
        await message.ack()
        seen.append(broker.outcomes("m1"))
        with pytest.raises(AlreadySettled):
            await message.ack()
        with pytest.raises(AlreadySettled):
            message.fail("late")
        with pytest.raises(AlreadySettled):
            message.publish("next", 1)
        seen.append("end")

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
        await asyncio.sleep(1)
    assert seen == [["ack"], "end"]
    assert len(broker.ended) == 1


async def test_what_raises_after_an_early_ack_stays_acked_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker("a")

    async def handle(message: Message[bytes]) -> None:
        await message.ack()
        raise ValueError("too late")

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
        await asyncio.sleep(10)
    assert broker.outcomes("m1") == ["ack"]
    assert "failed after it was settled; it stays settled" in caplog.text


async def test_an_early_ack_is_not_batched() -> None:
    broker = Broker("a", "b")
    booked: list[Any] = []

    async def handle(message: Message[bytes]) -> bytes:
        if message.body == b"a":
            await message.ack()
        return message.body

    async def book(batch: Any) -> None:
        booked.extend(batch.values)

    async with running(Pipeline(broker.open, handle, batch=book, batch_timeout=1.0), broker):
        await broker.settled(2)
    assert booked == [b"b"]


async def test_an_early_ack_of_a_lost_lease_raises() -> None:
    broker = Broker("a")
    broker.lost = {"m1"}
    raised: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        try:
            await message.ack()
        except LeaseLost as error:
            raised.append(str(error))

    async with running(Pipeline(broker.open, handle), broker):
        await asyncio.sleep(1)
    assert raised == ["message m1 of 'source' is another consumer's now"]
    assert broker.ended == []


async def test_an_early_ack_sends_the_outputs_so_far() -> None:
    broker = Broker("a")

    async def handle(message: Message[bytes]) -> None:
        message.publish("next", 1)
        await message.ack()

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
    assert [one.body for one in broker.ended[0].outputs] == [b"1"]


class Renewals:
    """A renewer that loses the leases it is told to."""

    def __init__(self, *lost: str) -> None:
        self.lost = lost

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        return [token for token in tokens if token in self.lost]

    def close(self) -> None: ...


def test_unstarted_messages_whose_lease_is_lost_never_start() -> None:
    async def main() -> None:  # in real time: leases are renewed from a thread
        broker = Broker(*bodies(5), limit=5)
        broker.lease = 0.03
        broker.renewer = lambda: Renewals("m1", "m2", "m3")
        go = asyncio.Event()
        started: list[str] = []

        async def handle(message: Message[bytes]) -> None:
            started.append(message.id)
            await go.wait()

        pipeline = Pipeline(broker.open, handle, concurrency=1, max_demand=5)
        async with running(pipeline, broker, check=False):
            await broker.until(lambda: len(broker.held) == 5)
            async with asyncio.timeout(5):
                while stats(pipeline).held != 3:  # noqa: ASYNC110 # a thread says so
                    await asyncio.sleep(0.005)
            go.set()
            await broker.settled(3)
        assert started == ["m1", "m4", "m5"]

    asyncio.run(main())


async def test_what_is_rejected_while_others_are_tried_again_is_tried_again_too() -> None:
    broker = Broker("dead", "late")
    rejects_dead, rejects_acks, slow = True, False, False
    let_go, in_flight = asyncio.Event(), asyncio.Event()

    async def settle(acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        if others and slow:
            in_flight.set()
            await asyncio.sleep(5)  # an ack comes meanwhile, and is rejected
        refused = [Refused(one.message, "rejected", "full") for one in others if rejects_dead]
        return refused + [Refused(one, "rejected", "full") for one in acks if rejects_acks]

    broker.on_settle = settle

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"dead":
            raise ValueError
        await let_go.wait()

    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=1)), broker):
        await asyncio.sleep(1)
        slow = True
        await in_flight.wait()
        rejects_acks = True
        let_go.set()
        await asyncio.sleep(1)
        rejects_dead = rejects_acks = False
        await broker.settled(2)
    assert broker.acked == ["m2"]
    assert not broker.held
