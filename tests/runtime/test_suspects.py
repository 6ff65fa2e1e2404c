"""Suspects: what was in hand when a process died runs alone; innocents are not blamed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sluiceway import Batch, Message, Pipeline, Retry
from sluiceway._decisions.suspicion import STEADY
from sluiceway.message import Refused

from .recording import Broker, running

pytestmark = pytest.mark.virtual_time

ONCE: dict[str, Any] = {"suspect": True, "deliveries": 2}  # one process died with it in hand
TWICE: dict[str, Any] = {"suspect": True, "deliveries": 3}


async def test_suspects_run_alone_with_the_suspicion_written_before() -> None:
    broker = Broker()
    running_now: set[str] = set()
    log: list[Any] = []
    for number in range(12):
        broker.put(str(number), **(TWICE if number in (3, 7) else {}))

    async def handle(message: Message[bytes]) -> None:
        suspicious = message.id in ("m4", "m8")
        running_now.add(message.id)
        if suspicious:
            assert broker.suspected[-1] == message.id
            log.append((message.id, message.attempt, set(running_now), len(broker.held)))
        await asyncio.sleep(1)
        if suspicious:
            assert running_now == {message.id}
        running_now.discard(message.id)

    async with running(Pipeline(broker.open, handle, concurrency=5, retry=Retry(attempts=5)), broker):
        await broker.settled(12)
    assert [one[:3] for one in log] == [("m4", 3, {"m4"}), ("m8", 3, {"m8"})]
    assert len(broker.acked) == 12


async def test_siblings_that_have_not_started_are_released() -> None:
    broker = Broker(*"abcde")
    go = asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        await go.wait()

    async with running(Pipeline(broker.open, handle, concurrency=2, max_demand=8), broker):
        await asyncio.sleep(1)
        broker.put("poison", **TWICE)
        await broker.until(lambda: any(one.outcome == "release" for one in broker.ended))
        assert sorted(one.id for one in broker.ended) == ["m3", "m4", "m5"]
        assert broker.suspected == []
        go.set()
        await broker.settled(6)
    assert broker.suspected == ["m6"]


async def test_those_with_the_fewest_suspicions_go_first() -> None:
    broker = Broker()
    for count in (2, 0, 1):
        broker.put(str(count), suspect=True, suspicions=count, deliveries=3 + count)
    order: list[bytes] = []

    async def handle(message: Message[bytes]) -> None:
        order.append(message.body)

    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=10)), broker):
        await broker.settled(3)
    assert order == [b"0", b"1", b"2"]


async def test_poison_is_dead_lettered_after_its_attempts_without_running_again() -> None:
    broker = Broker()
    broker.put("poison", suspect=True, suspicions=2, deliveries=4)
    handled: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)

    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=3)), broker):
        await broker.settled(1)
    assert handled == []
    assert "died 3 times" in broker.dead[0].outputs[0].headers["sluiceway-dead-error"]


async def test_nothing_is_dead_lettered_before_it_ran_alone_once() -> None:
    broker = Broker()
    broker.put("unlucky", suspect=True, failures=2, deliveries=5)
    broker.put("first", **TWICE)
    handled: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)

    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=1)), broker):
        await broker.settled(2)
    assert sorted(handled) == ["m1", "m2"]
    assert broker.dead == []


async def test_a_suspect_that_fails_is_retried_like_any_other() -> None:
    broker = Broker()
    broker.put("a", **TWICE)

    async def handle(message: Message[bytes]) -> None:
        raise ValueError

    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=5, base_delay=1)), broker):
        await broker.until(lambda: broker.ended)
        assert broker.ended[0].outcome == "retry"
        broker.waiting.clear()


async def test_a_stop_in_the_quarantine_runs_no_further_suspect() -> None:
    broker = Broker()
    for number in range(4):
        broker.put(str(number), **TWICE)
    handled: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)
        await asyncio.sleep(2)

    async with running(Pipeline(broker.open, handle), broker):
        await asyncio.sleep(1)
    assert handled == broker.suspected == broker.acked == ["m1"]
    assert sorted(entry.id for entry in broker.waiting) == ["m2", "m3", "m4"]


@pytest.mark.parametrize("suspicion", [ONCE, TWICE])
async def test_a_stop_does_not_wait_for_the_dead_letter_of_a_suspect_that_the_broker_rejects(suspicion: Any) -> None:
    broker = Broker()
    broker.put("1", **suspicion)

    async def reject(acks: Any, others: Any) -> list[Refused]:
        return [Refused(one.message, "rejected", "too large") for one in others]

    async def handle(message: Message[bytes]) -> None:
        raise ValueError("bad")

    broker.on_settle = reject
    pipeline = Pipeline(broker.open, handle, retry=Retry(attempts=1))
    async with running(pipeline, broker):
        await asyncio.sleep(STEADY + 1)
        now = pipeline.stats()
        assert now is not None
        assert now.state == "blocked"
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 1


async def test_a_stop_while_suspects_wait_for_what_runs_forever_ends_in_time() -> None:
    broker = Broker("a")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(10_000)

    async with running(Pipeline(broker.open, handle, shutdown_timeout=5), broker):
        await asyncio.sleep(1)
        broker.put("suspect", **ONCE)
        await asyncio.sleep(1)
        before = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - before < 6
    assert sorted(entry.id for entry in broker.waiting) == ["m1", "m2"]
    assert broker.suspected == []


async def test_a_suspicion_that_cannot_be_written_is_written_later() -> None:
    broker = Broker()
    broker.put("a", **TWICE)
    tries = 0

    async def suspect(message: Message[Any]) -> bool:
        nonlocal tries
        tries += 1
        if tries < 5:
            raise OSError("away")
        return True

    broker.on_suspect = suspect
    handled: list[int] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(tries)

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
    assert handled == [5]
    assert len(broker.sources) == 1


async def test_a_suspect_that_is_no_longer_ours_does_not_run() -> None:
    broker = Broker("a")
    broker.put("b", **TWICE)

    async def suspect(message: Message[Any]) -> bool:
        return False

    broker.on_suspect = suspect
    handled: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
        broker.put("c")
        await broker.settled(2)
    assert handled == ["m1", "m3"]
    assert not broker.held


async def test_a_suspect_that_is_batched_is_alone_in_its_batch() -> None:
    broker = Broker("a", "b")
    broker.put("c", **ONCE)
    batches: list[tuple[float, list[bytes]]] = []

    async def handle(message: Message[bytes]) -> bytes:
        return message.body

    async def book(batch: Batch[bytes]) -> None:
        batches.append((asyncio.get_running_loop().time(), batch.values))

    async with running(Pipeline(broker.open, handle, batch=book, batch_size=10, batch_timeout=1000.0), broker):
        await broker.settled(3)
    assert batches[0] == (0, [b"c"])


async def test_a_suspect_waits_for_handlers_that_have_acked_early() -> None:
    broker = Broker("a")
    alone: list[bool] = []
    busy = False

    async def handle(message: Message[bytes]) -> None:
        nonlocal busy
        if message.body == b"a":
            busy = True
            await message.ack()
            broker.put("b", **ONCE)
            await asyncio.sleep(5)
            busy = False
        else:
            alone.append(not busy)

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(2)
    assert alone == [True]


async def test_suspects_of_an_ordered_consumer_run_alone_too() -> None:
    broker = Broker()
    for number in range(6):
        broker.put(str(number), key="k", **(TWICE if number == 2 else {}))
    order: list[int] = []

    async def handle(message: Message[bytes]) -> None:
        order.append(int(message.body))
        await asyncio.sleep(1)

    async with running(Pipeline(broker.open, handle, order_by="key"), broker):
        await broker.settled(6)
    assert sorted(order) == list(range(6))
    assert len(broker.acked) == 6


async def test_suspects_of_one_death_run_together_with_nothing_else_in_hand() -> None:
    broker = Broker()
    for number in range(10):
        broker.put(str(number), **(ONCE if number % 2 else {}))
    now: set[str] = set()
    seen: list[set[str]] = []

    async def handle(message: Message[bytes]) -> None:
        now.add(message.id)
        seen.append(set(now))
        await asyncio.sleep(1)
        now.discard(message.id)

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(10)
    suspects = {"m2", "m4", "m6", "m8", "m10"}
    assert suspects in seen
    assert all(one <= suspects or not one & suspects for one in seen)
    assert broker.suspected == []
    assert len(broker.acked) == 10


DIED_ALONE: dict[str, Any] = {"suspect": True, "suspicions": 2, "deliveries": 4}


async def test_a_message_that_a_process_died_alone_with_rests_until_this_process_lives_steadily() -> None:
    broker = Broker("a")
    broker.put("hit", **DIED_ALONE)
    ran: list[tuple[bytes, float]] = []

    async def handle(message: Message[bytes]) -> None:
        ran.append((message.body, asyncio.get_running_loop().time()))

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(2)
        broker.put("hit again", **DIED_ALONE)
        await broker.settled(3)
    assert ran == [(b"a", 0), (b"hit", STEADY), (b"hit again", STEADY)]
    assert broker.suspected == ["m2", "m3"]


async def test_what_is_behind_a_resting_message_of_its_key_waits_for_it() -> None:
    broker = Broker()
    broker.put("1", key="k", **DIED_ALONE)
    broker.put("2", key="k")
    broker.put("1", key="other")
    ran: list[tuple[bytes, str | None]] = []

    async def handle(message: Message[bytes]) -> None:
        ran.append((message.body, message.key))

    async with running(Pipeline(broker.open, handle, order_by="key"), broker):
        await broker.settled(3)
    assert ran == [(b"1", "other"), (b"1", "k"), (b"2", "k")]


async def test_poison_does_not_rest_before_its_dead_letter() -> None:
    broker = Broker()
    broker.put("poison", suspect=True, suspicions=3, deliveries=5)

    async def handle(message: Message[bytes]) -> None:
        raise AssertionError

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
        assert asyncio.get_running_loop().time() == 0
    assert len(broker.dead) == 1
