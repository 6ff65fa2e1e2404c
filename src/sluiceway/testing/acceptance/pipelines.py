"""Whole pipelines over the transport: demand, settling, isolation, retries and order."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from ...app import App
from ...batch import Batch
from ...errors import Reject, Release, RetryLater
from ...message import Message
from ...retry import Retry
from ..faults import Fault, Faults, FaultyTransport
from .guarantees import guarantee
from .kit import Kit, bodies, numbered


def quick(kit: Kit, attempts: int = 3) -> Retry:
    """Retries as soon as the broker can."""
    return Retry(attempts=attempts, base_delay=kit.step, multiplier=1, jitter=0)


@guarantee("G1", needs="shares")
async def test_a_pipeline_leaves_to_others_what_its_window_has_no_room_for(kit: Kit) -> None:
    app, gate = kit.app(), asyncio.Event()

    @app.consumer("t", concurrency=3, max_demand=7)
    async def stuck(message: Message[bytes]) -> None:
        await gate.wait()

    async with app.running() as manager:
        await kit.publish("t", *numbered(50))
        await kit.until(lambda: manager.stats()[0].held == 7, "the window is full")
        other = await kit.open("t")
        messages = await kit.get(other, 43)  # so the pipeline, and the broker for it, hold no more than the window
        await kit.nothing(other)
        assert not await other.settle(messages, [])
        assert manager.stats()[0].held == 7
        gate.set()
        await kit.until(lambda: manager.stats()[0].finished == 7, "the window is handled")
    await kit.nothing(other)


@guarantee("G1", hooks="held")
async def test_the_broker_counts_no_more_than_the_window_as_handed_out(kit: Kit) -> None:
    app, seen = kit.app(), 0

    @app.consumer("t", concurrency=2, max_demand=5)
    async def slow(message: Message[bytes]) -> None:
        await asyncio.sleep(0.002)

    async with app.running() as manager:
        await kit.publish("t", *numbered(200))
        while manager.stats()[0].finished < 200:
            seen = max(seen, await kit.broker.held("t", "g"))
            await asyncio.sleep(0.005)
    assert 1 <= seen <= 5


@guarantee("G2")
async def test_a_message_is_acked_only_after_its_batch_returned(kit: Kit) -> None:
    app, done, failed = kit.app(), list[bytes](), list[bytes]()

    @app.consumer("t", batch_size=5, batch_timeout=kit.step, retry=quick(kit))
    async def collect(message: Message[bytes]) -> bytes:
        return message.body

    @collect.batch()
    async def commit(batch: Batch[bytes]) -> None:
        if any(message.attempt == 1 for message in batch):
            failed.extend(message.body for message in batch if message.attempt == 1)
            raise ConnectionError("the sink is away")
        done.extend(message.body for message in batch)

    async with app.running():
        await kit.publish("t", *numbered(10))
        await kit.until(lambda: set(done) == set(numbered(10)), "all are committed by a second attempt")
    assert sorted(failed) == numbered(10)
    assert await kit.left("t") == []


@guarantee("G2")
async def test_what_a_handler_publishes_goes_out_with_its_success_only(kit: Kit) -> None:
    app = kit.app()
    results = await kit.open("results")

    @app.consumer("t", retry=quick(kit, 2))
    async def handle(message: Message[bytes]) -> None:
        message.publish("results", b"%d of " % message.attempt + message.body)
        if message.attempt == 1:
            raise ValueError("the first time")

    async with app.running():
        await kit.publish("t", *numbered(5))
        messages = await kit.take(results, 5)
    assert sorted(bodies(messages)) == [b"2 of %d" % number for number in range(5)]
    await kit.nothing(results)
    assert await kit.left("t") == []


FATES = {
    b"fine": "ack", b"twice": "ack", b"never": "dead", b"reject": "dead", b"nonsense": "dead", b"later": "ack",
    b"release": "ack", b"slow": "dead", b"unknown batcher": "dead", b"early": "ack",
}  # fmt: skip


@guarantee("G3", "G4")
async def test_every_way_of_a_message_ends_in_one_settlement(kit: Kit) -> None:
    """Failures of all kinds among good messages: each ends as it should, once, and nothing is left of any."""
    app, acked, released = kit.app(), list[bytes](), set[bytes]()

    @app.consumer("t", retry=quick(kit), timeout=2 * kit.step, payload=str)
    async def handle(message: Message[str]) -> None:
        match message.payload:
            case "twice" if message.attempt == 1:
                raise ValueError("once")
            case "never":
                raise ValueError("always")
            case "reject":
                raise Reject("no")
            case "later" if message.attempt == 1:
                raise RetryLater(kit.step)
            case "release" if message.body not in released:
                released.add(message.body)
                raise Release
            case "slow":
                await asyncio.sleep(3600)
            case "unknown batcher":
                message.to("nobody")
            case "early":
                await message.ack()
        acked.append(message.payload.encode())

    async with app.running() as manager:
        await kit.publish("t", *(fate if fate == b"nonsense" else b'"%s"' % fate for fate in FATES))
        wanted = sorted(fate for fate, end in FATES.items() if end == "ack")
        await kit.until(lambda: len(acked) >= len(wanted), "all that can succeed did")
        dead = await kit.open("t.g.dead")
        letters = await kit.take(dead, len(FATES) - len(wanted))
        await kit.until(lambda: not manager.stats()[0].held, "nothing is in hand")
    assert sorted(acked) == wanted
    assert sorted(body.strip(b'"') for body in bodies(letters)) == sorted(set(FATES) - set(wanted))
    await kit.nothing(dead)
    assert await kit.left("t") == []


@guarantee("G3")
async def test_a_settle_that_is_sent_again_changes_nothing(kit: Kit) -> None:
    """Two of three settles raise, every other one of these after the broker had done what was asked."""
    script = [Fault("disconnect", after=bool(number % 2)) if number % 3 else None for number in range(60)]
    faults = Faults(settle=script)
    app, seen = App(FaultyTransport(kit.broker.client(), faults), group="g"), list[tuple[bytes, int]]()

    @app.consumer("t", concurrency=3, max_demand=10, retry=quick(kit))
    async def handle(message: Message[bytes]) -> None:
        seen.append((message.body, message.attempt))
        if int(message.body) % 5 == 3 and message.attempt == 1:
            raise ValueError("not yet")
        if int(message.body) % 5 == 4:
            raise Reject("no")

    async with app.running() as manager:
        await kit.publish("t", *numbered(50))
        await kit.until(lambda: len(seen) >= 60, "all are handled")
        await kit.until(lambda: not manager.stats()[0].held, "all are settled")
    assert faults.happened
    assert sorted(seen) == sorted(
        (b"%d" % number, attempt) for number in range(50) for attempt in ((1, 2) if number % 5 == 3 else (1,))
    )
    dead = await kit.take(await kit.open("t.g.dead"), 10)
    assert {int(body) for body in bodies(dead)} == set(range(4, 50, 5))
    assert await kit.left("t") == []


@guarantee("G4")
async def test_a_failing_message_costs_its_neighbours_nothing(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    app, seen = kit.app(), list[bytes]()

    @app.consumer("t", retry=Retry(attempts=1))
    async def handle(message: Message[bytes]) -> None:
        seen.append(message.body)
        if message.body == b"7":
            raise ValueError("seven")

    with caplog.at_level(logging.WARNING, "sluiceway"):
        async with app.running():
            await kit.publish("t", *numbered(20))
            dead = await kit.open("t.g.dead")
            assert (await kit.one(dead)).body == b"7"
            await kit.until(lambda: len(seen) >= 20, "all were handled")
    assert sorted(seen) == sorted(numbered(20))
    told = [record for record in caplog.records if "seven" in (record.exc_text or record.getMessage())]
    assert len(told) == 1, "one failure is told of once"
    assert await kit.left("t") == []


@guarantee("G8", needs="delay")
async def test_a_retry_outlives_its_pipeline_and_holds_no_slot(kit: Kit) -> None:
    app, seen, delay = kit.app(), list[tuple[bytes, int]](), 5 * kit.step

    @app.consumer("t", concurrency=1, max_demand=1, retry=Retry(attempts=5, base_delay=delay, multiplier=1, jitter=0))
    async def handle(message: Message[bytes]) -> None:
        seen.append((message.body, message.attempt))
        if message.body == b"bad" and message.attempt < 3:
            raise ValueError("not yet")

    async with app.running():
        await kit.publish("t", b"bad")
        await kit.until(lambda: seen, "it failed")
        began = kit.now()
        await kit.publish("t", b"good")
        await kit.until(lambda: (b"good", 1) in seen, "the only slot is free")
    assert (b"bad", 2) not in seen
    async with app.running():
        await kit.until(lambda: (b"bad", 2) in seen, "it is tried again by another pipeline")
        kit.passed(began, delay)
        await kit.until(lambda: (b"bad", 3) in seen, "it is tried a third time")
    assert await kit.left("t") == []


@guarantee("groups", "G1")
async def test_several_sources_of_one_pipeline_share_its_window(kit: Kit) -> None:
    app, seen = kit.app(), list[bytes]()

    @app.consumer("t", sources=3, concurrency=4, max_demand=12)
    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.001)
        seen.append(message.body)

    most = 0
    async with app.running() as manager:
        await kit.publish("t", *numbered(100))
        while len(seen) < 100:
            most = max(most, manager.stats()[0].held)
            await asyncio.sleep(0.002)
    assert most <= 12
    assert sorted(seen) == sorted(numbered(100))
    assert await kit.left("t") == []


@guarantee("G8", "groups")
async def test_two_apps_of_two_groups_share_nothing_and_a_failure_of_one_is_not_seen_by_the_other(kit: Kit) -> None:
    seen: dict[str, list[tuple[bytes, int]]] = {"one": [], "two": []}

    def make(group: str) -> Any:
        app = kit.app(group=group)

        @app.consumer("t", retry=quick(kit))
        async def handle(message: Message[bytes]) -> None:
            seen[group].append((message.body, message.attempt))
            if group == "one" and message.attempt < 3:
                raise ValueError("not yet")

        return app

    async with make("one").running(), make("two").running():
        await kit.publish("t", *numbered(5))
        await kit.until(lambda: len(seen["one"]) == 15 and len(seen["two"]) == 5, "all is handled")
    assert sorted(seen["one"]) == [(body, attempt) for body in numbered(5) for attempt in (1, 2, 3)]
    assert sorted(seen["two"]) == [(body, 1) for body in numbered(5)]
    assert await kit.left("t", "one") == await kit.left("t", "two") == []


@guarantee("G9", needs="order")
async def test_messages_of_a_key_are_handled_in_order_though_they_fail(kit: Kit) -> None:
    app, started, done = kit.app(), list[bytes](), dict[str | None, list[int]]()

    @app.consumer("t", order_by="key", concurrency=8, retry=quick(kit, 10))
    async def handle(message: Message[bytes]) -> None:
        number = int(message.body)
        started.append(message.body)
        await asyncio.sleep(0.001)
        if number % 7 == 3 and message.attempt < 3:
            raise ValueError("not yet")
        done.setdefault(message.key, []).append(number)

    async with app.running():
        for number in range(60):
            await kit.publish("t", b"%d" % number, key=f"key {number % 5}")
        await kit.until(lambda: sum(map(len, done.values())) == 60, "all are handled")
    assert done == {f"key {key}": list(range(key, 60, 5)) for key in range(5)}
    assert await kit.left("t") == []
