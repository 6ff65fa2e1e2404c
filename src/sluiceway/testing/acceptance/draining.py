"""Pipelines that end while there is work: what finished is not repeated, and the rest is for the next one."""

from __future__ import annotations

import asyncio

from ...batch import Batch
from ...message import Message
from .guarantees import guarantee
from .kit import Kit, bodies, numbered


@guarantee("G5")
async def test_a_drain_loses_nothing_and_repeats_nothing_that_finished(kit: Kit) -> None:
    app, done = kit.app(), list[bytes]()

    @app.consumer("t", concurrency=4, max_demand=30)
    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.01)
        done.append(message.body)

    async with app.running():
        await kit.publish("t", *numbered(120))
        await kit.until(lambda: len(done) >= 20, "some are handled")
    assert len(done) < 120, "the drain came too late to show anything"
    rest = await kit.get(await kit.open("t"), 120 - len(done))
    assert sorted([*done, *bodies(rest)]) == sorted(numbered(120))
    assert all(message.attempt == 1 and not message.suspect for message in rest)


@guarantee("G5")
async def test_apps_that_come_and_go_while_others_publish_lose_and_repeat_nothing(kit: Kit) -> None:
    done: list[bytes] = []
    await kit.make("t")

    async def publish() -> None:
        for number in range(200):
            await kit.publish("t", b"%d" % number)
            await asyncio.sleep(0.001)

    async def live(seconds: float) -> None:
        app = kit.app()

        @app.consumer("t", concurrency=2, max_demand=10)
        async def handle(message: Message[bytes]) -> None:
            assert not message.suspect
            await asyncio.sleep(0.0005)
            done.append(message.body)

        async with app.running():
            await asyncio.sleep(seconds)

    publishing = asyncio.create_task(publish())
    for life in range(12):
        await live(life / 500)
    await publishing
    rest = await kit.take(await kit.open("t"), 200 - len(done))
    assert sorted([*done, *bodies(rest)]) == sorted(numbered(200))


@guarantee("G5")
async def test_a_drain_emits_the_forming_batch(kit: Kit) -> None:
    app, done = kit.app(), list[bytes]()

    @app.consumer("t", batch_size=100, batch_timeout=3600)
    async def handle(message: Message[bytes]) -> bytes:
        return message.body

    @handle.batch()
    async def commit(batch: Batch[bytes]) -> None:
        done.extend(message.body for message in batch)

    async with app.running() as manager:
        await kit.publish("t", *numbered(5))
        await kit.until(lambda: manager.stats()[0].forming == 5, "a batch forms")
    assert sorted(done) == numbered(5)
    assert await kit.left("t") == []


@guarantee("G5")
async def test_a_drain_that_takes_too_long_is_cut_off_and_what_ran_comes_again(kit: Kit) -> None:
    app, running = kit.app(shutdown_timeout=kit.step), list[bytes]()

    @app.consumer("t")
    async def stuck(message: Message[bytes]) -> None:
        running.append(message.body)
        await asyncio.sleep(3600)

    async with app.running():
        await kit.publish("t", *numbered(3))
        await kit.until(lambda: len(running) == 3, "all run")
    again = await kit.get(await kit.open("t"), 3)
    assert kit.ordered(again) == numbered(3)
    assert all(message.attempt == 1 and not message.suspect for message in again)
