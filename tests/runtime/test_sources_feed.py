"""A feed: a source of one's own in a few lines, with demand, settling and redelivery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluiceway import (
    Message,
    OptionError,
    Outgoing,
    Pause,
    Pipeline,
    PipelineFailed,
    PublishError,
    Release,
    Retry,
    RetryLater,
)
from sluiceway.source import Source, SourceInfo
from sluiceway.sources import Feed
from sluiceway.testing import run

pytestmark = pytest.mark.virtual_time


class Numbers(Feed):
    """Counts up to `end`, and notes all that happens to it."""

    topic = "numbers"

    def __init__(self, end: int | None = None) -> None:
        self.end = end
        self.next = 1
        self.demands: list[int] = []
        self.log: list[Any] = []
        self.errors: list[BaseException] = []
        self.keep = True
        self.last: list[int] = []
        self.published: list[Outgoing] = []

    async def fetch(self, demand: int) -> Sequence[int] | None:
        self.demands.append(demand)
        if self.errors:
            raise self.errors.pop(0)
        if self.end is not None and self.next > self.end:
            return None
        stop = self.next + demand if self.end is None else min(self.next + demand, self.end + 1)
        events, self.next = range(self.next, stop), stop
        return events

    def message(self, event: Any) -> Message[Any]:
        if event == 13:
            raise KeyError("unlucky")
        return Message(self.topic, b"%d" % event, id=f"n{event}", key=str(event % 3))

    async def ended(self, messages: Sequence[Message[Any]]) -> None:
        self.log += [("ended", message.token) for message in messages]

    async def retried(self, message: Message[Any], delay: float) -> bool:
        self.log.append(("retried", message.token))
        return self.keep

    async def released(self, message: Message[Any], delay: float) -> bool:
        self.log.append(("released", message.token))
        return self.keep

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        self.published += messages

    async def prepare_for_start(self, info: SourceInfo) -> None:
        self.log.append(info.pipeline)

    async def prepare_for_draining(self) -> Sequence[int]:
        return self.last

    def of(self, what: str) -> list[int]:  # type: ignore[override]
        return [one[1] for one in self.log if one[0] == what]


async def nothing(message: Message[Any]) -> None: ...


async def finish(feed: Feed, pipeline: Pipeline) -> None:
    async with asyncio.timeout(10_000), pipeline.running():
        await feed.finished()


# -- the whole way -----------------------------------------------------------------------------------------------


async def test_every_event_is_handled_in_order_and_ended_and_then_the_feed_is_finished() -> None:
    feed = Numbers(12)
    handled: list[Any] = []

    async def handle(message: Message[int]) -> None:
        handled.append((message.topic, message.payload, message.id, message.token))

    await finish(feed, Pipeline(feed.open, handle, concurrency=1))
    assert handled == [("numbers", number, f"n{number}", number) for number in range(1, 13)]
    assert sorted(feed.of("ended")) == list(range(1, 13))
    assert feed.log[0] == "handle"


async def test_no_more_is_fetched_than_the_window_has_room_for() -> None:
    feed = Numbers()

    async def handle(message: Message[int]) -> None:
        await asyncio.sleep(1000)

    async with Pipeline(feed.open, handle, concurrency=3, max_demand=7).running() as pipeline:
        await asyncio.sleep(100)
        assert feed.next - 1 == 7
        stats = pipeline.stats()
        assert stats is not None
        assert stats.held == 7


async def test_a_feed_with_nothing_new_is_asked_again_after_its_interval() -> None:
    class Poll(Numbers):
        poll_interval = 5.0

        async def fetch(self, demand: int) -> Sequence[int] | None:
            self.demands.append(demand)
            return [] if len(self.demands) < 4 else None

    feed = Poll()
    before = asyncio.get_running_loop().time()
    await finish(feed, Pipeline(feed.open, nothing))
    assert asyncio.get_running_loop().time() - before == pytest.approx(15, abs=0.1)


async def test_several_sources_share_one_feed() -> None:
    feed = Numbers(200)
    handled: list[int] = []

    async def handle(message: Message[int]) -> None:
        handled.append(message.payload)

    await finish(feed, Pipeline(feed.open, handle, sources=3))
    assert sorted(handled) == [number for number in range(1, 201) if number != 13]


# -- how deliveries end ------------------------------------------------------------------------------------------


async def test_a_failed_message_comes_again_after_its_delay_with_its_attempt() -> None:
    feed = Numbers(1)
    attempts: list[tuple[int, float]] = []

    async def handle(message: Message[int]) -> None:
        attempts.append((message.attempt, round(asyncio.get_running_loop().time() - before)))
        if message.attempt < 3:
            raise RetryLater(10)

    before = asyncio.get_running_loop().time()
    await finish(feed, Pipeline(feed.open, handle))
    assert attempts == [(1, 0), (2, 10), (3, 20)]
    assert feed.log == ["handle", ("retried", 1), ("retried", 1), ("ended", 1)]


async def test_what_its_hook_has_sent_elsewhere_is_forgotten_here() -> None:
    feed = Numbers(3)
    feed.keep = False

    async def handle(message: Message[int]) -> None:
        raise ValueError if message.payload == 1 else Release

    await finish(feed, Pipeline(feed.open, handle))
    assert sorted(feed.of("retried") + feed.of("released")) == [1, 2, 3]
    assert feed.of("ended") == []


async def test_a_message_that_is_not_tried_again_is_published_as_dead_letter_and_then_ended() -> None:
    feed = Numbers(1)

    async def handle(message: Message[int]) -> None:
        message.publish("audit", "tried")
        raise ValueError("no")

    await finish(feed, Pipeline(feed.open, handle, retry=Retry(attempts=2, base_delay=1)))
    assert [one.topic for one in feed.published] == ["numbers.default.dead"]
    assert feed.of("ended") == [1]


async def test_an_event_that_cannot_be_made_a_message_is_dead_lettered_alone() -> None:
    feed = Numbers(20)
    await finish(feed, Pipeline(feed.open, nothing))
    (letter,) = feed.published
    assert "Numbers.message raised KeyError: 'unlucky'" in letter.headers["sluiceway-dead-error"]
    assert letter.body == b"13"
    assert sorted(feed.of("ended")) == list(range(1, 21))


async def test_a_feed_with_nowhere_to_publish_is_refused_at_start_unless_failures_are_dropped() -> None:
    with pytest.raises(
        OptionError, match=r'override its publish\(\), or lose what fails for good with exhausted="drop"'
    ):
        await Pipeline(Feed.of([1]).open, nothing).run()
    feed = Feed.of([1])
    await finish(feed, Pipeline(feed.open, nothing, exhausted="drop"))


@pytest.mark.parametrize("hook", ["ended", "retried", "released", "publish"])
async def test_a_hook_that_raises_is_called_again_and_nothing_ends_twice(hook: str) -> None:
    feed = Numbers(30)
    real = getattr(feed, hook)
    fails = [OSError("away"), OSError("away")]

    async def flaky(*args: Any) -> Any:
        if fails:
            raise fails.pop()
        return await real(*args)

    setattr(feed, hook, flaky)

    async def handle(message: Message[int]) -> None:
        if message.attempt == 1 and message.payload % 3 == 0:
            raise ValueError("again")
        if message.payload == 7 and not feed.of("released"):
            raise Release
        if message.payload % 5 == 0:
            message.publish("fives", message.payload)

    await finish(feed, Pipeline(feed.open, handle, retry=Retry(base_delay=1)))
    assert not fails
    assert sorted(feed.of("ended")) == list(range(1, 31))
    assert len([one for one in feed.published if one.topic == "fives"]) == 6


async def test_what_is_never_accepted_blocks_demand_and_says_so() -> None:
    feed = Numbers(100)
    accept = False

    async def publish(messages: Sequence[Outgoing]) -> None:
        if not accept:
            raise PublishError("over the limit")

    feed.publish = publish  # type: ignore[method-assign]

    async def handle(message: Message[int]) -> None:
        if message.payload == 1:
            message.publish("out", 1)

    async with Pipeline(feed.open, handle, max_demand=10).running() as pipeline:
        await asyncio.sleep(60)
        stats = pipeline.stats()
        assert stats is not None
        assert stats.state == "blocked"
        assert "over the limit" in (stats.reason or "")
        accept = True
        await feed.finished()


# -- drain, crash, restart ---------------------------------------------------------------------------------------


async def test_a_drain_keeps_what_had_not_started_for_the_next_run() -> None:
    feed = Numbers(20)
    handled: list[int] = []

    async def handle(message: Message[int]) -> None:
        await asyncio.sleep(1)
        handled.append(message.payload)

    pipeline = Pipeline(feed.open, handle, concurrency=2, max_demand=8)
    async with pipeline.running():
        await asyncio.sleep(0.5)
    assert handled == [1, 2]
    await finish(feed, pipeline)
    assert sorted(handled) == [number for number in range(1, 21) if number != 13]


async def test_what_a_feed_puts_out_when_a_drain_begins_is_handled() -> None:
    feed = Numbers(3)
    feed.last = [101, 102]
    handled: list[int] = []

    async def handle(message: Message[int]) -> None:
        handled.append(message.payload)

    await finish(feed, Pipeline(feed.open, handle))
    assert handled == [1, 2, 3, 101, 102]
    assert feed.of("ended")[-2:] == [101, 102]


async def test_what_it_put_out_and_nobody_took_stays_for_the_next_run() -> None:
    feed = Numbers(0)
    feed.last = [101, 102]
    gate = Pause()
    pipeline = Pipeline(feed.open, nothing, gates=[gate])
    async with pipeline.running():
        gate.close()
    assert feed.of("ended") == []
    feed.last = []
    gate.open()
    await finish(feed, pipeline)
    assert feed.of("ended") == [101, 102]


async def test_a_transient_error_is_mended_by_itself_and_told_in_the_status() -> None:
    feed = Numbers(5)
    feed.errors = [ConnectionError("no route"), TimeoutError("slow")] * 3
    reasons: set[Any] = set()
    pipeline = Pipeline(feed.open, nothing)
    async with pipeline.running():
        for _ in range(100):
            await asyncio.sleep(0.02)
            stats = pipeline.stats()
            assert stats is not None
            reasons.add((stats.state, stats.reason))
        await feed.finished()
        stats = pipeline.stats()
        assert stats is not None
        assert (stats.state, stats.reason, stats.restarts) == ("running", None, 0)
    assert ("connecting", "ConnectionError: no route") in reasons


async def test_any_other_error_starts_the_pipeline_anew_and_nothing_is_lost() -> None:
    feed = Numbers(30)
    handled: list[int] = []

    async def handle(message: Message[int]) -> None:
        await asyncio.sleep(1)
        handled.append(message.payload)

    async def break_it() -> None:
        await asyncio.sleep(1.5)
        feed.errors = [ValueError("a bug")]

    breaking = asyncio.create_task(break_it())
    pipeline = Pipeline(feed.open, handle, concurrency=2, max_demand=6)
    async with pipeline.running():
        await feed.finished()
        stats = pipeline.stats()
        assert stats is not None
        assert stats.restarts == 1
    await breaking
    assert sorted(handled) == [number for number in range(1, 31) if number != 13]


async def test_a_retry_counts_over_a_restart_and_a_delay_goes_on() -> None:
    feed = Numbers(1)
    attempts: list[int] = []

    async def handle(message: Message[int]) -> None:
        attempts.append(message.attempt)
        if message.attempt < 2:
            raise RetryLater(50)

    pipeline = Pipeline(feed.open, handle)
    async with pipeline.running():
        await asyncio.sleep(1)
    await asyncio.sleep(100)
    await finish(feed, pipeline)
    assert attempts == [1, 2]


async def test_while_too_many_wait_for_their_retry_nothing_more_is_fetched() -> None:
    class Small(Numbers):
        max_waiting = 10

    feed = Small()

    async def handle(message: Message[int]) -> None:
        raise RetryLater(1000)

    async with Pipeline(feed.open, handle, max_demand=10).running():
        await asyncio.sleep(100)
        assert feed.next <= 25


async def test_keys_keep_their_order_over_retries_and_sources() -> None:
    feed = Numbers(60)
    handled: dict[str | None, list[int]] = {}

    async def handle(message: Message[int]) -> None:
        if message.payload % 4 == 0 and message.attempt == 1:
            raise RetryLater(5)
        await asyncio.sleep(0.01 * (message.payload % 5))
        handled.setdefault(message.key, []).append(message.payload)

    await finish(feed, Pipeline(feed.open, handle, order_by="key", sources=2, max_demand=12))
    assert sum(map(len, handled.values())) == 59
    assert all(one == sorted(one) for one in handled.values())


@given(
    end=st.integers(0, 40), sources=st.integers(1, 3), window=st.integers(1, 9), runs=st.integers(1, 4),
    seconds=st.floats(0, 0.5), cancel=st.booleans(), ordered=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_stopped_or_cancelled_at_any_moment_and_run_again_every_event_ends_once(
    end: int, sources: int, window: int, runs: int, seconds: float, cancel: bool, ordered: bool
) -> None:
    async def main() -> None:
        feed = Numbers(end)
        feed.last = []

        async def handle(message: Message[int]) -> None:
            await asyncio.sleep(0.03 * (message.payload % 4))
            if message.payload % 5 == 0 and message.attempt == 1:
                raise ValueError("again")

        pipeline = Pipeline(
            feed.open, handle, sources=sources, concurrency=1, max_demand=window, retry=Retry(base_delay=0.1),
            shutdown_timeout=0.05, order_by="key" if ordered else None,
        )  # fmt: skip
        for _ in range(runs):
            task = asyncio.create_task(pipeline.run())
            await asyncio.sleep(seconds)
            task.cancel() if cancel else pipeline.stop()
            await asyncio.wait((task,))
            assert not feed._ledger._held
        await finish(feed, pipeline)
        assert sorted(feed.of("ended")) == list(range(1, end + 1))

    run(main())


# -- iterators ---------------------------------------------------------------------------------------------------


async def test_an_async_iterator_is_drawn_by_demand_and_survives_a_restart_and_a_drain() -> None:
    drawn: list[int] = []

    async def numbers() -> AsyncIterator[int]:
        for number in range(50):
            await asyncio.sleep(0.01 if number % 10 == 0 else 0)
            drawn.append(number)
            yield number

    feed = Feed.of(numbers())
    handled: list[int] = []

    async def handle(message: Message[int]) -> None:
        await asyncio.sleep(0.1)
        handled.append(message.payload)

    pipeline = Pipeline(feed.open, handle, concurrency=2, max_demand=5, exhausted="drop")
    for _ in range(3):
        async with pipeline.running():
            await asyncio.sleep(0.25)
            assert len(drawn) <= len(handled) + 5 + 1
    await finish(feed, pipeline)
    assert sorted(handled) == list(range(50))


async def test_an_async_iterator_is_at_most_one_event_ahead_of_the_window() -> None:
    drawn: list[int] = []

    async def numbers() -> AsyncIterator[int]:
        for number in range(50):
            await asyncio.sleep(0.01)
            drawn.append(number)
            yield number

    async def handle(message: Message[int]) -> None:
        await asyncio.sleep(1000)

    feed = Feed.of(numbers())
    async with Pipeline(feed.open, handle, concurrency=1, max_demand=4, exhausted="drop", shutdown_timeout=0).running():
        await asyncio.sleep(10)
        assert len(drawn) in (4, 5)


async def test_an_iterator_that_raises_is_not_at_its_end() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        raise OSError("the line broke")

    feed = Feed.of(numbers())

    class Strict(type(feed)):  # type: ignore[misc]
        transient = ()

    feed.__class__ = Strict
    handled: list[int] = []

    async def handle(message: Message[int]) -> None:
        handled.append(message.payload)

    with pytest.raises(PipelineFailed, match="OSError: the line broke"):
        await Pipeline(feed.open, handle, exhausted="drop", max_restarts=1).run()
    assert handled == [1]


async def test_a_plain_iterable_and_a_place_to_publish_to_are_enough() -> None:
    published: list[Outgoing] = []

    async def publish(messages: Sequence[Outgoing]) -> None:
        published.extend(messages)

    feed = Feed.of([b"raw", {"a": 1}, "text"], publish=publish)
    handled: list[bytes] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.payload)
        raise ValueError

    await finish(feed, Pipeline(feed.open, handle, retry=Retry(attempts=1)))
    assert handled == [b"raw", b'{"a":1}', b'"text"']
    assert [one.topic for one in published] == ["feed.default.dead"] * 3


async def test_its_source_keeps_the_contract() -> None:
    feed = Numbers(5)
    source = await feed.open()
    assert isinstance(source, Source)
    waiting = asyncio.create_task(source.receive(10))  # type: ignore[arg-type]
    got = await waiting
    assert [message.body for message in got] == [b"1", b"2", b"3", b"4", b"5"]
    assert source.status().held_by_broker == 5
    waiting = asyncio.create_task(source.receive(3))  # type: ignore[arg-type]
    await asyncio.sleep(1)
    source.resize(0)
    assert await waiting == []
    assert source.status().state == "paused"
    source.resize(10)
    source.stop()
    source.stop()
    assert await source.receive(3) == []
    assert not await source.settle(got[:2], ())
    assert not await source.settle(got[:2], ()), "settling twice is harmless"
    await source.flush()
    await source.aclose()
    await source.aclose()
    again = await feed.open()
    assert [message.id for message in await again.receive(10)] == ["n3", "n4", "n5"]
    await again.aclose()


@pytest.mark.parametrize(("fetched", "error"), [("abc", "it returned str"), (3, "it returned int")])
async def test_what_is_no_list_of_events_is_told(fetched: Any, error: str, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Feed):
        async def fetch(self, demand: int) -> Any:
            return fetched

    with pytest.raises(PipelineFailed, match=rf"Wrong.fetch must return a list of events, or None at the end; {error}"):
        await Pipeline(Wrong().open, nothing, exhausted="drop").run()
    assert caplog.messages[-1].endswith("it is given up")


async def test_a_fetch_that_is_not_async_is_told() -> None:
    class Wrong(Feed):
        def fetch(self, demand: int) -> Any:
            return []

    with pytest.raises(PipelineFailed, match=r"Wrong.fetch must be an `async def`"):
        await Pipeline(Wrong().open, nothing, exhausted="drop").run()
