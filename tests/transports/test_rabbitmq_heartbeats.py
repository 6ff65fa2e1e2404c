"""Heartbeats over RabbitMQ: they are sent by a thread that no handler can block."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from sluiceway import App, Message
from tests.servers.rabbitmq import RabbitMQServer
from tests.transports.rabbitmq_kit import until

pytestmark = pytest.mark.slow

HEARTBEAT = 1  # seconds; the server gives a silent connection up after at most two of them, and one more to look


async def test_a_handler_that_blocks_the_loop_for_many_heartbeats_keeps_its_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun: list[int] = []
    ended = asyncio.Event()
    with RabbitMQServer(tmp_path) as server:
        app = App(f"{server.url()}?heartbeat={HEARTBEAT}", group="g")

        @app.consumer("t")
        async def handle(message: Message[bytes]) -> None:
            begun.append(message.attempt)
            time.sleep(6 * HEARTBEAT)  # noqa: ASYNC251  as handlers should not
            ended.set()

        async with app.running():
            await app.publish("t", b"1")
            await asyncio.wait_for(ended.wait(), 30)
            await app.publish("t", b"2")  # over the other connection
            ended.clear()
            await asyncio.wait_for(ended.wait(), 30)
        await until(lambda: all(row["messages"] == 0 for row in server.rows("queues", "name", "messages")))
    assert begun == [1, 1], "nothing was handed out again"
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
