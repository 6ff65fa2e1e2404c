"""A rate limit: demand is limited before the broker is asked, by all pipelines together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluiceway import Message, Pause, Pipeline, PipelineFailed, RateLimit

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time


class Counted(RateLimit):
    """A rate limit that notes what was received when, and how often it was asked."""

    def __init__(self, messages: int, seconds: float, **options: Any) -> None:
        super().__init__(messages, seconds, **options)
        self.received: list[tuple[float, int]] = []
        self.asked = 0

    def allow(self, now: float, wanted: int) -> int:
        self.asked += 1
        return super().allow(now, wanted)

    def took(self, now: float, count: int) -> None:
        self.received.append((now, count))
        super().took(now, count)

    def count(self, since: float = 0.0) -> int:
        return sum(count for at, count in self.received if at >= since)

    def check(self, messages: int, seconds: float) -> None:
        """In no interval more than the limit."""
        for start, _ in self.received:
            inside = sum(count for at, count in self.received if start <= at < start + seconds)
            assert inside <= messages, f"{inside} from {start}"


async def nothing(message: Message[bytes]) -> None: ...


@asynccontextmanager
async def all_running(brokers: Sequence[Broker], gates: Sequence[Any], **options: Any) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for broker in brokers:
            await stack.enter_async_context(running(Pipeline(broker.open, nothing, gates=gates, **options), broker))
        yield


def now() -> float:
    return asyncio.get_running_loop().time()


# -- one pipeline ----------------------------------------------------------------------------------------------------


async def test_messages_come_in_groups_of_the_limit_and_in_order() -> None:
    broker, limit = Broker(*bodies(5)), Counted(2, 0.05)
    async with running(Pipeline(broker.open, nothing, concurrency=2, gates=[limit]), broker):
        await broker.settled(5)
    assert [count for _, count in limit.received] == [2, 2, 1]
    assert broker.acked == ["m1", "m2", "m3", "m4", "m5"]
    limit.check(2, 0.05)


async def test_the_broker_is_never_asked_for_more_than_the_limit() -> None:
    broker, limit = Broker(*bodies(30)), RateLimit(7, 10)
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(30)
    assert max(broker.demands) == 7
    assert broker.max_most <= 7


async def test_while_it_is_closed_nothing_is_asked_and_nothing_wakes() -> None:
    broker, limit = Broker(*bodies(3)), Counted(1, 10)
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(1)
        await asyncio.sleep(0.1)
        demands, asked = len(broker.demands), limit.asked
        await asyncio.sleep(9)
        assert (len(broker.demands), limit.asked) == (demands, asked)
        await broker.settled(3)
        assert now() == pytest.approx(20, abs=0.2)


async def test_a_receive_that_brings_fewer_gives_the_rest_back() -> None:
    broker, limit = Broker(*bodies(3)), RateLimit(10, 60)
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(3)
        assert limit.allowed == 7
        broker.put(*bodies(7))
        await broker.settled(10)
        assert now() < 1


async def test_retries_count_too() -> None:
    broker, limit = Broker("once"), Counted(1, 10)

    async def fail_first(message: Message[bytes]) -> None:
        if message.attempt == 1:
            raise ValueError("no")

    async with running(Pipeline(broker.open, fail_first, gates=[limit]), broker):
        await broker.settled(1)
    assert [at for at, _ in limit.received] == pytest.approx([0, 10], abs=0.1)


async def test_a_drain_while_it_is_closed_is_over_at_once() -> None:
    broker, limit = Broker(*bodies(3)), RateLimit(1, 3600)
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(1)
        await asyncio.sleep(1)
        began = now()
    assert now() - began < 0.1
    assert len(broker.waiting) == 2


async def test_the_limit_holds_over_a_restart_of_the_pipeline() -> None:
    broker, limit = Broker(*bodies(6)), Counted(2, 10)
    broken = False

    async def receive(demand: int) -> None:
        nonlocal broken
        if len(broker.acked) == 2 and not broken:
            broken = True
            raise ConnectionError("gone")

    broker.on_receive = receive
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(6)
    assert broken
    assert len(broker.sources) == 2
    limit.check(2, 10)
    assert now() == pytest.approx(20, abs=0.2)


async def test_what_a_receive_that_raised_had_asked_for_is_free_again() -> None:
    broker, limit = Broker(*bodies(2)), RateLimit(2, 1000)

    async def receive(demand: int) -> None:
        if len(broker.sources) == 1:
            raise ConnectionError("gone")

    broker.on_receive = receive
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(2)
    assert now() < 10


# -- many gates ------------------------------------------------------------------------------------------------------


async def test_of_many_limits_the_strictest_counts_and_each_opens_by_its_own_time() -> None:
    broker = Broker(*bodies(9))
    limits = [Counted(3, 1), Counted(4, 7), Counted(100, 1), Counted(6, 20)]
    async with running(Pipeline(broker.open, nothing, gates=limits), broker):
        await broker.settled(9)
    for limit in limits:
        limit.check(limit.messages, limit.seconds)
    assert now() == pytest.approx(20, abs=0.3)


async def test_a_limit_that_opens_while_a_pause_is_closed_starts_nothing_until_both_are_open() -> None:
    broker, limit, pause = Broker(*bodies(4)), RateLimit(2, 10), Pause()
    async with running(Pipeline(broker.open, nothing, gates=[limit, pause]), broker):
        await broker.settled(2)
        pause.close()
        await asyncio.sleep(100)
        assert len(broker.acked) == 2
        pause.open()
        await broker.settled(4)
        assert now() == pytest.approx(100, abs=0.1)


async def test_what_one_gate_does_not_allow_is_not_taken_from_the_other() -> None:
    wide, narrow = RateLimit(10, 1000), RateLimit(1, 1000)
    first, second = Broker(), Broker(*bodies(9))
    async with running(Pipeline(first.open, nothing, gates=[wide, narrow]), first):
        await first.until(lambda: first.source.receiving)
        async with running(Pipeline(second.open, nothing, gates=[wide]), second):
            await second.settled(9)
            assert now() < 1
    assert first.demands == [1]


# -- several pipelines -----------------------------------------------------------------------------------------------


async def test_two_pipelines_that_ask_at_the_same_time_never_get_more_than_the_limit() -> None:
    limit = Counted(10, 10)
    brokers = [Broker(*bodies(40)), Broker(*bodies(40))]
    for broker in brokers:

        async def receive(demand: int) -> None:
            await asyncio.sleep(0.01)  # so that both have asked before either has received

        broker.on_receive = receive
    async with all_running(brokers, [limit]):
        for broker in brokers:
            await broker.settled(40)
    limit.check(10, 10)
    assert now() == pytest.approx(70, abs=0.5)


async def test_pipelines_that_are_all_busy_share_each_interval() -> None:
    limit = Counted(12, 10)
    brokers = [Broker(*bodies(1000)) for _ in range(3)]
    async with all_running(brokers, [limit], max_demand=100):
        await asyncio.sleep(5)
        for _ in range(20):
            before = [len(broker.acked) for broker in brokers]
            await asyncio.sleep(10)
            done = [len(broker.acked) - count for broker, count in zip(brokers, before, strict=True)]
            assert sum(done) == 12
            assert min(done) >= 2
    limit.check(12, 10)


@pytest.mark.parametrize(("messages", "seconds"), [(10, 0.05), (100, 1), (10, 10)])
async def test_a_pipeline_to_which_nothing_comes_leaves_the_limit_to_the_others(messages: int, seconds: float) -> None:
    limit = Counted(messages, seconds)
    idle, busy = Broker(), Broker(*bodies(220 * messages))
    async with all_running([idle, busy], [limit], max_demand=100):
        await asyncio.sleep(200 * seconds)
        assert len(busy.acked) >= 0.85 * 200 * messages
    limit.check(messages, seconds)


async def test_with_fewer_allowed_than_pipelines_each_gets_its_message_soon() -> None:
    limit = Counted(1, 10)
    brokers = [Broker(), Broker(), Broker()]
    async with all_running(brokers, [limit]):
        for turn, broker in enumerate(brokers):
            await asyncio.sleep(15)
            began = now()
            broker.put(b"%d" % turn)
            await broker.settled(1)
            assert now() - began < 1
    limit.check(1, 10)


async def test_while_a_shared_limit_is_used_up_nobody_wakes() -> None:
    limit = Counted(1, 1000)
    brokers = [Broker(*bodies(5)), Broker(), Broker(*bodies(5))]
    async with all_running(brokers, [limit]):
        await asyncio.sleep(10)
        demands, asked = sum(len(broker.demands) for broker in brokers), limit.asked
        await asyncio.sleep(900)
        assert (sum(len(broker.demands) for broker in brokers), limit.asked) == (demands, asked)
        assert limit.count() == 1


async def test_a_pipeline_that_stops_leaves_what_it_had_asked_for_to_the_others() -> None:
    limit = RateLimit(5, 1000)
    first, second = Broker(), Broker(*bodies(5))
    async with running(Pipeline(first.open, nothing, gates=[limit]), first):
        await first.until(lambda: first.source.receiving)
    async with running(Pipeline(second.open, nothing, gates=[limit]), second):
        await second.settled(5)
        assert now() < 1


INTERLEAVED = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 9), st.sampled_from([0.0, 0.001, 0.3, 1.0, 4.0, 11.0])), max_size=25
)


@given(publishes=INTERLEAVED, messages=st.integers(1, 7), delays=st.lists(st.floats(0, 0.5), min_size=1, max_size=5))
async def test_however_messages_and_receives_interleave_the_limit_holds_and_all_are_handled(
    publishes: list[tuple[int, int, float]], messages: int, delays: list[float]
) -> None:
    limit = Counted(messages, 5.0)
    brokers = [Broker(), Broker(), Broker()]
    receives = 0

    async def receive(demand: int) -> None:
        nonlocal receives
        receives += 1
        await asyncio.sleep(delays[receives % len(delays)])

    for broker in brokers:
        broker.on_receive = receive
    counts = [0, 0, 0]
    async with all_running(brokers, [limit], concurrency=2):
        for index, count, pause in publishes:
            brokers[index].put(*bodies(count))
            counts[index] += count
            await asyncio.sleep(pause)
        for broker, count in zip(brokers, counts, strict=True):
            await broker.settled(count)
    limit.check(messages, 5.0)


# -- changes ---------------------------------------------------------------------------------------------------------


async def test_a_higher_limit_takes_effect_at_once() -> None:
    broker, limit = Broker(*bodies(10)), RateLimit(1, 5000)
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(1)
        await asyncio.sleep(1)
        limit.change(messages=4)
        await broker.settled(4)
        assert now() < 2
        await asyncio.sleep(1000)
        assert len(broker.acked) == 4
        assert (limit.messages, limit.seconds, limit.allowed, limit.resets_at) == (4, 5000, 0, pytest.approx(5001))


async def test_a_change_for_the_next_interval_waits_for_it() -> None:
    broker, limit = Broker(*bodies(10)), RateLimit(1, 50)
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(1)
        limit.change(messages=3, now=False)
        assert limit.messages == 1
        await asyncio.sleep(49)
        assert len(broker.acked) == 1
        await broker.settled(4)
        assert limit.messages == 3
        assert now() == pytest.approx(50, abs=0.1)


async def test_a_shorter_interval_wakes_who_waits_for_the_longer_one() -> None:
    broker, limit = Broker(*bodies(2)), RateLimit(1, 3600)
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(1)
        await asyncio.sleep(1)
        limit.change(seconds=10)
        await broker.settled(2)
        assert now() == pytest.approx(10, abs=0.1)


async def test_a_lower_limit_takes_back_the_demand_that_waits_and_what_was_received_runs() -> None:
    broker, limit = Broker(*bodies(4)), Counted(10, 1000)
    go = asyncio.Event()

    async def wait(message: Message[bytes]) -> None:
        await go.wait()

    async with running(Pipeline(broker.open, wait, concurrency=1, max_demand=10, gates=[limit]), broker):
        await broker.until(lambda: len(broker.held) == 4 and broker.source.receiving)
        assert broker.demands[-1] == 6
        limit.change(messages=5)
        await broker.until(lambda: broker.demands[-1] == 1)
        broker.put(*bodies(5))
        go.set()
        await broker.settled(5)
        await asyncio.sleep(900)
        assert len(broker.acked) == 5


async def test_a_limit_below_what_was_received_lets_that_run_and_asks_for_nothing() -> None:
    broker, limit = Broker(*bodies(20)), RateLimit(10, 100)

    async def slow(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, slow, concurrency=1, max_demand=10, gates=[limit]), broker):
        await asyncio.sleep(0.5)
        assert len(broker.held) == 10
        limit.change(messages=2)
        await asyncio.sleep(50)
        assert len(broker.acked) == 10
        await asyncio.sleep(100)
        assert len(broker.acked) == 12


async def test_a_reset_frees_all_of_it_at_once() -> None:
    broker, limit = Broker(*bodies(2)), RateLimit(1, 10)
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(1)
        limit.reset()
        await broker.settled(2)
        assert now() < 1


async def test_a_drain_begins_at_once_also_after_a_change_while_it_is_closed() -> None:
    broker, limit = Broker(*bodies(3)), RateLimit(1, 1000)
    broker.lease = 10.0
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(1)
        limit.change(seconds=2000)
        await asyncio.sleep(100)
        began = now()
    assert now() - began < 0.1


async def test_what_a_receive_of_no_list_had_asked_for_is_free_again() -> None:
    limit = RateLimit(10, 1)
    broken, broker = Broker(), Broker("a")

    async def receive(demand: int) -> Any:
        return None

    async def open_broken() -> Any:
        source = await broken.open()
        source.receive = receive  # type: ignore[assignment, method-assign]
        return source

    with pytest.raises(PipelineFailed):
        await Pipeline(open_broken, nothing, gates=[limit]).run()
    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        await broker.settled(1)


async def test_what_a_receive_of_no_messages_had_asked_for_is_free_for_a_pipeline_that_runs_meanwhile() -> None:
    limit = RateLimit(10, 1)
    broken, broker = Broker("a"), Broker()

    async def receive(demand: int) -> Any:
        return ["a"]

    async def open_broken() -> Any:
        source = await broken.open()
        source.receive = receive  # type: ignore[assignment, method-assign]
        return source

    async with running(Pipeline(broker.open, nothing, gates=[limit]), broker):
        with pytest.raises(PipelineFailed, match="a source's receive returns Messages, got str"):
            await Pipeline(open_broken, nothing, gates=[limit], max_restarts=0).run()
        broker.put("b")
        async with asyncio.timeout(10):
            await broker.settled(1)


async def test_a_gate_that_raises_leaves_nobody_waiting_at_it() -> None:
    class Fragile:
        broken = True

        def allow(self, now: float, wanted: int) -> int:
            return 0 if self.broken else min(wanted, 4)

        def took(self, now: float, count: int) -> None: ...

        def opens_at(self, now: float) -> float | None:
            raise ZeroDivisionError

        def on_change(self, call: Any) -> None: ...

    gate, broker = Fragile(), Broker()
    with pytest.raises(PipelineFailed):
        await Pipeline(Broker().open, nothing, gates=[gate]).run()
    gate.broken = False
    pipeline = Pipeline(broker.open, nothing, gates=[gate])
    async with running(pipeline, broker):
        await asyncio.sleep(1)
        stats = pipeline.stats()
        assert stats is not None
        assert stats.demand == 4  # all that it allows: no ghost of the other has a share
