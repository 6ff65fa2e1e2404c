"""Several sources of one pipeline: one demand over all, each reopened alone, nothing lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluiceway import App, ConnectError, Message, OptionError, Pause, Pipeline, PipelineFailed, Retry
from sluiceway._runtime.opening import open_sources
from sluiceway.message import Refused, Settlement
from sluiceway.source import Backlog, Source, SourceInfo, SourceStatus
from sluiceway.testing import run
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, RecordingSource, bodies, running

pytestmark = pytest.mark.virtual_time


class Queue(Broker):
    """One queue with several sources, each of which may hold only messages of its own `share`, and may fail."""

    def __init__(self, *args: Any, shares: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.shares = shares
        self.outstanding = 0  # demand of receives that wait
        self.slow: set[int] = set()  # places whose receives return 1,000 seconds late, with messages
        self.open_error: Exception | None = None

    async def open(self, info: SourceInfo) -> QueueSource:  # type: ignore[override]
        await asyncio.sleep(0)
        if self.open_error is not None:
            raise self.open_error
        source = QueueSource(self, info.index)
        self.sources.append(source)
        self.changed()
        return source

    def current(self, index: int) -> QueueSource:
        """The source that was opened last at a place."""
        return next(one for one in reversed(self.sources) if isinstance(one, QueueSource) and one.index == index)


class QueueSource(RecordingSource):
    broker: Queue

    def __init__(self, broker: Queue, index: int) -> None:
        super().__init__(broker)
        self.index = index
        self.error: BaseException | None = None
        self.settle_error: Exception | None = None

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.wake()

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        broker = self.broker
        broker.outstanding += demand
        if broker.limit is not None and len(broker.held) + broker.outstanding > broker.limit:
            broker.violation(f"held {len(broker.held)} + asked {broker.outstanding} > {broker.limit}")
        self.receiving = True
        broker.demands.append(demand)
        try:
            while not (self.stopped or self.paused or self.closed):
                if self.error is not None:
                    raise self.error
                taken = [one for one in broker.waiting if one.place % broker.shares == self.index % broker.shares]
                taken = taken[:demand]
                if taken:
                    broker.waiting = [one for one in broker.waiting if one not in taken]
                    return [self._deliver(entry) for entry in taken]
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if self.index not in broker.slow:
                return []
            await asyncio.sleep(1000)
            return [self._deliver(broker.waiting.pop(0)) for _ in range(min(demand, len(broker.waiting)))]
        finally:
            self.receiving = False
            broker.outstanding -= demand

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        if self.settle_error is not None:
            raise self.settle_error
        return await super().settle(acks, others)


async def nothing(message: Message[bytes]) -> None: ...


# -- demand ------------------------------------------------------------------------------------------------------


async def test_every_source_is_asked_and_all_messages_are_handled() -> None:
    broker = Queue(*bodies(60), shares=3)
    async with running(Pipeline(broker.open, nothing, sources=3), broker):
        await broker.settled(60)
        assert [one.receiving for one in broker.sources] == [True] * 3
    assert len(broker.sources) == 3


@given(window=st.integers(1, 12), sources=st.integers(2, 5), shares=st.integers(1, 5), pace=st.sampled_from([0, 0.1]))
@settings(max_examples=40, deadline=None)
def test_all_of_them_together_never_hold_more_than_the_window(
    window: int, sources: int, shares: int, pace: float
) -> None:
    async def main() -> None:
        broker = Queue(*bodies(30), limit=window, shares=min(shares, sources))

        async def handle(message: Message[bytes]) -> None:
            await asyncio.sleep(pace)

        async with running(Pipeline(broker.open, handle, sources=sources, concurrency=1, max_demand=window), broker):
            await broker.settled(30)

    run(main())


async def test_a_demand_too_small_for_all_goes_round_so_that_the_only_one_with_messages_is_found() -> None:
    broker = Queue(shares=4, limit=1)
    broker.put("1", "2", "3")  # places 1 to 3: for the sources 1 to 3, one each
    async with running(Pipeline(broker.open, nothing, sources=4, concurrency=1, max_demand=1), broker):
        await broker.settled(3)
        assert asyncio.get_running_loop().time() < 10


async def test_what_is_asked_of_one_is_taken_back_when_another_answers() -> None:
    broker = Queue(shares=2)

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(100)

    async with running(Pipeline(broker.open, handle, sources=2, concurrency=1, max_demand=4), broker, check=False):
        await asyncio.sleep(1)
        assert broker.outstanding == 4
        broker.put("a", "b")  # one for each
        await asyncio.sleep(1)
        assert (len(broker.held), broker.outstanding) == (2, 2)
        broker.put("c", "d")
        await asyncio.sleep(1)
        assert (len(broker.held), broker.outstanding) == (4, 0)


async def merged(broker: Queue, sources: int, window: int) -> Source:
    spec = Pipeline(broker.open, nothing, sources=sources, concurrency=1, max_demand=window)._spec
    return await open_sources(spec, broker.open)


async def test_a_source_that_does_not_return_promptly_holds_up_no_other_and_its_demand_still_counts() -> None:
    broker = Queue(shares=2)
    source = await merged(broker, 2, 10)
    broker.slow = {0}
    broker.put("1")
    (first,) = await source.receive(10)  # source 0 was asked for 5 and does not return
    before = asyncio.get_running_loop().time()
    broker.put("2", "3", "4", "5", "6", "7")
    second = await source.receive(9)
    assert asyncio.get_running_loop().time() - before < 0.1
    assert [message.body for message in second] == [b"3", b"5", b"7"]
    assert broker.demands == [5, 5, 4]
    assert broker.outstanding == 5
    await source.settle([first, *second], ())
    await asyncio.sleep(1000)
    rest = [message.body for _ in range(3) for message in await source.receive(1)]
    assert rest == [b"2", b"4", b"6"]
    await source.aclose()
    broker.check()


async def test_a_closed_gate_takes_back_the_demand_of_all() -> None:
    broker = Queue()
    gate = Pause()
    async with running(Pipeline(broker.open, nothing, sources=3, gates=[gate]), broker):
        await asyncio.sleep(1)
        gate.close()
        await asyncio.sleep(1)
        assert broker.outstanding == 0
        broker.put("a")
        await asyncio.sleep(100)
        assert not broker.acked
        gate.open()
        await broker.settled(1)


# -- settling ----------------------------------------------------------------------------------------------------


async def test_a_settlement_goes_to_the_source_that_gave_the_message() -> None:
    broker = Queue(*bodies(30), shares=3)

    async def handle(message: Message[bytes]) -> None:
        number = int(message.payload)
        if number % 5 == 0 and message.attempt == 1:
            raise ValueError("again")

    pipeline = Pipeline(broker.open, handle, sources=3, retry=Retry(base_delay=1))
    async with running(pipeline, broker):  # a settle of what a source does not hold is a violation
        await broker.settled(30)
    assert sorted(broker.acked) == sorted(f"m{number}" for number in range(1, 31))


async def test_a_settle_that_raises_in_one_source_is_repeated_there_alone() -> None:
    broker = Queue(*bodies(20), shares=2)
    async with running(Pipeline(broker.open, nothing, sources=2), broker):
        broker.current(0).settle_error = OSError("away")
        asyncio.get_running_loop().call_later(10, setattr, broker.current(0), "settle_error", None)
        await broker.settled(20)
        assert asyncio.get_running_loop().time() >= 10
    assert len(broker.acked) == 20  # and none twice: `running` checks


async def test_a_lost_lease_is_told_once_also_when_the_settle_is_repeated_for_another_source(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = Queue(*bodies(4), shares=2)
    broker.lost.add("m1")
    async with running(Pipeline(broker.open, nothing, sources=2), broker):
        broker.current(0).settle_error = OSError("away")
        asyncio.get_running_loop().call_later(5, setattr, broker.current(0), "settle_error", None)
        await broker.settled(3)
    assert caplog.text.count("its lease was lost") == 1


async def test_a_suspicion_is_written_down_by_the_source_that_gave_the_message() -> None:
    broker = Queue(shares=2)
    broker.put("good", suspect=False)
    broker.put("bad", suspect=True, deliveries=4)
    async with running(Pipeline(broker.open, nothing, sources=2), broker):
        await broker.settled(2)
    assert broker.suspected == ["m2"]


class Leases(Queue):
    """Its renewers note what they renew, for each source on its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.renewed: list[tuple[int, list[str]]] = []
        self.gone: set[str] = set()
        self.failing: set[int] = set()

    async def open(self, info: SourceInfo) -> QueueSource:  # type: ignore[override]
        source = await super().open(info)
        source.lease = 30.0 + info.index
        source.renewer = lambda: OneRenewer(self, info.index)
        return source


