"""What a source may have beside the contract: prepare_for_start and prepare_for_draining."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import Batch, Message, OptionError, Pause, Pipeline, PipelineFailed
from sluiceway.source import SourceInfo

from .recording import Broker, RecordingSource, bodies, running

pytestmark = pytest.mark.virtual_time


class HookedBroker(Broker):
    """Its sources have both hooks, and put out `last` when a drain begins."""

    def __init__(self, *args: Any, last: Sequence[str] = (), late: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.last = last
        self.late = late
        self.log: list[Any] = []
        self.start_error: BaseException | None = None
        self.drain_error: BaseException | None = None
        self.drain_seconds = 0.0

    async def open(self) -> HookedSource:
        source = HookedSource(self)
        self.sources.append(source)
        self.changed()
        return source


class HookedSource(RecordingSource):
    broker: HookedBroker

    def __init__(self, broker: HookedBroker) -> None:
        super().__init__(broker)
        self.left: list[str] = []

    async def prepare_for_start(self, info: SourceInfo) -> None:
        assert not self.broker.demands
        self.broker.log.append(info)
        if self.broker.start_error is not None:
            raise self.broker.start_error

    async def prepare_for_draining(self) -> None:
        assert not self.receiving
        assert not self.stopped
        self.broker.log.append("prepare_for_draining")
        await asyncio.sleep(self.broker.drain_seconds)
        if self.broker.drain_error is not None:
            raise self.broker.drain_error
        self.left = self.broker.put(*self.broker.last)

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        if not self.stopped:
            return await super().receive(demand)
        assert demand >= 1
        entries = [one for one in self.broker.waiting if one.id in self.left][:demand]
        self.broker.waiting = [one for one in self.broker.waiting if one not in entries]
        if not entries:
            self.broker.put(*self.broker.late)
            self.broker.late = ()
        return [self._deliver(entry) for entry in entries]


# -- prepare_for_start -----------------------------------------------------------------------------------------------


async def test_a_source_is_told_its_place_before_the_first_receive() -> None:
    broker = HookedBroker("a")

    async def orders(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, orders, concurrency=7, group="shop", sources=2), broker):
        await broker.settled(1)
    infos = [one for one in broker.log if isinstance(one, SourceInfo)]
    assert [(one.pipeline, one.group, one.topics, one.index, one.count) for one in infos] == [
        ("orders", "shop", ("source",), 0, 2),
        ("orders", "shop", ("source",), 1, 2),
    ]
    assert infos[0].options["concurrency"] == 7
    assert infos[0].options["sources"] == 2


async def test_what_it_raises_is_a_failed_start_and_the_source_is_closed() -> None:
    broker = HookedBroker("a")
    broker.start_error = ConnectionError("no table")

    async def handle(message: Message[bytes]) -> None: ...

    with pytest.raises(PipelineFailed, match="ConnectionError: no table"):
        await Pipeline(broker.open, handle, max_restarts=1).run()
    assert len(broker.sources) == 2
    assert not broker.demands
    broker.check()


async def test_an_option_error_in_it_is_raised_at_once() -> None:
    broker = HookedBroker()
    broker.start_error = OptionError("orders: nothing to do here")

    async def handle(message: Message[bytes]) -> None: ...

    with pytest.raises(OptionError, match="nothing to do here"):
        await Pipeline(broker.open, handle).run()
    assert len(broker.sources) == 1
    broker.check()


async def test_a_stop_while_it_waits_closes_the_source() -> None:
    broker = HookedBroker("a")
    never = asyncio.Event()

    async def prepare(info: SourceInfo) -> None:
        await never.wait()

    async def open_source() -> HookedSource:
        source = await broker.open()
        source.prepare_for_start = prepare  # type: ignore[method-assign]
        return source

    async def handle(message: Message[bytes]) -> None: ...

    pipeline = Pipeline(open_source, handle)
    run = asyncio.create_task(pipeline.run())
    await asyncio.sleep(1)
    pipeline.stop()
    await run
    broker.check()


async def test_a_function_that_opens_sources_may_take_the_place_too() -> None:
    broker = Broker("a")
    places: list[int] = []

    async def open_source(info: SourceInfo) -> RecordingSource:
        places.append(info.index)
        return await broker.open()

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(open_source, handle, sources=3), broker):
        await broker.settled(1)
    assert sorted(places) == [0, 1, 2]


# -- prepare_for_draining --------------------------------------------------------------------------------------------


async def test_what_is_put_out_when_a_drain_begins_is_handled_and_what_comes_later_is_not_taken() -> None:
    broker = HookedBroker("a", last=["last", "very last"], late=["too late"])
    handled: list[bytes] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.payload)

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
    assert handled == [b"a", b"last", b"very last"]
    assert broker.acked == ["m1", "m2", "m3"]
    assert [entry.body for entry in broker.waiting] == [b"too late"]


@pytest.mark.parametrize("sources", [1, 3])
async def test_more_than_the_window_of_them_is_handled_and_the_window_holds(sources: int) -> None:
    broker = HookedBroker(last=[str(number) for number in range(40)], limit=6)

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.01)

    async with running(Pipeline(broker.open, handle, concurrency=2, max_demand=6, sources=sources), broker):
        await asyncio.sleep(1)
    assert len(broker.acked) == 40 * sources
    assert broker.log.count("prepare_for_draining") == sources


async def test_what_had_not_started_before_goes_back_all_the_same() -> None:
    broker = HookedBroker(*bodies(10), last=["last"])

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, handle, concurrency=2, max_demand=6), broker):
        await asyncio.sleep(0.5)
    assert sorted(broker.acked) == ["m1", "m11", "m2"]
    assert [one.outcome for one in broker.ended].count("release") == 4


async def test_they_end_in_their_batches_and_in_the_order_of_their_keys() -> None:
    broker = HookedBroker()
    batches: list[int] = []

    async def handle(message: Message[bytes]) -> None: ...

    async def batch(batch: Batch[Any]) -> None:
        batches.append(len(batch))

    async def open_source() -> HookedSource:
        source = await broker.open()

        async def prepare_for_draining() -> None:
            source.left = broker.put(*"abcdef", key="k")

        source.prepare_for_draining = prepare_for_draining  # type: ignore[method-assign]
        return source

    pipeline = Pipeline(open_source, handle, batch=batch, batch_size=4, concurrency=2, order_by="key")
    async with running(pipeline, broker):
        await asyncio.sleep(1)
    assert broker.acked == [f"m{number}" for number in range(1, 7)]
    assert sum(batches) == 6


async def test_a_hook_that_raises_does_not_hold_up_the_drain(caplog: pytest.LogCaptureFixture) -> None:
    broker = HookedBroker("a", last=["last"])
    broker.drain_error = ValueError("no")

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
    assert broker.acked == ["m1"]
    assert "prepare_for_draining raised; the drain goes on" in caplog.text


async def test_a_hook_that_never_returns_is_cut_off_with_the_drain() -> None:
    broker = HookedBroker("a")
    broker.drain_seconds = 1e9

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, shutdown_timeout=5), broker):
        await broker.settled(1)
        before = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - before < 15


async def test_a_closed_gate_is_not_waited_for() -> None:
    broker = HookedBroker(last=["last"])
    gate = Pause()

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, gates=[gate]), broker):
        gate.close()
        await asyncio.sleep(1)
        before = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - before < 1
    assert broker.log.count("prepare_for_draining") == 1
    assert [entry.body for entry in broker.waiting] == [b"last"]


async def test_one_of_several_that_fails_then_keeps_nothing_of_the_others_from_being_handled() -> None:
    broker = HookedBroker(last=["last"])

    async def handle(message: Message[bytes]) -> None: ...

    def fail_then(source: RecordingSource) -> None:
        receive = source.receive

        async def receive_or_raise(demand: int) -> Sequence[Message[Any]]:
            if source.stopped:
                raise ConnectionError("gone")
            return await receive(demand)

        source.receive = receive_or_raise  # type: ignore[method-assign]

    async with running(Pipeline(broker.open, handle, sources=3), broker):
        await asyncio.sleep(1)
        fail_then(broker.sources[0])
        fail_then(broker.sources[1])
    assert len(broker.acked) == 1
