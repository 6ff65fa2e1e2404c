"""The largest body that each broker takes by default, through publish, retry, dead letter and browse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sluiceway import App, Message, Retry
from sluiceway.message import Stored
from tests.servers.nats import NATSServer
from tests.servers.rabbitmq import RabbitMQServer
from tests.servers.redis import RedisServer
from tests.servers.server import Server

pytestmark = pytest.mark.slow

SERVERS: dict[str, type[Server]] = {"redis": RedisServer, "nats": NATSServer, "rabbitmq": RabbitMQServer}


@pytest.fixture(params=["sqlite", *SERVERS])
async def app(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[App]:
    if request.param == "sqlite":
        yield App(f"sqlite:///{tmp_path / 'large.db'}", group="g")
        return
    with SERVERS[request.param](tmp_path) as server:
        yield App(server.url(), group="g")


async def test_a_body_of_the_default_limit_is_retried_and_dead_lettered_as_it_was(app: App) -> None:
    attempts: list[tuple[int, bool]] = []

    @app.consumer("t", retry=Retry(attempts=2, base_delay=0.01))
    async def handle(message: Message[bytes]) -> None:
        attempts.append((message.attempt, message.payload == body))
        raise ValueError("no")

    async with app.running():
        body = bytes(range(256)) * (app.transport.features.max_payload // 256)
        assert len(body) == app.transport.features.max_payload
        await app.publish("t", body)
        letters = await dead_letters(app)
    assert attempts == [(1, True), (2, True)]
    assert [letter.body == body for letter in letters] == [True]


async def dead_letters(app: App) -> list[Stored]:
    """Those of the topic, once there are some."""
    for _ in range(600):
        if letters := [one async for one in app.transport.browse("t.g.dead")]:
            return letters
        await asyncio.sleep(0.1)
    raise AssertionError("it was not dead-lettered within a minute")