class OneRenewer:
    def __init__(self, broker: Leases, index: int) -> None:
        self.broker = broker
        self.index = index

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        if self.index in self.broker.failing:
            raise OSError("away")
        self.broker.renewed.append((self.index, sorted(tokens)))
        return [token for token in tokens if token in self.broker.gone]

    def close(self) -> None: ...


async def test_leases_are_renewed_by_the_source_that_gave_the_message_also_when_another_cannot() -> None:
    broker = Leases(*bodies(4), shares=2)
    source = await merged(broker, 2, 10)
    got: list[Message[Any]] = []
    while len(got) < 4:
        got += await source.receive(10 - len(got))
    assert source.lease == 30
    assert source.renewer is not None
    renewer = source.renewer()
    broker.gone = {"m3"}
    tokens = [message.token for message in got]
    assert renewer.renew(tokens) == ["m3"]
    assert sorted(broker.renewed) == [(0, ["m2", "m4"]), (1, ["m1", "m3"])]
    broker.renewed = []
    renewer.renew([message.token for message in got if message.token == "m1"])
    assert broker.renewed == [(1, ["m1"])]
    broker.failing, broker.renewed = {0}, []
    with pytest.raises(OSError, match="away"):
        renewer.renew([*tokens, "of another time"])
    assert broker.renewed == [(1, ["m1", "m3"])]
    renewer.close()
    await source.aclose()


