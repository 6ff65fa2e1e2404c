"""The RabbitMQ source beyond the contract: how much the broker pushes, who is suspected, and what takes too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pika
import pytest

from sluiceway.errors import Unsupported
from sluiceway.message import Message, Outgoing, Settlement
from sluiceway.source import Subscription
from sluiceway.transports.rabbitmq import RabbitMQTransport
from tests.servers.rabbitmq import RabbitMQServer
from tests.transports.rabbitmq_kit import SOON, RabbitMQBroker, opened, shared_server, take


@pytest.fixture
def broker() -> RabbitMQBroker:
    return RabbitMQBroker(shared_server())


@pytest.fixture
async def transport(broker: RabbitMQBroker) -> AsyncIterator[RabbitMQTransport]:
    transport = RabbitMQTransport(broker.url())
    await transport.connect()
    yield transport
    await transport.aclose()


def ready(broker: RabbitMQBroker) -> int:
    """How many messages the broker has pushed to nobody."""
    connection = pika.BlockingConnection(pika.URLParameters(broker.server.url()))
    count: int = connection.channel().queue_declare(f"{broker.exchange}|g|t", passive=True).method.message_count
    connection.close()
    return count


async def test_the_broker_pushes_no_more_than_is_held_and_asked_for(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    source = await opened(transport)
    await transport.publish([Outgoing("t", b"%d" % number) for number in range(100)])
    held = await take(source, 5)
    await asyncio.sleep(0.3)
    assert await asyncio.to_thread(ready, broker) == 95
    await source.settle(held, [])
    await take(source, 20)
    await asyncio.sleep(0.3)
    assert await asyncio.to_thread(ready, broker) == 75
    await source.aclose()
    assert await asyncio.to_thread(ready, broker) == 95


async def test_many_small_growths_leave_few_consumers(transport: RabbitMQTransport) -> None:
    source = await opened(transport)
    await transport.publish([Outgoing("t", b"%d" % number) for number in range(200)])
    held = []
    for _ in range(100):
        held += await take(source, 2)
    assert sorted(int(one.body) for one in held) == list(range(200))
    assert not any(one.suspect for one in held)
    await source.aclose()


async def test_while_a_suspect_runs_the_broker_pushes_nothing_else(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    await transport.ensure([Subscription(topics=("t",), group="g", window=1)], create=True)
    await transport.publish([Outgoing("t", b"%d" % number) for number in range(50)])
    await broker.die_holding("t", "g", 1)
    source = await opened(transport)
    held: list[Message[bytes]] = []
    async with asyncio.timeout(SOON):
        while not any(one.suspect for one in held):
            held += await source.receive(10)
    others = [one for one in held if not one.suspect]
    await source.settle(others, [])
    await asyncio.sleep(0.3)
    assert await asyncio.to_thread(ready, broker) == 50 - len(held), "all but what was returned is back at the broker"
    assert sum(one.suspect for one in held) == 1
    await source.aclose()


async def test_what_a_drain_gives_back_is_suspected_by_no_other_process(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    other = RabbitMQTransport(broker.url())  # it shares nothing with the first
    await other.connect()
    source = await opened(transport)
    await transport.publish([Outgoing("t", b"%d" % number) for number in range(500)])
    held = await take(source, 300)
    await source.settle(held[:150], [])
    source.stop()
    await source.settle([], [Settlement(one, "release") for one in held[150:]])
    await source.aclose()
    rest = await take(await opened(other), 350)
    assert {one.body for one in rest} == {b"%d" % number for number in range(500)} - {one.body for one in held[:150]}
    assert [(one.attempt, one.suspect) for one in rest] == [(1, False)] * 350
    await other.aclose()


async def test_a_group_cannot_start_at_a_time(transport: RabbitMQTransport) -> None:
    with pytest.raises(Unsupported, match="before it is made"):
        await transport.subscribe(Subscription(topics=("t",), group="g", window=1, start=datetime.now(UTC)))


async def test_what_a_stranger_said_in_properties_is_kept_as_headers_over_a_retry(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    source = await opened(transport)
    connection = await asyncio.to_thread(pika.BlockingConnection, pika.URLParameters(broker.server.url()))
    properties = pika.BasicProperties(
        content_type="text/plain", correlation_id="c-1", reply_to="answers", message_id="m-1", timestamp=1_700_000_000,
        headers={"number": 7, "yes": True, "raw": b"\xff", "list": [1, 2], "when": datetime(2026, 1, 2, tzinfo=UTC)},
    )  # fmt: skip
    connection.channel().basic_publish(broker.exchange, "t", b"theirs", properties)
    connection.close()
    (message,) = await take(source, 1)
    assert (message.id, message.timestamp, message.topic) == ("m-1", 1_700_000_000.0, "t")
    assert message.headers["correlation-id"] == "c-1"
    assert message.headers["number"] == "7"
    await source.settle([], [Settlement(message, "retry")])
    (again,) = await take(source, 1)
    assert (again.id, again.attempt, dict(again.headers)) == ("m-1", 2, dict(message.headers))
    await source.aclose()


async def test_a_delayed_retry_comes_back_to_the_topic_of_its_pattern(transport: RabbitMQTransport) -> None:
    source = await opened(transport, "a.#")
    await transport.publish([Outgoing("a.b.c", b"x")])
    (message,) = await take(source, 1)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await source.settle([], [Settlement(message, "retry", delay=0.7)])  # 0.4 and 0.2 and 0.1: three rungs
    (again,) = await take(source, 1)
    assert 0.69 <= loop.time() - began < 3.0
    assert (again.topic, again.attempt, again.suspect) == ("a.b.c", 2, False)
    await source.aclose()


@pytest.mark.slow
async def test_a_handler_that_outlives_the_servers_consumer_timeout_costs_no_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = RabbitMQServer(
        tmp_path / "rabbitmq", settings=["consumer_timeout = 1000"], erlang="-rabbit channel_tick_interval 500"
    )
    await asyncio.to_thread(server.start)
    try:
        transport = RabbitMQTransport(server.url())
        await transport.connect()
        source = await opened(transport)
        await transport.publish([Outgoing("t", b"slow")])
        (message,) = await take(source, 1)
        (again,) = await take(source, 1)  # the server takes it back
        assert (again.body, again.attempt, again.suspect) == (b"slow", 1, False)
        assert [one.kind for one in await source.settle([message], [])] == ["lost"]
        assert not await source.settle([again], [])
        assert any("consumer_timeout" in record.getMessage() for record in caplog.records)
        await source.aclose()
        await transport.aclose()
    finally:
        server.kill()


async def test_the_backlog_has_the_retries_that_were_put_off_here_until_they_are_back(
    transport: RabbitMQTransport,
) -> None:
    source = await opened(transport)
    await transport.publish([Outgoing("t", b"1")])
    (message,) = await take(source, 1)
    await source.settle([], [Settlement(message, "retry", delay=0.3)])
    backlog = await source.backlog()
    assert backlog is not None
    assert backlog.messages == 1
    (message,) = await take(source, 1)
    await source.settle([message], [])
    async with asyncio.timeout(SOON):
        while (await source.backlog()).messages:  # type: ignore[union-attr]  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await source.aclose()
