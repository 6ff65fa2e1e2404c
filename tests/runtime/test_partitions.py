"""Order with batches: keys flow side by side, batches of one key run one at a time and in order, also over retries."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from sluiceway import App, Batch, Message, Pipeline, Reject, Release, Retry, RetryLater
from sluiceway.assembly import make_spec
from sluiceway.consumer import FunctionConsumer
from sluiceway.signatures import NO_CONTEXT
from sluiceway.testing import VirtualClockLoop
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, running

virtual = pytest.mark.virtual_time

BatchF = Callable[[Batch[Any]], Any]


def batched(
    broker: Broker, handle: Any, batchers: dict[str, tuple[BatchF, dict[str, Any]]], **options: Any
) -> Pipeline:
    """A pipeline in order of keys, with several batchers."""
    shutdown = options.pop("shutdown_timeout", 5.0)
    given: Any = {"payload": bytes, "order_by": "key", **options}
    definition: FunctionConsumer[Any, Any] = FunctionConsumer(handle, ("source",), given)
    for name, (function, batching) in batchers.items():
        definition.batch(name, **batching)(function)
    pipeline = Pipeline(broker.open, handle, shutdown_timeout=shutdown)
    pipeline._spec = make_spec(definition, definition.bind(NO_CONTEXT), group="default")
    return pipeline


class Watch:
    """What must hold per key, looked at while it happens."""

    def __init__(self, broker: OrderedBroker) -> None:
        self.broker = broker
        self.wrong: list[str] = []
        self.handling: set[str | None] = set()
        self.booking: set[str] = set()
        self.batches: list[tuple[str, list[int]]] = []

    def enter(self, message: Message[Any]) -> None:
        if message.key in self.handling:
            self.wrong.append(f"{message.id}: two of its key are handled at once")
        if self.broker.has_earlier(message):
            self.wrong.append(f"{message.id} is handled and an earlier one of its key is at the broker")
        self.handling.add(message.key)

    def leave(self, message: Message[Any]) -> None:
        self.handling.discard(message.key)

    def enter_batch(self, batch: Batch[Any]) -> set[str]:
        self.batches.append((batch.info.batcher, [number_of(message) for message in batch]))
        if batch.info.size != len(batch):
            self.wrong.append(f"a batch of {len(batch)} says that it has {batch.info.size}")
        last: dict[str, int] = {}
        for message in batch:
            key, number = message.key or "", number_of(message)
            if last.get(key, -1) >= number:
                self.wrong.append(f"a batch has {number} behind {last[key]}")
            last[key] = number
            if self.broker.has_earlier(message):
                self.wrong.append(f"{message.id} is in a batch and an earlier one of its key is at the broker")
        if self.booking & set(last):
            self.wrong.append("two batches that share a key run at once")
        self.booking |= set(last)
        return set(last)

    def leave_batch(self, keys: set[str]) -> None:
        self.booking -= keys

    def check(self) -> None:
        assert not self.wrong, self.wrong
        acked: defaultdict[str, list[int]] = defaultdict(list)
        for one in self.broker.acked:
            acked[self.broker.keys[one]].append(int(one[1:]))
        for key, numbers in acked.items():
            assert numbers == sorted(numbers), f"key {key} was acked in the order {numbers}"


class OrderedBroker(Broker):
    """A broker with messages of some keys, number after number."""

    def __init__(self, count: int, keys: int) -> None:
        super().__init__()
        self.keys: dict[str, str] = {}
        for number in range(count):
            key = str(number % keys)
            (one,) = self.put(str(number), key=key)
            self.keys[one] = key


def number_of(message: Message[Any]) -> int:
    return int(message.body)


async def number(message: Message[bytes]) -> int:
    return int(message.body)


# -- keys flow -------------------------------------------------------------------------------------------------------


@virtual
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_batch_holds_many_messages_of_one_key_in_order(concurrency: int) -> None:
    broker = OrderedBroker(60, 2)
    watch = Watch(broker)

    async def handle(message: Message[bytes]) -> int:
        watch.enter(message)
        await asyncio.sleep(0.01)
        watch.leave(message)
        return number_of(message)

    async def book(batch: Batch[int]) -> None:
        keys = watch.enter_batch(batch)
        await asyncio.sleep(0.5)
        watch.leave_batch(keys)

    batching = {"size": 20, "concurrency": concurrency}
    async with running(batched(broker, handle, {"default": (book, batching)}, max_demand=200), broker):
        await broker.settled(60)
        assert asyncio.get_running_loop().time() < 3  # a batch for each message would take 30
    assert [len(numbers) for _, numbers in watch.batches] == [20, 20, 20]
    watch.check()


@virtual
async def test_batches_of_different_keys_run_at_once_and_those_of_one_key_wait_for_each_other() -> None:
    broker = Broker()
    for key in "aabb":
        broker.put(key, key=key)
    log: list[tuple[str, float]] = []

    async def handle(message: Message[bytes]) -> bytes:
        message.to(key=message.id)
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        log.append((batch[0].id, asyncio.get_running_loop().time()))
        await asyncio.sleep(1)

    pipeline = batched(broker, handle, {"default": (book, {"size": 1, "concurrency": 4})}, concurrency=4)
    async with running(pipeline, broker):
        await broker.settled(4)
    assert sorted(log) == [("m1", 0), ("m2", 1), ("m3", 0), ("m4", 1)]


@virtual
async def test_a_batch_goes_when_a_later_message_of_one_of_its_keys_goes_to_another() -> None:
    broker = Broker()
    for body in ("a", "b", "a", "b"):
        broker.put(body, key="k")
    log: list[tuple[str, str, list[str]]] = []

    async def handle(message: Message[bytes]) -> bytes:
        message.to(message.body.decode())
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        log.append((batch.info.batcher, batch.info.trigger, [message.id for message in batch]))
        await asyncio.sleep(0.1)

    batching = {"size": 10, "timeout": 5.0}
    async with running(batched(broker, handle, {"a": (book, batching), "b": (book, batching)}), broker):
        await broker.settled(4)
    assert log == [("a", "order", ["m1"]), ("b", "order", ["m2"]), ("a", "order", ["m3"]), ("b", "timeout", ["m4"])]


# -- failures --------------------------------------------------------------------------------------------------------


@virtual
async def test_behind_one_that_fails_in_a_batch_nothing_of_its_key_is_acked_and_other_keys_are() -> None:
    broker = Broker()
    for index in range(6):
        broker.put(str(index), key="ab"[index % 2])
    fails = True

    async def book(batch: Batch[int]) -> None:
        if fails:
            next(message for message in batch if message.key == "a").fail("not yet")

    async def on_error(message: Message[Any], error: BaseException) -> None:
        await asyncio.sleep(3)
        assert not set(broker.acked) & {"m1", "m3", "m5"}  # also while nobody has decided yet

    retry = Retry(attempts=2, base_delay=10, jitter=0)
    pipeline = batched(broker, number, {"default": (book, {"size": 6})}, retry=retry)
    pipeline._spec = replace(pipeline._spec, on_error=on_error)
    async with running(pipeline, broker):
        await broker.until(lambda: len(broker.ended) == 6)
        assert {one.id: one.outcome for one in broker.ended} == {
            "m1": "retry", "m3": "park", "m5": "park", "m2": "ack", "m4": "ack", "m6": "ack",
        }  # fmt: skip
        fails = False
        await broker.settled(6)
    assert broker.acked[3:] == ["m1", "m3", "m5"]


@virtual
async def test_behind_one_that_is_dead_lettered_the_others_of_its_batch_are_acked() -> None:
    broker = Broker()
    broker.put("0", "1", "2", key="k")

    async def book(batch: Batch[int]) -> None:
        batch[0].fail(Reject("never"))

    async with running(batched(broker, number, {"default": (book, {"size": 3})}), broker):
        await broker.settled(3)
    assert {one.id: one.outcome for one in broker.ended} == {"m1": "dead_letter", "m2": "ack", "m3": "ack"}


@virtual
async def test_when_a_whole_batch_fails_the_first_of_each_key_counts_and_the_others_are_parked() -> None:
    broker = Broker()
    for one in range(4):
        broker.put(str(one), key="ab"[one % 2])
    calls = 0

    async def book(batch: Batch[int]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("no")

    retry = Retry(attempts=2, base_delay=1, jitter=0)
    async with running(batched(broker, number, {"default": (book, {"size": 4, "timeout": 0.2})}, retry=retry), broker):
        await broker.settled(4)
    first = {one.id: (one.outcome, one.counted) for one in broker.ended[:4]}
    assert first == {"m1": ("retry", True), "m2": ("retry", True), "m3": ("park", False), "m4": ("park", False)}


@virtual
async def test_hooks_hear_of_the_one_that_fails_and_not_of_those_that_are_parked_behind_it() -> None:
    broker = Broker()
    broker.put("0", key="k")
    broker.put("1", key="k", failures=1)  # its last attempt, if it counted
    errors: list[str] = []
    failed: list[str] = []

    async def book(batch: Batch[int]) -> None:
        if not broker.ended:
            raise ValueError("no")

    async def on_error(message: Message[Any], error: BaseException) -> None:
        errors.append(message.id)

    async def on_failed(messages: Any) -> None:
        failed.extend(message.id for message in messages)

    retry = Retry(attempts=2, base_delay=1, jitter=0)
    pipeline = batched(broker, number, {"default": (book, {"size": 2, "timeout": 0.2})}, retry=retry)
    pipeline._spec = replace(pipeline._spec, on_error=on_error, on_failed=on_failed)
    async with running(pipeline, broker):
        await broker.settled(2)
    assert errors == ["m1"]
    assert failed == []
    assert broker.acked == ["m1", "m2"]


@virtual
async def test_one_whose_handler_runs_while_an_earlier_one_fails_goes_back_when_it_returns() -> None:
    broker = Broker()
    broker.put("0", "1", key="k")
    booked: list[int] = []

    async def handle(message: Message[bytes]) -> int:
        await asyncio.sleep(number_of(message) * 5)
        return number_of(message)

    async def book(batch: Batch[int]) -> None:
        await asyncio.sleep(1)
        if batch[0].id == "m1" and batch[0].attempt == 1:
            raise ValueError("not yet")
        booked.extend(batch.values)

    retry = Retry(attempts=2, base_delay=1, jitter=0)
    async with running(batched(broker, handle, {"default": (book, {"size": 1})}, retry=retry), broker):
        await broker.settled(2)
    assert booked == [0, 1]
    assert broker.outcomes("m2") == ["park", "ack"]
    assert broker.acked == ["m1", "m2"]


@virtual
async def test_one_in_a_waiting_batch_goes_back_behind_an_earlier_one_and_its_batch_runs_without_it() -> None:
    broker = Broker()
    for key in "kxkx":
        broker.put(key, key=key)
    broker.put("y", "y")
    log: list[list[str]] = []

    async def handle(message: Message[bytes]) -> bytes:
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        log.append([message.id for message in batch])
        assert batch.info.size == len(batch)
        await asyncio.sleep(1)
        if batch[0].id == "m1" and batch[0].attempt == 1:
            batch[0].fail(RetryLater(5))

    # m3 and m4 are handled when m1 and m2 have returned, after m5 and m6, which fill a batch that need not wait.
    pipeline = batched(broker, handle, {"default": (book, {"size": 2, "timeout": 0.5, "concurrency": 2})})
    async with running(pipeline, broker):
        await broker.settled(6)
    assert log == [["m1", "m2"], ["m5", "m6"], ["m4"], ["m1", "m3"]]


# -- handlers that do not end ----------------------------------------------------------------------------------------


@virtual
@pytest.mark.parametrize("in_batch", [False, True])
async def test_a_lane_stays_shut_until_a_handler_that_ignored_its_timeout_has_really_ended(in_batch: bool) -> None:
    broker = Broker()
    broker.put("0", "1", key="k")
    broker.put("9", key="other")
    release = asyncio.Event()
    at_once = most = 0
    handled: list[str] = []

    async def work(message: Message[bytes]) -> None:
        nonlocal at_once, most
        if message.key == "k":
            at_once += 1
            most = max(most, at_once)
            while message.id == "m1" and not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    pass
            at_once -= 1
        handled.append(message.id)

    async def book(batch: Batch[Any]) -> None:
        await work(batch[0])

    options: Any = {"timeout": 1.0, "retry": Retry(attempts=2, base_delay=0, jitter=0), "concurrency": 3}
    if in_batch:
        pipeline = batched(broker, number, {"default": (book, {"size": 1, "concurrency": 3})}, **options)
    else:
        pipeline = batched(broker, work, {}, **options)
    async with running(pipeline, broker):
        await asyncio.sleep(30)
        assert handled == ["m3"]
        assert broker.outcomes("m1") == []  # it stays ours, so that no other process takes its key
        assert broker.outcomes("m2") == ["park"]
        broker.put("8", key="other")
        await broker.until(lambda: "m4" in broker.acked)
        release.set()
        await broker.settled(4)
    assert most == 1
    assert handled == ["m3", "m4", "m1", "m1", "m2"]
    assert broker.outcomes("m1") == ["retry", "ack"]


@virtual
@pytest.mark.parametrize("in_batch", [False, True])
async def test_a_handler_that_never_ends_keeps_its_message_over_the_end_of_the_pipeline(in_batch: bool) -> None:
    broker = Broker()
    broker.put("0", "1", key="k")
    release = asyncio.Event()

    async def stuck(subject: Any) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass

    options: Any = {"timeout": 1.0, "concurrency": 3, "shutdown_timeout": 1.0}
    if in_batch:
        pipeline = batched(broker, number, {"default": (stuck, {"size": 1, "concurrency": 3})}, **options)
    else:
        pipeline = batched(broker, stuck, {}, **options)
    async with running(pipeline, broker):
        await asyncio.sleep(10)
    assert broker.kept == ["m1"]
    release.set()
    await asyncio.sleep(1)
    assert broker.outcomes("m1") == []


@virtual
async def test_a_batch_that_waited_for_one_that_does_not_end_runs_with_what_is_left_of_it() -> None:
    broker = Broker()
    broker.put("1", "2", key="k")
    broker.put("3", key="other")
    release = asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        message.to(key="first" if message.id == "m1" else "rest", flush=message.id == "m1")

    async def book(batch: Batch[Any]) -> None:
        while batch.key == "first" and not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass

    batching = {"size": 2, "concurrency": 3}
    async with running(batched(broker, handle, {"default": (book, batching)}, timeout=1.0), broker):
        await broker.until(lambda: "m3" in broker.acked, 20)
        assert broker.outcomes("m2") == ["park"]
        release.set()


@virtual
async def test_an_app_whose_handlers_never_end_exits() -> None:
    broker = Broker()
    for key in "12":
        broker.put(key, key=key)
    release = asyncio.Event()

    async def stuck(batch: Batch[Any]) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass

    batching = {"size": 1, "concurrency": 2}
    pipeline = batched(broker, number, {"default": (stuck, batching)}, timeout=1.0, shutdown_timeout=1.0)
    try:
        with pytest.raises(SystemExit):
            await pipeline.run()
        assert sorted(broker.kept) == ["m1", "m2"]
    finally:
        release.set()


@pytest.mark.parametrize("how", ["handler", "handler in middleware", "batch"])
async def test_a_lane_stays_shut_until_a_thread_that_ran_over_its_timeout_has_returned(how: str) -> None:
    broker = Broker()
    broker.put("0", "1", key="k")
    go = threading.Event()
    lock = threading.Lock()
    at_once = most = 0

    def work(subject: Any) -> None:
        nonlocal at_once, most
        message = subject[0] if how == "batch" else subject
        with lock:
            at_once += 1
            most = max(most, at_once)
        if message.id == "m1" and message.attempt == 1:
            go.wait(10)
        with lock:
            at_once -= 1

    async def around(message: Message[Any], call_next: Any) -> Any:
        return await call_next(message)

    options: Any = {"timeout": 0.1, "retry": Retry(attempts=2, base_delay=0, jitter=0), "concurrency": 3}
    if how == "batch":
        pipeline = batched(broker, number, {"default": (work, {"size": 1, "concurrency": 3})}, **options)
    elif how == "handler":
        pipeline = batched(broker, work, {}, **options)
    else:
        pipeline = batched(broker, work, {}, middleware=[around], **options)
    async with running(pipeline, broker):
        await asyncio.sleep(0.4)
        assert broker.outcomes("m1") == []
        assert broker.outcomes("m2") == ["park"]
        go.set()
        await broker.settled(2)
    assert most == 1
    assert broker.outcomes("m1") == ["retry", "ack"]


# -- whatever happens ------------------------------------------------------------------------------------------------


class Plan(Struct, frozen=True):
    """One run with random failures."""

    seed: int
    keys: int
    concurrency: int
    size: int
    batch_concurrency: int
    bad: float  # how likely a handler, a batch or a message in it fails
    stops: tuple[float, ...]  # when the pipeline is stopped and started again
    prepared: bool


PLANS = st.builds(
    Plan,
    seed=st.integers(0, 10**6),
    keys=st.integers(1, 5),
    concurrency=st.integers(1, 6),
    size=st.integers(1, 6),
    batch_concurrency=st.integers(1, 3),
    bad=st.sampled_from([0.0, 0.1, 0.3]),
    stops=st.lists(st.floats(0.05, 3.0), max_size=2).map(tuple),
    prepared=st.booleans(),
)


async def run_plan(plan: Plan) -> None:
    broker = OrderedBroker(40, plan.keys)
    watch = Watch(broker)
    draw = random.Random(plan.seed)

    def error() -> BaseException:
        return draw.choice(
            [ValueError("no"), RetryLater(0.5), Reject("never"), Release(), RetryLater(0, counted=False)]
        )

    async def handle(message: Message[bytes]) -> int:
        watch.enter(message)
        try:
            await asyncio.sleep(draw.choice([0, 0, 0.01, 0.2]))
            if draw.random() < plan.bad:
                raise error()
            message.to(draw.choice("ab"), key=draw.choice([None, None, 1, 2]), flush=draw.random() < 0.1)
            return number_of(message)
        finally:
            watch.leave(message)

    async def book(batch: Batch[int]) -> None:
        keys = watch.enter_batch(batch)
        try:
            await asyncio.sleep(draw.choice([0, 0.05, 0.3]))
            if draw.random() < plan.bad:
                raise error()
            for message in batch:
                if draw.random() < plan.bad:
                    message.fail(error())
        finally:
            watch.leave_batch(keys)

    async def prepare(messages: Any) -> None:
        await asyncio.sleep(draw.choice([0, 0.05]))
        if draw.random() < plan.bad:
            raise ValueError("no rows")

    async def on_error(message: Message[Any], error: BaseException) -> None:
        await asyncio.sleep(draw.choice([0, 0.05]))  # while it thinks, nothing may pass

    batching = {"size": plan.size, "timeout": 0.2, "concurrency": plan.batch_concurrency}
    for stop in (*plan.stops, None):
        pipeline = batched(
            broker, handle, {"a": (book, batching), "b": (book, batching)},
            concurrency=plan.concurrency, retry=Retry(attempts=4, base_delay=0.3, jitter=0), shutdown_timeout=0.4,
        )  # fmt: skip
        pipeline._spec = replace(pipeline._spec, on_error=on_error, prepare=prepare if plan.prepared else None)
        async with running(pipeline, broker):
            if stop is None:
                await broker.settled(40)
            else:
                await asyncio.sleep(stop)
    watch.check()


@settings(max_examples=100, deadline=None)
@example(Plan(0, keys=1, concurrency=2, size=1, batch_concurrency=1, bad=0.0, stops=(0.5,), prepared=True))
@example(Plan(0, keys=2, concurrency=1, size=1, batch_concurrency=2, bad=0.3, stops=(), prepared=False))
@example(Plan(1, keys=5, concurrency=1, size=1, batch_concurrency=3, bad=0.1, stops=(), prepared=False))
@given(plan=PLANS)
def test_whatever_fails_a_key_is_handled_and_booked_one_at_a_time_and_in_order(plan: Plan) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(run_plan(plan))


@virtual
async def test_batches_that_one_batch_frees_start_at_once() -> None:
    app = App(MemoryTransport())
    started: list[float] = []
    now = asyncio.get_running_loop().time

    @app.consumer("t", order_by="key", concurrency=5)
    async def route(message: Message[str]) -> None:
        message.to(message.payload)

    @route.batch("first", size=4, timeout=1)
    async def first(batch: Batch[None]) -> None:
        await asyncio.sleep(5)

    @route.batch("then", size=1, concurrency=4)
    async def four_at_once(batch: Batch[None]) -> None:
        started.append(now())
        await asyncio.sleep(100)

    async with app.running() as manager:
        for name in ("first", "then"):
            for key in "abcd":
                await app.publish("t", name, key=key)
            await asyncio.sleep(2)
        await asyncio.sleep(200)
        assert manager.stats()[0].held == 0
    assert started == [started[0]] * 4
