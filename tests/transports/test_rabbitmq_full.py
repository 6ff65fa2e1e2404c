"""RabbitMQ: a queue that somebody gave a length. What it refuses is said, and nothing is lost meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from sluiceway import App, Message, PublishError, Retry
from sluiceway.message import Outgoing, Settlement
from sluiceway.source import Subscription
from sluiceway.transport import Transport
from tests.servers.rabbitmq import RabbitMQServer
from tests.transports.rabbitmq_kit import RabbitMQBroker, until

LENGTH = 20


TRIES = 1_000  # ms after which the server tries again to put a message from a delay queue where there was no room


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    option = f"-rabbit dead_letter_worker_publisher_confirm_timeout {TRIES}"
    with RabbitMQServer(tmp_path_factory.mktemp("rabbitmq"), erlang=option) as server:
        yield server


@pytest.fixture
def broker(server: RabbitMQServer) -> RabbitMQBroker:
    broker = RabbitMQBroker(server)
    pattern = f"^{broker.exchange}.g.t$"
    definition = f'{{"max-length": {LENGTH}, "overflow": "reject-publish"}}'
    server.control("set_policy", broker.exchange, pattern, definition, "--apply-to", "queues")
    return broker


async def test_publishes_that_a_full_queue_refuses_raise_and_retries_wait_until_there_is_room(
    broker: RabbitMQBroker,
) -> None:
    app, refused, handled = App(broker.url(), group="g"), list[str](), set[int]()

    @app.consumer("t", concurrency=2, max_demand=4, retry=Retry(attempts=3, base_delay=0.1))
    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.003)
        if int(message.body) % 5 == 0 and message.attempt == 1:
            raise ValueError("not yet")
        handled.add(int(message.body))

    async with app.running() as manager:
        for first in range(0, 400, 50):
            chunk = [Outgoing("t", b"%d" % n) for n in range(first, first + 50)]
            while chunk:
                try:
                    await app.transport.publish(chunk)
                    chunk = []
                except PublishError as error:
                    refused.append(str(error))
                    chunk = list(error.failed)
        await until(lambda: handled == set(range(400)))
        await until(lambda: not manager.stats()[0].held)
    assert refused
    assert all("a queue is full" in one for one in refused)


async def publish_until_refused(transport: Transport) -> None:
    """The server lets through a little more than the length."""
    while True:
        await transport.publish([Outgoing("t", b"more") for _ in range(LENGTH)])


async def test_what_goes_back_to_a_full_queue_is_refused_and_stays_in_hand(broker: RabbitMQBroker) -> None:
    transport = broker.client()
    await transport.connect()
    source = await transport.subscribe(Subscription(topics=("t",), group="g", window=1))
    await transport.publish([Outgoing("t", b"first")])
    (message,) = await source.receive(1)
    with pytest.raises(PublishError, match="a queue is full"):
        await publish_until_refused(transport)
    (refused,) = await source.settle([], [Settlement(message, "release")])
    assert (refused.kind, refused.message) == ("rejected", message)
    assert "full" in refused.detail
    assert not await source.settle([message], [])  # still ours
    await source.aclose()
    await transport.aclose()