# -- a source that fails ---------------------------------------------------------------------------------------------


async def test_one_that_fails_is_opened_again_alone_while_the_others_flow(caplog: pytest.LogCaptureFixture) -> None:
    broker = Queue(shares=3)
    pipeline = Pipeline(broker.open, nothing, sources=3)
    async with running(pipeline, broker):
        broker.open_error = ConnectError("still away")
        broker.current(1).fail(ConnectError("gone"))
        await asyncio.sleep(1)
        for number in range(30):
            broker.put(str(number))
        await broker.settled(20)
        await asyncio.sleep(60)
        assert len(broker.done) == 20
        stats = pipeline.stats()
        assert stats is not None
        assert (stats.state, stats.restarts) == ("running", 0)
        assert stats.reason == "source 2 of 3: ConnectError: still away"
        broker.open_error = None
        await broker.settled(30)
        assert broker.current(1) is broker.sources[3]
        assert pipeline.stats() is not None
    assert "source 2 of 3: ConnectError: gone; it is opened again in" in caplog.text
    assert len(broker.sources) == 4


async def test_what_a_failed_source_gave_is_still_settled_through_it_and_then_it_is_closed() -> None:
    broker = Queue("a", shares=2)
    released = asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        await released.wait()

    async with running(Pipeline(broker.open, handle, sources=2), broker):
        await asyncio.sleep(1)
        failed = broker.current(1)
        assert len(failed.mine) == 1
        failed.fail(ConnectError("gone"))
        await asyncio.sleep(10)
        assert not failed.closed
        released.set()
        await broker.settled(1)
        await asyncio.sleep(1)
        assert failed.closed
        assert broker.current(1) is not failed


async def test_what_a_failed_source_can_settle_no_more_comes_again() -> None:
    broker = Queue("a", shares=2)
    handled: list[bytes] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.payload)
        await asyncio.sleep(5)

    async with running(Pipeline(broker.open, handle, sources=2), broker):
        await asyncio.sleep(1)
        failed = broker.current(1)
        failed.settle_error = ConnectError("gone")
        failed.fail(ConnectError("gone"))
        await broker.settled(1)
    assert handled == [b"a", b"a"]
    assert broker.acked == ["m1"]


async def test_when_none_is_left_open_the_pipeline_crashes_and_its_rule_decides() -> None:
    broker = Queue("a", shares=2)
    pipeline = Pipeline(broker.open, nothing, sources=2, max_restarts=1)
    task = asyncio.create_task(pipeline.run())
    await broker.settled(1)
    broker.open_error = ConnectError("the broker is down")
    broker.current(0).fail(ConnectError("gone"))
    broker.current(1).fail(ConnectError("gone"))
    with pytest.raises(PipelineFailed, match="the broker is down"):
        await task
    broker.check()


