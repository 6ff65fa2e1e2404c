"""Acknowledgers: told of every settle, before and after the broker has it, and able to change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import Acknowledger, AlreadySettled, App, Batch, ForeignMessage, LeaseLost, Message, Pipeline, Retry
from sluiceway.message import Refused, Settlement
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time

Acks = Sequence[Message[Any]]
Others = Sequence[Settlement]


class Noting(Acknowledger):
    """Notes what it is told, and what the broker had then."""

    def __init__(self, broker: Broker | None = None) -> None:
        self.broker = broker
        self.told: list[tuple[str, list[str], list[tuple[str, str]]]] = []
        self.refused: list[str] = []

    def note(self, when: str, acks: Acks, others: Others) -> None:
        self.told.append((when, [one.id for one in acks], [(one.message.id, one.outcome) for one in others]))

    async def before_settle(self, acks: Acks, others: Others) -> None:
        ids = [one.id for one in acks] + [one.message.id for one in others]
        assert self.broker is None or not any(self.broker.outcomes(one) for one in ids)
        await asyncio.sleep(0.1)
        self.note("before", acks, others)

    async def after_settle(self, acks: Acks, others: Others, refused: Sequence[Refused]) -> None:
        ids = [one.id for one in acks] + [one.message.id for one in others]
        self.refused += [one.message.id for one in refused]
        assert self.broker is None or all(self.broker.outcomes(one) for one in ids if one not in self.refused)
        self.note("after", acks, others)


async def fail_odd(message: Message[bytes]) -> None:
    if int(message.body) % 2:
        raise ValueError("odd")


async def test_it_is_told_of_successes_and_failures_once_each_before_and_after() -> None:
    broker = Broker(*bodies(4))
    noting = Noting(broker)
    async with running(Pipeline(broker.open, fail_odd, retry=Retry(attempts=1), acknowledgers=[noting]), broker):
        await broker.settled(4)
        await asyncio.sleep(1)
    for when in ("before", "after"):
        told = [one for one in noting.told if one[0] == when]
        assert sorted(one for _, acks, _ in told for one in acks) == ["m2", "m4"]
        assert sorted(one for _, _, others in told for one in others) == [("m1", "dead_letter"), ("m3", "dead_letter")]
        assert all(bool(acks) != bool(others) for _, acks, others in told)


async def test_a_broker_that_settles_at_once_tells_too() -> None:
    app = App(MemoryTransport())
    noting = Noting()

    @app.consumer("work", acknowledgers=[noting])
    async def work(message: Message[int]) -> None: ...

    await app.publish_many("work", range(5))
    async with app.running() as manager:
        await manager.idle()
    assert [(when, len(acks)) for when, acks, _ in noting.told] == [("before", 5), ("after", 5)]


async def test_a_plain_def_may_be_one() -> None:
    told: list[int] = []

    class Counting(Acknowledger):
        def after_settle(self, acks: Acks, others: Others, refused: Sequence[Refused]) -> None:
            told.append(len(acks))

    broker = Broker(*bodies(3))

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, acknowledgers=[Counting()]), broker):
        await broker.settled(3)
    assert sum(told) == 3


@pytest.mark.parametrize("error", [ValueError("broken"), asyncio.CancelledError("inner")])
async def test_one_that_raises_is_logged_and_changes_nothing(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Acknowledger):
        async def before_settle(self, acks: Acks, others: Others) -> None:
            raise error

        async def after_settle(self, acks: Acks, others: Others, refused: Sequence[Refused]) -> None:
            raise error

    broker = Broker(*bodies(4))
    noting = Noting(broker)
    pipeline = Pipeline(broker.open, fail_odd, retry=Retry(attempts=1), acknowledgers=[Broken(), noting])
    async with running(pipeline, broker):
        await broker.settled(4)
        await asyncio.sleep(1)
        stats = pipeline.stats()
        assert stats is not None
        assert stats.held == 0
    assert sorted(broker.acked) == ["m2", "m4"]
    assert len(noting.told) == 4
    assert "before_settle of an acknowledger raised" in caplog.text
    assert "after_settle of an acknowledger raised" in caplog.text


async def test_one_that_changes_what_it_is_given_changes_nothing() -> None:
    class Greedy(Acknowledger):
        def before_settle(self, acks: Any, others: Any) -> None:
            acks.clear()

    broker = Broker(*bodies(2))

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, acknowledgers=[Greedy()]), broker):
        await broker.settled(2)


async def test_a_settle_that_is_made_again_is_told_of_once_and_what_the_broker_refused_is_said() -> None:
    broker = Broker(*bodies(3))
    broker.lost = {"m2"}
    noting = Noting(broker)
    fails = 3

    async def settle(acks: Acks, others: Others) -> None:
        nonlocal fails
        fails -= 1
        if fails >= 0:
            raise OSError("away")

    broker.on_settle = settle

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, acknowledgers=[noting]), broker):
        await broker.settled(2)
        await asyncio.sleep(1)
    assert [when for when, _, _ in noting.told] == ["before", "after"]
    assert noting.refused == ["m2"]


async def test_an_early_ack_is_told_of_before_it_returns() -> None:
    broker = Broker("1")
    noting = Noting(broker)
    seen: list[int] = []

    async def handle(message: Message[bytes]) -> None:
        await message.ack()
        seen.append(len(noting.told))

    async with running(Pipeline(broker.open, handle, acknowledgers=[noting]), broker):
        await broker.settled(1)
        await asyncio.sleep(1)
    assert seen == [2]


async def test_one_that_exits_stops_the_app_and_what_it_was_told_of_is_settled() -> None:
    class Exiting(Acknowledger):
        def before_settle(self, acks: Acks, others: Others) -> None:
            raise SystemExit(3)

    broker = Broker(*bodies(3))

    async def handle(message: Message[bytes]) -> None: ...

    with pytest.raises(SystemExit):
        await Pipeline(broker.open, handle, acknowledgers=[Exiting()]).run()
    broker.check()
    assert len(broker.acked) == 3


async def test_one_that_hangs_does_not_outlast_the_drain_and_loses_nothing() -> None:
    class Hanging(Acknowledger):
        async def before_settle(self, acks: Acks, others: Others) -> None:
            await asyncio.sleep(10_000)

    broker = Broker(*bodies(2))

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, acknowledgers=[Hanging()], shutdown_timeout=5), broker):
        await asyncio.sleep(1)
    assert asyncio.get_running_loop().time() < 15
    assert len(broker.waiting) == 2


# -- several at once, early ------------------------------------------------------------------------------------------


async def test_a_batch_acks_what_it_is_told_in_one_call_and_not_a_second_time() -> None:
    broker = Broker(*bodies(4))
    seen: list[Any] = []

    async def same(message: Message[bytes]) -> bytes:
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        await batch.ack(batch[:2])
        seen.append(broker.calls[:])
        seen.append(list(broker.acked))
        batch[2].fail("no")

    pipeline = Pipeline(broker.open, same, batch=book, batch_size=4, concurrency=1, retry=Retry(attempts=1))
    async with running(pipeline, broker):
        await broker.settled(4)
        await asyncio.sleep(1)
    assert seen == [[(2, 0)], ["m1", "m2"]]
    assert broker.acked == ["m1", "m2", "m4"]
    assert [one.id for one in broker.dead] == ["m3"]


async def test_a_batch_acks_all_but_what_has_failed_or_ended() -> None:
    broker = Broker(*bodies(4))

    async def same(message: Message[bytes]) -> bytes:
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        batch[1].fail("no")
        await batch[0].ack()
        await batch.ack()
        assert broker.acked == ["m1", "m3", "m4"]
        raise ValueError("too late for those")

    pipeline = Pipeline(broker.open, same, batch=book, batch_size=4, concurrency=1, retry=Retry(attempts=1))
    async with running(pipeline, broker):
        await broker.settled(4)
        await asyncio.sleep(1)
    assert broker.acked == ["m1", "m3", "m4"]
    assert [one.id for one in broker.dead] == ["m2"]
    assert len(broker.ended) == 4


async def test_a_batch_that_acks_what_another_has_by_now_is_told_when_all_have_ended() -> None:
    broker = Broker(*bodies(3))
    broker.lost = {"m2"}
    errors: list[BaseException] = []

    async def same(message: Message[bytes]) -> bytes:
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        with pytest.raises(LeaseLost) as caught:
            await batch.ack()
        errors.append(caught.value)
        assert broker.acked == ["m1", "m3"]

    async with running(Pipeline(broker.open, same, batch=book, batch_size=3, concurrency=1), broker):
        await broker.settled(2)
        await asyncio.sleep(1)
    assert "m2" in str(errors[0])


async def test_a_batch_acks_nothing_when_one_is_not_of_it_or_was_settled() -> None:
    broker = Broker(*bodies(4))
    errors: list[str] = []
    first: list[Message[Any]] = []

    async def same(message: Message[bytes]) -> bytes:
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        if not first:
            first.append(batch[0])
            await batch[0].ack()
            with pytest.raises(AlreadySettled) as settled:
                await batch.ack(batch[:])
            errors.append(str(settled.value))
        else:
            with pytest.raises(ForeignMessage) as foreign:
                await batch.ack([batch[0], first[0]])
            errors.append(str(foreign.value))
        assert broker.acked in (["m1"], ["m1", "m2"])

    async with running(Pipeline(broker.open, same, batch=book, batch_size=2, concurrency=1), broker):
        await broker.settled(4)
    assert errors == [
        "message m1 of 'source' is settled already",
        "message m1 of 'source' is not of this batch of 2",
    ]
    assert broker.acked == ["m1", "m2", "m3", "m4"]
