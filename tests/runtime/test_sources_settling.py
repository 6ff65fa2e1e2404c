"""Several sources of one pipeline: what one cannot settle holds up no other, and nothing runs twice at once."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import ConnectError, Message, Pipeline, Retry
from sluiceway.message import Refused, Settlement
from sluiceway.source import SourceInfo
from sluiceway.telemetry import Settled, Telemetry
from sluiceway.testing import external

from .recording import Broker, RecordingSource, bodies, running

pytestmark = pytest.mark.virtual_time


class TwoQueues(Broker):
    """Source 0 gets the messages of even places, source 1 those of odd ones; each settles as it is told."""

    def __init__(self, *bodies: Any) -> None:
        super().__init__(*bodies)
        self.settle_errors: dict[int, Exception] = {}
        self.answers: dict[int, asyncio.Event] = {}  # sources that answer a settle only when this is set

    async def open(self, info: SourceInfo) -> OneQueue:  # type: ignore[override]
        source = OneQueue(self, info.index)
        self.sources.append(source)
        self.changed()
        return source

    def of(self, index: int) -> OneQueue:
        return next(one for one in reversed(self.sources) if isinstance(one, OneQueue) and one.index == index)

    def ended_of(self, index: int) -> int:
        """How many messages of a source have ended for good."""
        return sum(int(name[1:]) % 2 == index for name in self.done)


class OneQueue(RecordingSource):
    broker: TwoQueues

    def __init__(self, broker: TwoQueues, index: int) -> None:
        super().__init__(broker)
        self.index = index
        self.error: Exception | None = None
        self.settles = 0  # calls in flight
        self.most_settles = 0

    def fail(self) -> None:
        self.error = ConnectError("gone")
        self.wake()

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        broker = self.broker
        while not (self.stopped or self.paused or self.closed):
            if self.error is not None:
                raise self.error
            taken = [one for one in broker.waiting if one.place % 2 == self.index][:demand]
            if taken:
                broker.waiting = [one for one in broker.waiting if one not in taken]
                return [self._deliver(entry) for entry in taken]
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return []

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        broker = self.broker
        self.settles += 1
        self.most_settles = max(self.most_settles, self.settles)
        try:
            if self.index in broker.answers:
                await broker.answers[self.index].wait()
            if self.index in broker.settle_errors:
                raise broker.settle_errors[self.index]
            return await super().settle(acks, others)
        finally:
            self.settles -= 1


async def nothing(message: Message[Any]) -> None: ...


async def fail(message: Message[bytes]) -> None:
    raise ValueError("no")


ONCE = Retry(attempts=1)
both = pytest.mark.parametrize("handler", [nothing, fail], ids=["acks", "dead letters"])


@both
async def test_a_settle_that_keeps_raising_in_one_source_holds_up_none_of_the_others(handler: Any) -> None:
    broker = TwoQueues(*bodies(400))
    broker.settle_errors[1] = OSError("away")
    pipeline = Pipeline(broker.open, handler, sources=2, max_demand=250, retry=ONCE)
    async with running(pipeline, broker):
        await asyncio.sleep(60)
        assert broker.ended_of(0) == 200
        assert broker.ended_of(1) == 0
        stats = pipeline.stats()
        assert stats is not None
        assert stats.state == "blocked"
        assert "OSError: away" in (stats.reason or "")
        broker.settle_errors.clear()
        await broker.settled(400)
        await asyncio.sleep(0.1)
        stats = pipeline.stats()
        assert stats is not None
        assert (stats.state, stats.reason, stats.unsettled, stats.held) == ("running", None, 0, 0)


@both
async def test_a_settle_that_does_not_answer_in_one_source_holds_up_none_of_the_others(handler: Any) -> None:
    broker = TwoQueues(*bodies(400))
    broker.answers[1] = asyncio.Event()
    pipeline = Pipeline(broker.open, handler, sources=2, max_demand=250, retry=ONCE)
    async with running(pipeline, broker):
        await asyncio.sleep(60)
        assert broker.ended_of(0) == 200
        assert broker.ended_of(1) == 0
        broker.answers.pop(1).set()
        await broker.settled(400)
    assert broker.of(1).most_settles == 1  # never a second call of a kind while one is in flight
    assert len(broker.done) == 400


async def test_one_that_fails_once_is_settled_again_soon_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry()
    heard: list[Any] = []
    telemetry.attach(heard.append, Settled)
    broker = TwoQueues(*bodies(20))
    broker.settle_errors[1] = OSError("a blip")
    asyncio.get_running_loop().call_later(0.01, broker.settle_errors.clear)
    with caplog.at_level(logging.WARNING):
        async with running(Pipeline(broker.open, nothing, sources=2, telemetry=telemetry), broker):
            await broker.settled(20)
            assert asyncio.get_running_loop().time() < 0.2
    assert sum(event.count for event in heard) == 20
    assert caplog.text.count("a blip") == 1


async def test_what_the_broker_refused_in_an_answer_that_came_late_is_told_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = TwoQueues(*bodies(4))
    broker.lost.add("m1")
    broker.answers[1] = asyncio.Event()
    async with running(Pipeline(broker.open, nothing, sources=2), broker):
        await asyncio.sleep(10)
        broker.answers.pop(1).set()
        await broker.settled(3)
        await asyncio.sleep(10)
        assert not broker.held
    assert caplog.text.count("its lease was lost") == 1


async def test_a_drain_waits_for_what_one_source_settles_late() -> None:
    broker = TwoQueues(*bodies(4))
    broker.settle_errors[1] = OSError("away")
    pipeline = Pipeline(broker.open, nothing, sources=2, shutdown_timeout=20)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
        asyncio.get_running_loop().call_later(5, broker.settle_errors.clear)
    assert len(broker.acked) == 4


@pytest.mark.parametrize("how", ["raises", "hangs"])
async def test_what_is_not_settled_when_the_time_to_drain_is_up_goes_back(how: str) -> None:
    broker = TwoQueues(*bodies(4))
    if how == "raises":
        broker.settle_errors[1] = OSError("away")
    else:
        broker.answers[1] = asyncio.Event()
    pipeline = Pipeline(broker.open, nothing, sources=2, shutdown_timeout=3)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
    assert sorted(broker.acked) == ["m2", "m4"]
    assert [entry.id for entry in broker.waiting] == ["m1", "m3"]
    assert broker.of(1).settles == 0


async def test_a_failed_source_that_is_closed_keeps_what_still_runs_on_a_thread() -> None:
    broker = TwoQueues(*bodies(3))
    release, running_at_once, most = threading.Event(), 0, 0

    def handle(message: Message[bytes]) -> None:
        nonlocal running_at_once, most
        if message.id == "m1":
            running_at_once += 1
            most = max(most, running_at_once)
            release.wait(10)
            running_at_once -= 1

    pipeline = Pipeline(broker.open, handle, sources=2, concurrency=4)
    with external():
        async with running(pipeline, broker):
            await broker.until(lambda: running_at_once and len(broker.acked) == 2, seconds=10)
            failed = broker.of(1)
            broker.settle_errors[1] = ConnectError("gone")
            broker.put("4", "5")
            await broker.until(lambda: "m4" in broker.acked, seconds=10)
            failed.fail()
            await broker.until(lambda: failed.closed, seconds=10)
            assert failed.keep == ["m1"]
            broker.settle_errors.clear()
            await broker.until(lambda: "m5" in broker.acked, seconds=10)
            release.set()
            await asyncio.sleep(0.1)
    assert most == 1
    assert broker.kept[0] == "m1"