async def test_when_one_cannot_be_opened_at_the_start_the_others_are_closed() -> None:
    broker = Queue()

    async def open_source(info: SourceInfo) -> RecordingSource:
        await asyncio.sleep(info.index)
        if info.index == 2:
            raise ConnectError("no third one")
        return await broker.open(info)

    with pytest.raises(PipelineFailed, match="no third one"):
        await Pipeline(open_source, nothing, sources=4, max_restarts=0).run()
    assert len(broker.sources) == 2
    broker.check()


async def test_an_option_error_on_opening_again_ends_the_pipeline() -> None:
    broker = Queue(shares=2)
    task = asyncio.create_task(Pipeline(broker.open, nothing, sources=2).run())
    await asyncio.sleep(1)
    broker.open_error = OptionError("orders: the table was renamed")
    broker.current(0).fail(ConnectError("gone"))
    with pytest.raises(OptionError, match="renamed"):
        await task
    broker.check()


# -- stop, drain, cancel -----------------------------------------------------------------------------------------


async def test_cancelled_with_messages_of_a_failed_source_in_hand_it_closes_that_too() -> None:
    broker = Queue("a", shares=2)

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1000)

    task = asyncio.create_task(Pipeline(broker.open, handle, sources=2).run())
    await asyncio.sleep(1)
    broker.current(1).fail(ConnectError("gone"))
    await asyncio.sleep(10)
    assert len(broker.sources) == 3
    task.cancel()
    await asyncio.wait((task,))
    assert [entry.id for entry in broker.waiting] == ["m1"]
    broker.check()


async def test_a_source_that_opens_though_its_opening_was_cancelled_is_closed() -> None:
    broker = Queue(shares=2)
    stubborn = asyncio.Event()

    async def open_source(info: SourceInfo) -> RecordingSource:
        if broker.open_error is not None:
            try:
                await stubborn.wait()
            except asyncio.CancelledError:
                broker.open_error = None
        return await broker.open(info)

    async with running(Pipeline(open_source, nothing, sources=2), broker):
        broker.open_error = ConnectError("gone")
        broker.current(0).fail(ConnectError("gone"))
        await asyncio.sleep(10)
    assert len(broker.sources) == 3
    broker.check()


@pytest.mark.parametrize("after", [0, 0.01, 0.1, 1])
async def test_a_stop_while_one_is_opened_again_closes_all(after: float) -> None:
    broker = Queue(*bodies(5), shares=2)
    async with running(Pipeline(broker.open, nothing, sources=2), broker):
        broker.current(0).fail(ConnectError("gone"))
        await asyncio.sleep(after)
    assert not broker.held


async def test_what_still_runs_on_a_thread_is_kept_by_its_source_alone() -> None:
    broker = Queue(*bodies(2), shares=2)
    pipeline = Pipeline(broker.open, nothing, sources=2)
    async with running(pipeline, broker):
        await broker.settled(2)
    assert all(one.keep == [] for one in broker.sources)


