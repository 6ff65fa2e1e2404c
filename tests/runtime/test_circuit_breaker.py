"""A circuit breaker: demand stops while what the handlers depend on is down, and no attempts are burnt."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from sluiceway import App, Batch, CircuitBreaker, Message, Pipeline, Reject, Release, Retry, RetryLater
from sluiceway.testing import external

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time

LATE = Retry(attempts=2, base_delay=60.0, jitter=0.0)  # after a breaker that opened once was half-open


class Dependency:
    """Something that handlers call, which is up or down. `calls` are the times at which it was called."""

    def __init__(self) -> None:
        self.up = True
        self.calls: list[float] = []

    async def __call__(self, message: object = None) -> None:
        self.calls.append(now())
        await asyncio.sleep(0.01)
        if not self.up:
            raise ConnectionError("down")


def now() -> float:
    return asyncio.get_running_loop().time()


def make(**options: Any) -> CircuitBreaker:
    return CircuitBreaker("db", **{"failures": 3, "within": 10.0, "reset_after": 30.0, **options})


# -- opening ---------------------------------------------------------------------------------------------------------


async def test_open_it_asks_for_nothing_and_nothing_is_called() -> None:
    broker, breaker, database = Broker(*bodies(500)), make(), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, concurrency=1, gates=[breaker]), broker):
        await asyncio.sleep(23)
        assert breaker.state == "open"
        assert isinstance(breaker.error, ConnectionError)
        assert len(database.calls) == 3
        assert not broker.held
        demands = len(broker.demands)
        await asyncio.sleep(0.9)
        assert len(broker.demands) == demands


async def test_what_had_not_started_goes_back_uncounted_and_what_tripped_it_counts() -> None:
    broker, breaker, database = Broker(*bodies(50)), make(), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, concurrency=1, max_demand=50, gates=[breaker]), broker):
        await asyncio.sleep(1)
        counted = [one.id for one in broker.ended if one.outcome == "retry" and one.counted]
        assert counted == ["m1", "m2", "m3"]
        assert {one.id for one in broker.ended if one.outcome == "release"} == {f"m{n}" for n in range(4, 51)}
    assert all(entry.failures == 0 for entry in broker.waiting if int(entry.id[1:]) > 3)


async def test_a_receive_that_waits_is_taken_back_when_it_opens() -> None:
    broker, breaker, database = Broker(*bodies(3)), make(), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, gates=[breaker], retry=LATE), broker):
        await broker.until(lambda: len(broker.ended) == 3)
        await asyncio.sleep(0.1)
        assert not broker.source.receiving
        broker.put(*bodies(10))
        await asyncio.sleep(3)
        assert len(database.calls) == 3


@pytest.mark.parametrize(
    "error",
    [Reject("no"), Release("back"), RetryLater(1, counted=False), KeyError("not one of those that count")],
    ids=lambda error: type(error).__name__,
)
async def test_errors_that_say_nothing_of_the_dependency_do_not_trip_it(error: BaseException) -> None:
    broker, breaker = Broker(*bodies(5)), make(failures=1, on=(ConnectionError, Reject, Release, RetryLater))

    async def fail(message: Message[bytes]) -> None:
        if message.id != "m5":
            raise error

    async with running(Pipeline(broker.open, fail, gates=[breaker]), broker):
        await broker.until(lambda: "m5" in broker.acked)
        assert breaker.state == "closed"


async def test_undecodable_bodies_do_not_trip_it() -> None:
    broker, breaker = Broker(*[b"not json"] * 20, b"1"), make(failures=1)

    async def handle(message: Message[int]) -> None: ...

    async with running(Pipeline(broker.open, handle, gates=[breaker]), broker):
        await broker.settled(21)
        assert breaker.state == "closed"


async def test_a_retry_later_that_counts_trips_it() -> None:
    broker, breaker = Broker("a"), make(failures=1)

    async def handle(message: Message[bytes]) -> None:
        raise RetryLater(1)

    async with running(Pipeline(broker.open, handle, gates=[breaker]), broker):
        await broker.until(lambda: broker.ended)
        assert breaker.state == "open"


async def test_timeouts_trip_it() -> None:
    broker, breaker = Broker(*bodies(9)), make(failures=3, within=60.0, on=TimeoutError)

    async def hang(message: Message[bytes]) -> None:
        await asyncio.sleep(1e6)

    async with running(Pipeline(broker.open, hang, concurrency=1, timeout=1.0, gates=[breaker]), broker):
        await asyncio.sleep(5)
        assert breaker.state == "open"


async def test_failures_further_apart_leave_it_closed() -> None:
    broker, breaker, database = Broker(), make(failures=2, within=10.0), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, gates=[breaker], retry=Retry(attempts=1)), broker):
        for turn in range(5):
            broker.put("x")
            await broker.settled(turn + 1)
            await asyncio.sleep(11)
            assert breaker.state == "closed"


# -- half-open -------------------------------------------------------------------------------------------------------


async def test_one_probe_that_succeeds_closes_it_and_everything_flows_again() -> None:
    broker, breaker, database = Broker(*bodies(100)), make(), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, concurrency=5, gates=[breaker]), broker):
        await asyncio.sleep(20)
        tried = len(database.calls)
        database.up = True
        await broker.settled(100)
        assert breaker.state == "closed"
        assert breaker.error is None
    probe, following = database.calls[tried], database.calls[tried + 1]
    assert 24 <= probe <= 31
    assert following >= probe + 0.01  # it ran alone
    assert len(broker.acked) == 100


async def test_a_probe_that_fails_is_not_counted_and_the_waits_grow() -> None:
    broker, breaker, database = Broker(*bodies(40)), make(max_reset_after=100.0), Dependency()
    database.up = False
    retry = Retry(attempts=2, base_delay=0.1, jitter=0.0)
    async with running(Pipeline(broker.open, database, concurrency=1, gates=[breaker], retry=retry), broker):
        await asyncio.sleep(1000)
        probes = database.calls[3:]
        waits = [later - earlier for earlier, later in zip([0.0, *probes], probes, strict=False)]
        assert 24 <= waits[0] <= 30.1
        assert 48 <= waits[1] <= 60.1
        assert all(80 <= wait <= 100.1 for wait in waits[2:])
        assert len(probes) >= 9
        assert not broker.dead
        database.up = True
        await broker.settled(40)
    assert len(broker.acked) == 40


async def test_a_message_that_alone_keeps_it_open_is_dead_lettered_in_the_end() -> None:
    broker, breaker, calls = Broker(*bodies(2)), make(failures=1), 0

    async def handle(message: Message[bytes]) -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError("this message makes the server hang up")

    retry = Retry(attempts=3, base_delay=1.0, jitter=0.0)
    async with running(Pipeline(broker.open, handle, concurrency=1, gates=[breaker], retry=retry), broker):
        await broker.until(lambda: len(broker.dead) == 2, seconds=7200)
        counted = [one for one in broker.ended if one.outcome == "retry" and one.counted]
        assert len(counted) == 4
        assert calls > 4 + 2 * 2


async def test_messages_that_fail_as_the_probe_let_others_be_it() -> None:
    broker, breaker, handled = Broker(*bodies(2)), make(failures=1), []

    async def handle(message: Message[bytes]) -> None:
        if message.id in ("m1", "m2"):
            raise ConnectionError("this message makes the server hang up")
        handled.append(message.id)

    retry = Retry(attempts=10, base_delay=1.0, jitter=0.0)
    async with running(Pipeline(broker.open, handle, concurrency=1, gates=[breaker], retry=retry), broker):
        await asyncio.sleep(200)
        assert breaker.state != "closed"
        broker.put(*bodies(5))
        await broker.until(lambda: handled, seconds=400)  # although the broker hands out m1 and m2 before it


async def test_an_outage_blames_no_message_while_others_can_be_the_probe() -> None:
    broker, breaker, database = Broker(*bodies(100)), make(failures=1), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, concurrency=1, gates=[breaker], retry=LATE), broker):
        await asyncio.sleep(80 * 300)
        assert sum(one.counted for one in broker.ended if one.outcome == "retry") == 1  # the one that opened it
        database.up = True
        await broker.settled(100)
    assert len(broker.acked) == 100


async def test_what_handle_error_chooses_for_a_probe_counts_more() -> None:
    broker, breaker, database = Broker(*bodies(1)), make(failures=1), Dependency()
    app_broker = App("memory://")
    database.up = False

    @app_broker.consumer("t", name="t", gates=[breaker], retry=Retry(base_delay=1.0))
    async def handle(message: Message[str]) -> None:
        await database()

    @handle.handle_error
    def choose(message: Message[Any], error: BaseException) -> Any:
        return Reject("given up") if message.attempt > 1 else None

    async with app_broker.running() as manager:
        await app_broker.publish("t", "x")
        await asyncio.sleep(60)
        assert len(database.calls) == 2
        assert (await manager.backlog("t")).messages == 0
    assert breaker.state in ("open", "half-open")
    assert not broker.held


async def test_a_probe_that_says_nothing_is_followed_by_another() -> None:
    told: list[str] = []
    breaker = make(failures=1, on=ConnectionError, on_state=lambda breaker: told.append(breaker.state))
    broker, seen = Broker("trip", "poison", "good"), []

    async def handle(message: Message[bytes]) -> None:
        seen.append(message.id)
        if message.id == "m1" and message.attempt == 1:
            raise ConnectionError
        if message.id == "m2":
            raise Reject("a bad message")

    async with running(Pipeline(broker.open, handle, concurrency=1, gates=[breaker], retry=LATE), broker):
        await broker.settled(3)
        assert breaker.state == "closed"
        assert now() < 62
    assert seen == ["m1", "m2", "m3", "m1"]
    assert told == ["open", "half-open", "closed"]
    assert [one.id for one in broker.dead] == ["m2"]


async def test_a_probe_that_runs_over_its_time_opens_it_again() -> None:
    broker, breaker = Broker(*bodies(5)), make(failures=1, on=TimeoutError)
    calls: list[float] = []

    async def hang(message: Message[bytes]) -> None:
        calls.append(now())
        await asyncio.sleep(1e6)

    async with running(Pipeline(broker.open, hang, concurrency=1, timeout=1.0, gates=[breaker]), broker):
        await asyncio.sleep(45)
        assert len(calls) == 2
        assert breaker.state == "open"


async def test_two_pipelines_that_share_it_stop_together_and_send_one_probe() -> None:
    breaker, database = make(), Dependency()
    brokers = [Broker(*bodies(50)), Broker(*bodies(50))]
    database.up = False
    async with (
        running(Pipeline(brokers[0].open, database, gates=[breaker]), brokers[0]),
        running(Pipeline(brokers[1].open, database, gates=[breaker]), brokers[1]),
    ):
        await asyncio.sleep(10)
        assert breaker.state == "open"
        tried = len(database.calls)
        await asyncio.sleep(21)
        assert len(database.calls) == tried + 1
        database.up = True
        for broker in brokers:
            await broker.settled(50)


async def test_a_half_open_breaker_takes_its_probe_from_the_pipeline_that_has_messages() -> None:
    breaker, database = make(), Dependency()
    idle, busy = Broker(), Broker(*bodies(50))
    database.up = False
    async with (
        running(Pipeline(idle.open, database, gates=[breaker]), idle),
        running(Pipeline(busy.open, database, gates=[breaker]), busy),
    ):
        await asyncio.sleep(10)
        database.up = True
        await busy.settled(50)
        assert now() < 33


# -- handlers of all kinds -------------------------------------------------------------------------------------------


async def test_plain_functions_on_threads() -> None:
    broker, breaker = Broker(*bodies(30)), make()
    up = threading.Event()
    calls: list[bytes] = []

    def handle(message: Message[bytes]) -> None:
        calls.append(message.body)
        if not up.is_set():
            raise ConnectionError("down")

    with external():
        async with running(Pipeline(broker.open, handle, concurrency=1, gates=[breaker]), broker):
            await broker.until(lambda: breaker.state == "open" and not broker.held)
            assert len(calls) == 3
            up.set()
            breaker.reset()
            await broker.settled(30)
    assert len(broker.acked) == 30


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_a_batch_that_fails_is_one_failure_and_batches_in_hand_go_back_uncounted(sync: bool) -> None:
    broker, breaker = Broker(*bodies(100)), make(failures=2)
    up, batches = threading.Event(), []

    async def handle(message: Message[bytes]) -> int:
        return int(message.body)

    def write(batch: Batch[int]) -> None:
        batches.append(len(batch))
        if not up.is_set():
            raise ConnectionError("down")

    async def book(batch: Batch[int]) -> None:
        write(batch)

    options: Any = {"batch_size": 10, "batch_timeout": 0.1, "concurrency": 5, "retry": Retry(base_delay=1000)}
    pipeline = Pipeline(broker.open, handle, batch=write if sync else book, gates=[breaker], **options)
    with external():
        async with running(pipeline, broker):
            await broker.until(lambda: breaker.state == "open" and not broker.held)
            assert batches == [10, 10]
            assert sum(one.counted for one in broker.ended) == 20
            assert {one.outcome for one in broker.ended[20:]} == {"release"}
            up.set()
            breaker.reset()
            await broker.settled(80)


async def test_with_batches_the_probe_succeeds_when_its_batch_does() -> None:
    broker, breaker, database = Broker(*bodies(30)), make(failures=1), Dependency()
    states: list[str] = []

    async def handle(message: Message[bytes]) -> None: ...

    async def book(batch: Batch[Any]) -> None:
        states.append(f"{breaker.state} {len(batch)}")
        await database()

    database.up = False
    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=5, batch_timeout=0.1, gates=[breaker])
    async with running(pipeline, broker):
        await asyncio.sleep(32)
        assert states == ["closed 5", "half-open 1"]
        assert breaker.state == "open"
        database.up = True
        await broker.settled(30)
    assert states[2] == "half-open 1"
    assert states[3].startswith("closed")


async def test_a_message_that_a_batch_fails_by_itself_counts() -> None:
    broker, breaker = Broker(*bodies(4)), make(failures=2)

    async def handle(message: Message[bytes]) -> None: ...

    async def book(batch: Batch[Any]) -> None:
        batch[0].fail(ConnectionError("one"))
        batch[1].fail(ConnectionError("other"))

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=4, gates=[breaker])
    async with running(pipeline, broker):
        await broker.until(lambda: len(broker.ended) == 4)
        assert breaker.state == "open"
        assert len(broker.acked) == 2


async def test_a_probe_that_acks_itself_before_its_batch_closes_it() -> None:
    broker, breaker = Broker(*bodies(3)), make(failures=1)

    async def handle(message: Message[bytes]) -> None:
        if message.id == "m1" and message.attempt == 1:
            raise ConnectionError
        await message.ack()

    async def book(batch: Batch[Any]) -> None: ...

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=4, batch_timeout=1, concurrency=1, gates=[breaker])
    async with running(pipeline, broker):
        await broker.settled(3)
        assert breaker.state == "closed"


# -- drains and restarts ---------------------------------------------------------------------------------------------


async def test_a_drain_while_it_is_open_is_over_at_once() -> None:
    broker, breaker, database = Broker(*bodies(50)), make(), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, gates=[breaker]), broker):
        await asyncio.sleep(5)
        began = now()
    assert now() - began < 0.1


@pytest.mark.parametrize("batched", [False, True])
async def test_a_probe_that_a_drain_cuts_off_leaves_the_way_free_for_the_next_one(batched: bool) -> None:
    breaker = make(failures=1)
    first, second = Broker("trip", "probe"), Broker("other")

    async def hang(subject: Message[bytes] | Batch[Any]) -> None:
        if breaker.state == "closed":
            raise ConnectionError
        await asyncio.sleep(1e6)

    async def fine(message: Message[bytes]) -> None: ...

    batch: Any = {"batch": hang, "batch_size": 1} if batched else {"payload": bytes}
    pipeline = Pipeline(
        first.open, fine if batched else hang, gates=[breaker], shutdown_timeout=1.0, retry=LATE, **batch
    )
    async with running(pipeline, first):
        await asyncio.sleep(31)
        assert breaker.state == "half-open"
    async with running(Pipeline(second.open, fine, gates=[breaker]), second):
        await second.settled(1)
        assert breaker.state == "closed"


async def test_a_probe_whose_batch_never_started_leaves_the_way_free_too() -> None:
    breaker = make(failures=1)
    first, second = Broker("slow"), Broker("other")

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"trip":
            raise ConnectionError

    async def hang(batch: Batch[Any]) -> None:
        await asyncio.sleep(1e6)

    pipeline = Pipeline(first.open, handle, batch=hang, batch_size=1, gates=[breaker], shutdown_timeout=1.0, retry=LATE)
    async with running(pipeline, first):
        await asyncio.sleep(1)  # the one batch that may run does
        first.put("trip")
        await asyncio.sleep(1)
        first.put("probe")
        await asyncio.sleep(40)
        assert breaker.state == "half-open"

    async def fine(message: Message[bytes]) -> None: ...

    async with running(Pipeline(second.open, fine, gates=[breaker]), second):
        await second.settled(1)
        assert breaker.state == "closed"


async def test_it_stays_open_over_a_restart_of_the_pipeline() -> None:
    broker, breaker, database = Broker(*bodies(20)), make(), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, gates=[breaker]), broker):
        await asyncio.sleep(5)
    tried = len(database.calls)
    async with running(Pipeline(broker.open, database, gates=[breaker]), broker):
        await asyncio.sleep(15)
        assert len(database.calls) == tried
        database.up = True
        await broker.settled(20)


# -- what a person sees ----------------------------------------------------------------------------------------------


async def test_changes_of_its_state_are_told_and_a_hook_that_raises_does_no_harm() -> None:
    told: list[str] = []

    def tell(breaker: CircuitBreaker) -> None:
        told.append(breaker.state)
        raise ValueError("a broken hook")

    broker, breaker, database = Broker(*bodies(20)), make(on_state=tell), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, gates=[breaker]), broker):
        await asyncio.sleep(40)
        database.up = True
        await broker.settled(20)
    assert told == ["open", "half-open", "open", "half-open", "closed"]


async def test_a_reset_closes_it_at_once() -> None:
    broker, breaker, database = Broker(*bodies(20)), make(), Dependency()
    database.up = False
    async with running(Pipeline(broker.open, database, gates=[breaker]), broker):
        await asyncio.sleep(5)
        database.up = True
        breaker.reset()
        await broker.settled(20)
        assert now() < 10


async def test_the_consumer_is_paused_while_it_is_open() -> None:
    broker, breaker, database = Broker(*bodies(20)), make(), Dependency()
    database.up = False
    pipeline = Pipeline(broker.open, database, gates=[breaker])
    async with running(pipeline, broker):
        await asyncio.sleep(5)
        stats = pipeline.stats()
        assert stats is not None
        assert (stats.state, stats.reason) == ("paused", "circuit breaker 'db' is open")


async def test_a_probe_that_is_parked_behind_an_earlier_one_of_its_key_is_followed_by_another() -> None:
    broker = Broker()
    breaker = CircuitBreaker("db", failures=1, reset_after=5)
    batches = 0

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"fails" and not message.failures:
            raise ConnectionError

    async def book(batch: Batch[Any]) -> None:
        nonlocal batches
        batches += 1
        if batches == 1:
            await asyncio.sleep(20)
            raise ConnectionError("the database is down")

    retry = Retry(attempts=5, base_delay=100)
    options: dict[str, Any] = {"batch_size": 1, "gates": [breaker], "order_by": "key", "retry": retry}
    async with running(Pipeline(broker.open, handle, batch=book, **options), broker):
        broker.put("slow", key="k")
        await asyncio.sleep(1)
        broker.put("fails", key="other")
        await asyncio.sleep(1)
        broker.put("the probe", key="k")
        await broker.until(lambda: any(one.outcome == "park" for one in broker.ended))
        await broker.settled(3)
        assert breaker.state == "closed"


async def test_a_probe_whose_handler_ignores_its_timeout_does_not_shut_the_way_for_ever() -> None:
    broker = Broker()
    breaker = CircuitBreaker("db", failures=1, reset_after=5)
    hangs = True

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"fails" and not message.failures:
            raise ConnectionError
        while message.body == b"hangs" and hangs:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue

    options: dict[str, Any] = {"gates": [breaker], "order_by": "key", "timeout": 2, "concurrency": 5}
    async with running(Pipeline(broker.open, handle, **options, retry=Retry(attempts=5, base_delay=100)), broker):
        broker.put("fails", key="1")
        await asyncio.sleep(1)
        broker.put("hangs", key="2")
        await asyncio.sleep(10)
        broker.put("waits", key="3")
        await broker.until(lambda: "m3" in broker.acked)
        hangs = False
        await broker.settled(3)
