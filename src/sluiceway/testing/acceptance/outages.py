"""What is not the handlers' doing: leases under a blocked loop, lost connections, a backlog, an idle queue."""

from __future__ import annotations

import asyncio
import logging
import time
import tracemalloc

import pytest

from ...errors import TransportError
from ...message import Message
from .guarantees import guarantee
from .kit import Kit, bodies, numbered, start

MOST_IDLE = 0.15  # of a second of CPU that a second of waiting may cost
BODY = 64 * 1024
BACKLOG = 1_000  # messages of that size
MOST_MEMORY = 16 * 1024 * 1024  # bytes, for a buffer of 1 MiB and all that is not bodies


@guarantee("G10", needs="lease")
async def test_a_handler_that_blocks_the_loop_for_longer_than_a_lease_keeps_its_message(kit: Kit) -> None:
    app, seen = kit.app(), list[int]()
    other = await kit.open("t")
    lease = other.lease
    if kit.broker.virtual or lease is None or lease > 5:
        pytest.skip(f"n/a: a lease of {lease} s cannot be waited for here")
    other.resize(0)

    @app.consumer("t", concurrency=1)
    async def blocks(message: Message[bytes]) -> None:
        seen.append(message.attempt)
        time.sleep(2.5 * lease)  # noqa: ASYNC251 - what a careless handler does

    async with app.running():
        await kit.publish("t", b"a")
        await kit.until(lambda: seen, "it runs")
        other.resize(10)
        await kit.nothing(other)
    assert seen == [1]
    assert await kit.left("t") == []


async def publish_all(kit: Kit, topic: str, wanted: list[bytes]) -> None:
    """Publish one by one through outages, each until it is accepted."""
    for body in wanted:
        deadline = kit.now() + kit.soon
        while True:
            try:
                await kit.publish(topic, body)
                break
            except TransportError:
                assert kit.now() < deadline, "the broker came back, and publishing did not"
                await asyncio.sleep(0.05)


async def outlive(kit: Kit, hurt: str) -> None:
    """Handle messages while the connection is cut or the server killed twice: all come, some twice."""
    app, seen, wanted = kit.app(), set[bytes](), numbered(300)

    @app.consumer("t", concurrency=4, max_demand=20)
    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.002)
        seen.add(message.body)

    async with app.running() as manager:
        publishing = asyncio.create_task(publish_all(kit, "t", wanted))
        for share in (50, 150):
            await kit.until(lambda share=share: len(seen) >= share, f"{share} are handled")  # type: ignore[misc]
            await getattr(kit.broker, hurt)()
        await publishing
        await kit.until(lambda: seen == set(wanted), "all are handled")
        await kit.until(lambda: not manager.stats()[0].held, "all are settled")
        assert manager.stats()[0].state == "running"


@guarantee("G11", "G2", hooks="interrupt")
async def test_a_pipeline_outlives_its_connections_and_says_so(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    await outlive(kit, "interrupt")
    assert [one for one in caplog.records if one.name.startswith("sluiceway") and one.levelno >= logging.WARNING]


@guarantee("G11", "G2", needs="durable", hooks="restart")
async def test_a_pipeline_outlives_its_server_and_says_so(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    await outlive(kit, "restart")
    assert [one for one in caplog.records if one.name.startswith("sluiceway") and one.levelno >= logging.WARNING]


@guarantee("G11", hooks="interrupt")
async def test_what_was_in_hand_when_the_connection_was_cut_is_settled_once_or_comes_again(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(6))
    messages = await kit.get(source, 6)
    await kit.broker.interrupt()
    refused = await settled(kit, source, messages[:3])
    await source.aclose()
    again = await kit.open("t")
    rest: list[Message[bytes]] = []
    while not {*refused, *numbered(6)[3:]} <= {*bodies(rest)}:
        rest += await kit.get(again, 1)
    # Where a delivery lives as long as its connection, nobody tells whether acks that were sent just then arrived.
    assert len(rest) == 3 + len(refused) or not kit.features.lease, bodies(rest)


async def settled(kit: Kit, source: object, messages: list[Message[bytes]]) -> list[bytes]:
    """Ack as the runtime does: again when it raises. Returns what was refused, which comes again."""
    deadline = kit.now() + kit.soon
    while True:
        try:
            return [one.message.body for one in await source.settle(messages, [])]  # type: ignore[attr-defined]
        except TransportError:
            assert kit.now() < deadline, "settle raises for ever"
            await asyncio.sleep(0.05)


@guarantee("G12", needs="durable")
async def test_a_backlog_costs_the_window_and_not_the_backlog(kit: Kit) -> None:
    if kit.features.max_payload < BODY:
        pytest.skip("n/a: features.max_payload is too small to show anything")
    app, seen = kit.app(), 0
    await kit.make("t")
    for _ in range(BACKLOG // 50):
        await kit.publish("t", *[b"x" * BODY] * 50)

    @app.consumer("t", concurrency=2, max_buffer_bytes=1024 * 1024)
    async def slow(message: Message[bytes]) -> None:
        nonlocal seen
        seen += 1
        await asyncio.sleep(0.002)

    tracemalloc.start()
    try:
        async with app.running():
            await kit.until(lambda: seen >= BACKLOG // 2, "half of the backlog is handled")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < MOST_MEMORY, f"{BACKLOG * BODY / 1e6:.0f} MB wait, and {most / 1e6:.1f} MB were in memory"


@guarantee("G12", needs="durable")
async def test_a_receive_that_waits_costs_no_cpu(kit: Kit) -> None:
    calls = [start(await kit.open(f"t{number}")) for number in range(3)]
    await asyncio.sleep(0.3)  # whatever opening them still does
    before = time.process_time()
    await asyncio.sleep(1.0)
    assert time.process_time() - before < MOST_IDLE
    await kit.publish("t1", b"a")
    assert bodies(await kit.end(calls[1])) == [b"a"]
    for call in calls:
        call.cancel()