class World:
    """A pipeline with several sources to which hypothesis does things."""

    def __init__(self, sources: int, concurrency: int, shares: int) -> None:
        self.broker = Queue(*bodies(25), shares=min(shares, sources), limit=12)
        self.gate = Pause()
        self.sources = sources
        self.pipeline = Pipeline(
            self.broker.open, self.handle, sources=sources, concurrency=concurrency, max_demand=12, gates=[self.gate],
            max_restarts=1000, retry=Retry(attempts=100, base_delay=0.05), shutdown_timeout=2,
        )  # fmt: skip

    async def handle(self, message: Message[bytes]) -> None:
        number = int(message.payload)
        await asyncio.sleep((0, 0, 0.01, 0.3)[number % 4])
        if number % 7 == 0 and message.attempt < 3:
            raise ValueError("again")

    async def do(self, step: tuple[str, int]) -> None:
        what, number = step
        opened = [one for one in self.broker.sources if isinstance(one, QueueSource) and not one.closed]
        one = opened[number % len(opened)] if opened else None
        if what == "turn":
            for _ in range(number):
                await asyncio.sleep(0)
        elif what == "wait":
            await asyncio.sleep(number / 100)
        elif what == "put":
            self.broker.put(*(str(100 + n) for n in range(number)))
        elif what == "pause":
            self.gate.close()
        elif what == "resume":
            self.gate.open()
        elif what == "fail" and one is not None:
            one.fail(ConnectError("gone"))
        elif what == "settles fail" and one is not None:
            one.settle_error = ConnectError("settle")
        elif what == "settles work" and one is not None:
            one.settle_error = None

    def mend(self) -> None:
        self.gate.open()
        for one in self.broker.sources:
            if isinstance(one, QueueSource):
                one.settle_error = None

    def check(self) -> None:
        broker = self.broker
        assert not broker.violations
        assert not broker.held
        assert all(one.closed for one in broker.sources)
        done = [*broker.done, *(entry.id for entry in (*broker.waiting, *broker.delayed))]
        assert sorted(done) == sorted(f"m{number}" for number in range(1, broker._count + 1))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["turn", "turn", "wait", "wait", "put", "fail", "pause", "resume", "settles fail", "settles work"]
        ),
        st.integers(1, 9),
    ),
    max_size=14,
)
HARD = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(STEPS, st.integers(2, 4), st.sampled_from([1, 3]), st.integers(1, 4))
@HARD
def test_whatever_happens_every_message_ends_once(
    steps: list[tuple[str, int]], sources: int, concurrency: int, shares: int
) -> None:
    async def main() -> None:
        world = World(sources, concurrency, shares)
        async with running(world.pipeline, world.broker, check=False):
            for step in steps:
                await world.do(step)
            world.mend()
            await world.broker.until(lambda: len(set(world.broker.done)) == world.broker._count)
        world.check()

    run(main())


@given(STEPS, st.integers(2, 4), st.sampled_from([1, 3]), st.integers(0, 60), st.booleans())
@HARD
def test_cancelled_or_stopped_at_any_moment_it_leaves_nothing_held_and_nothing_lost(
    steps: list[tuple[str, int]], sources: int, concurrency: int, turns: int, stop: bool
) -> None:
    async def main() -> None:
        world = World(sources, concurrency, sources)
        task = asyncio.create_task(world.pipeline.run())
        for step in steps:
            await world.do(step)
        for _ in range(1 + turns):  # a stop before the run began would mean nothing
            await asyncio.sleep(0)
        world.pipeline.stop() if stop else task.cancel()
        await asyncio.wait((task,))
        await asyncio.sleep(100)
        world.check()

    run(main())


# -- what is told of all -----------------------------------------------------------------------------------------


async def test_the_backlog_is_the_largest_that_one_tells_of_and_held_messages_are_summed() -> None:
    broker = Queue(shares=2)
    statuses: list[SourceStatus] = []

    async def open_source(info: SourceInfo) -> RecordingSource:
        source = await broker.open(info)

        async def backlog() -> Backlog | None:
            return [Backlog(7, 1.0), None][info.index]

        def status() -> SourceStatus:
            scopes = frozenset({info.index})
            return SourceStatus(state="running", since=1.0, held_by_broker=info.index + 1, scopes=scopes)

        source.backlog = backlog  # type: ignore[method-assign]
        source.status = status  # type: ignore[method-assign]
        return source

    pipeline = Pipeline(open_source, nothing, sources=2)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
        assert pipeline._supervisor is not None
        assert await pipeline._supervisor.backlog() == Backlog(7, 1.0)
        flow = pipeline._supervisor._flow
        assert flow is not None
        statuses.append(flow.source.status())
    assert statuses[0].held_by_broker == 3
    assert statuses[0].scopes == {0, 1}
    assert statuses[0].state == "running"


# -- apps ----------------------------------------------------------------------------------------------------------


async def test_a_consumer_of_an_app_may_have_several_sources_too() -> None:
    transport = MemoryTransport()
    app = App(transport)
    handled: list[int] = []

    @app.consumer("t", sources=3)
    async def work(message: Message[int]) -> None:
        handled.append(message.payload)

    async with app.running() as manager:
        await app.publish_many("t", range(100))
        await manager.idle()
        assert (await manager.backlog("work")) == Backlog(0, 0.0)
    assert sorted(handled) == list(range(100))
    assert transport.held("default") == 0
