"""RabbitMQ: servers that die, connections that are cut, and queues that are deleted, under a source and a publisher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pika
import pytest

from sluiceway.errors import PublishError
from sluiceway.message import Outgoing, Settlement
from sluiceway.source import Subscription
from sluiceway.transports.rabbitmq import RabbitMQTransport
from tests.servers.proxy import Proxy
from tests.servers.rabbitmq import RabbitMQServer
from tests.transports.rabbitmq_kit import SOON, RabbitMQBroker, opened, shared_server, take, until


@pytest.fixture
def broker() -> RabbitMQBroker:
    return RabbitMQBroker(shared_server())


@pytest.fixture
def proxy(broker: RabbitMQBroker) -> Iterator[Proxy]:
    with Proxy(broker.server.port) as proxy:
        yield proxy


@pytest.fixture
async def transport(broker: RabbitMQBroker, proxy: Proxy) -> AsyncIterator[RabbitMQTransport]:
    """One whose connections go through the proxy."""
    url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/%2F?exchange={broker.exchange}&timeout=5"
    transport = RabbitMQTransport(url)
    await transport.connect()
    yield transport
    await transport.aclose()


async def publish(transport: RabbitMQTransport, *bodies: bytes) -> None:
    """Publish, again and again while the broker is out of reach."""
    await publish_all(transport, [Outgoing("t", body) for body in bodies])


async def publish_all(transport: RabbitMQTransport, left: Sequence[Outgoing]) -> None:
    async with asyncio.timeout(SOON):
        while left:
            try:
                await transport.publish(left)
                return
            except PublishError as error:
                left = error.failed


def management(broker: RabbitMQBroker) -> pika.BlockingConnection:
    return pika.BlockingConnection(pika.URLParameters(broker.server.url()))


# -- connections -------------------------------------------------------------------------------------------------


async def test_a_source_goes_on_after_its_connection_was_cut_and_says_so(
    transport: RabbitMQTransport, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sluiceway")
    source = await opened(transport)
    waiting = asyncio.create_task(source.receive(10))
    await asyncio.sleep(0)
    proxy.refuse()
    proxy.cut()
    await until(lambda: source.status().state == "connecting")
    assert source.status().error
    proxy.heal()
    await publish(transport, b"a")
    assert [one.body for one in await asyncio.wait_for(waiting, SOON)] == [b"a"]
    assert source.status().state == "running"
    said = [record.getMessage() for record in caplog.records if record.name == "sluiceway"]
    assert any("was interrupted" in text and "again in" in text for text in said)
    assert any(text.startswith("receiving from") and text.endswith(" again") for text in said)
    assert not [one for one in caplog.records if one.name.startswith("pika") and one.levelno >= logging.WARNING]
    await source.aclose()


async def test_what_was_in_hand_when_the_connection_was_cut_comes_again_and_blames_nobody(
    transport: RabbitMQTransport, proxy: Proxy
) -> None:
    source = await opened(transport)
    await publish(transport, *(b"%d" % number for number in range(20)))
    held = await take(source, 20)
    proxy.cut()
    await until(lambda: held[0].scope not in source.status().scopes)
    refused = await source.settle(held[:10], [Settlement(held[10], "retry")])
    assert {one.message for one in refused} == set(held[:11])
    assert {one.kind for one in refused} == {"lost"}
    again = await take(source, 20)
    assert sorted(one.body for one in again) == sorted(one.body for one in held)
    assert all((one.attempt, one.deliveries, one.suspect) == (1, 1, False) for one in again)
    assert not await source.settle(again, [])
    await source.aclose()


async def test_a_scope_that_ended_is_told(broker: RabbitMQBroker, transport: RabbitMQTransport, proxy: Proxy) -> None:
    told: list[object] = []

    async def on_revoke(scopes: frozenset[object], seconds: float | None) -> None:
        told.append((scopes, seconds))

    subscription = Subscription(topics=("t",), group="g", window=10, on_revoke=on_revoke)
    source = await transport.subscribe(subscription)
    await publish(transport, b"a")
    (message,) = await take(source, 1)
    proxy.cut()
    await take(source, 1)
    assert told == [(frozenset({message.scope}), None)]
    await source.aclose()


@pytest.mark.parametrize("count", [200, 2_000, 20_000])
async def test_a_connection_cut_in_the_midst_of_a_frame_loses_nothing(
    transport: RabbitMQTransport, proxy: Proxy, count: int
) -> None:
    source = await opened(transport)
    await publish(transport, *(b"%03d" % number * 50 for number in range(200)))
    proxy.cut_after(count)
    seen: set[bytes] = set()
    while len(seen) < 200:
        messages = await take(source, 1)
        seen.update(one.body for one in messages)
        await source.settle(messages, [])
    await source.aclose()


async def test_what_is_published_while_connections_are_cut_is_all_there(
    transport: RabbitMQTransport, proxy: Proxy
) -> None:
    source = await opened(transport)
    bodies = [b"%d" % number for number in range(3_000)]

    async def cut_now_and_then() -> None:
        for _ in range(4):
            await asyncio.sleep(0.15)
            proxy.cut()

    cutting = asyncio.create_task(cut_now_and_then())
    for start in range(0, 3_000, 100):
        await publish(transport, *bodies[start : start + 100])
    await cutting
    seen: set[bytes] = set()
    async with asyncio.timeout(SOON):
        while len(seen) < 3_000:
            messages = await source.receive(100)
            seen.update(one.body for one in messages)
            await source.settle(messages, [])
    assert seen == set(bodies)
    await source.aclose()


async def test_a_retry_whose_confirm_is_lost_is_tried_again_and_the_message_is_not_lost(
    transport: RabbitMQTransport, proxy: Proxy
) -> None:
    source = await opened(transport)
    await publish(transport, b"a")
    (message,) = await take(source, 1)
    proxy.stall("replies")
    settling = asyncio.create_task(source.settle([], [Settlement(message, "retry")]))
    await asyncio.sleep(0.2)
    proxy.cut()
    proxy.heal()
    await asyncio.wait([settling])
    settling.exception()
    bodies = {one.body for one in await take(source, 1)}
    assert bodies == {b"a"}
    await source.aclose()


# -- what stands at the broker -----------------------------------------------------------------------------------


async def test_a_deleted_queue_is_made_again_and_goes_on(broker: RabbitMQBroker, transport: RabbitMQTransport) -> None:
    source = await opened(transport)
    waiting = asyncio.create_task(source.receive(10))
    await asyncio.sleep(0.2)
    connection = await asyncio.to_thread(management, broker)
    await asyncio.to_thread(connection.channel().queue_delete, f"{broker.exchange}|g|t")
    await publish(transport, b"after")
    assert [one.body for one in await asyncio.wait_for(waiting, SOON)] == [b"after"]
    connection.close()
    await source.aclose()


async def test_a_queue_that_was_deleted_since_it_was_ensured_is_made_again(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    subscription = Subscription(topics=("t",), group="g", window=10)
    await transport.ensure([subscription], create=True)
    connection = await asyncio.to_thread(management, broker)
    await asyncio.to_thread(connection.channel().queue_delete, f"{broker.exchange}|g|t")
    source = await transport.subscribe(subscription)
    receiving = asyncio.create_task(source.receive(10))
    await publish(transport, b"a")
    assert [one.body for one in await asyncio.wait_for(receiving, SOON)] == [b"a"]
    await source.aclose()
    connection.close()


async def test_exchanges_that_are_deleted_under_a_source_are_made_again(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    source = await opened(transport)
    pattern = await opened(transport, "other.*")
    connection = await asyncio.to_thread(management, broker)
    channel = connection.channel()
    for name in (broker.exchange, f"{broker.exchange}|g", f"{broker.exchange}|g|*"):
        channel.exchange_delete(name)
    connection.close()
    await publish(transport, b"a")
    assert [one.body for one in await take(source, 1)] == [b"a"]
    await publish_all(transport, [Outgoing("other.x", b"b")])
    assert [one.body for one in await take(pattern, 1)] == [b"b"]
    with pytest.raises(PublishError, match="no group has its topic"):
        await transport.publish([Outgoing("nobody", b"c")])
    await source.aclose()
    await pattern.aclose()


async def test_a_deleted_dead_letter_queue_is_made_again(broker: RabbitMQBroker, transport: RabbitMQTransport) -> None:
    await transport.publish([Outgoing("t.g.dead", b"1")])
    connection = await asyncio.to_thread(management, broker)
    await asyncio.to_thread(connection.channel().queue_delete, f"{broker.exchange}|t.g.dead")
    connection.close()
    await publish_all(transport, [Outgoing("t.g.dead", b"2")])
    assert [stored.body async for stored in transport.browse("t.g.dead")] == [b"2"]


# -- the server --------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_server_that_is_killed_and_started_again_loses_nothing(tmp_path: Path) -> None:
    server = RabbitMQServer(tmp_path / "rabbitmq")
    await asyncio.to_thread(server.start)
    try:
        transport = RabbitMQTransport(f"{server.url()}?timeout=30")
        await transport.connect()
        source = await opened(transport)
        await transport.publish([Outgoing("t", b"%d" % number) for number in range(200)])
        await transport.publish([Outgoing("t", b"delayed", delay=1.0)])
        held = await take(source, 50)
        await asyncio.sleep(3)  # what falls due while the server starts may be routed three minutes later only
        await source.settle(held[:20], [])
        await source.settle([], [Settlement(held[20], "retry", delay=1.0)])
        await source.flush()
        await asyncio.to_thread(server.kill)
        with pytest.raises(PublishError):
            await asyncio.wait_for(RabbitMQTransport.publish(transport, [Outgoing("t", b"nobody is there")]), 60)
        await asyncio.to_thread(server.start)
        seen: set[bytes] = {one.body for one in held[:20]}
        while len(seen) < 201:
            messages = await take(source, 1)
            seen.update(one.body for one in messages)
            await source.settle(messages, [])
        await source.aclose()
        await transport.aclose()
    finally:
        server.kill()


async def test_outputs_of_which_one_has_no_way_do_not_cost_the_message_when_it_is_given_back(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    source, out = await opened(transport), await opened(transport, "out")
    await transport.publish([Outgoing("t", b"1")])
    (message,) = await take(source, 1)
    outputs = (Outgoing("out", b"a"), Outgoing("nobody", b"b"))
    (refused,) = await source.settle([], [Settlement(message, "ack", outputs=outputs)])
    assert refused.kind == "rejected"
    assert [one.body for one in await take(out, 1)] == [b"a"]
    await source.aclose()  # gives back what is unsettled
    assert [one.body for one in await take(await opened(transport), 1)] == [b"1"]
