"""Machines whose clocks differ by an hour: what waits does not wait for that hour, and is blamed for nothing."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pika.spec import BasicProperties

from sluiceway.message import Settlement
from sluiceway.testing.acceptance import Broker, Kit
from sluiceway.transports.rabbitmq.letters import open_letter
from sluiceway.transports.rabbitmq.topology import HIGHEST, RUNG
from sluiceway.transports.rabbitmq.wire import Delivery
from tests.servers.nats import NATSServer
from tests.servers.proxy import Proxy
from tests.servers.redis import RedisServer
from tests.transports.nats_kit import NATSBroker
from tests.transports.rabbitmq_kit import RabbitMQBroker, shared_server
from tests.transports.redis_kit import RedisBroker

HOUR = 3600.0
DELAY = 0.7  # seconds: on RabbitMQ three rungs of the ladder
LATE = 5.0  # seconds, of a busy machine


@contextmanager
def made(name: str, folder: Path) -> Iterator[Broker]:
    if name == "redis":
        with RedisServer(folder) as redis:
            yield RedisBroker(redis)
    elif name == "nats":
        with NATSServer(folder) as nats, Proxy(nats.port) as proxy:
            yield NATSBroker(nats, proxy)
    else:
        yield RabbitMQBroker(shared_server())


@pytest.fixture(params=["redis", "nats", "rabbitmq"])
async def kit(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kit]:
    with made(request.param, tmp_path) as broker:
        async with Kit(broker) as kit:
            yield kit


@contextmanager
def clock_off_by(seconds: float) -> Iterator[None]:
    """Within it this process is on a machine whose clock is so many seconds ahead."""
    with pytest.MonkeyPatch.context() as patch:
        true = time.time
        patch.setattr(time, "time", lambda: true() + seconds)
        yield


@pytest.mark.parametrize("outcome", ["retry", "release"])
async def test_what_a_machine_that_is_ahead_sent_back_waits_for_its_delay(kit: Kit, outcome: str) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(source)
    began = time.monotonic()
    with clock_off_by(HOUR):
        await source.settle([], [Settlement(message, outcome, delay=DELAY)])  # type: ignore[arg-type]
    again = await kit.one(source)
    waited = time.monotonic() - began
    assert DELAY - 0.01 <= waited < 2 * DELAY + LATE
    assert (again.attempt, again.suspect) == (1 + (outcome == "retry"), False)
    assert not await source.settle([again], [])


async def test_what_a_machine_that_is_ahead_published_with_a_delay_waits_for_that(kit: Kit) -> None:
    source = await kit.open("t")
    began = time.monotonic()
    with clock_off_by(HOUR):
        await kit.publish("t", b"a", delay=DELAY)
    again = await kit.one(source)
    assert DELAY - 0.01 <= time.monotonic() - began < 2 * DELAY + LATE
    assert (again.attempt, again.suspect) == (1, False)


async def test_machines_that_differ_both_ways_do_not_send_a_message_to_and_fro(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    began = time.monotonic()
    for failures, seconds in enumerate((HOUR, -HOUR, 24 * HOUR)):
        message = await kit.one(source)
        assert (message.failures, message.suspect) == (failures, False)
        with clock_off_by(seconds):
            await source.settle([], [Settlement(message, "retry", delay=DELAY)])
    message = await kit.one(source)
    assert message.attempt == 4
    assert time.monotonic() - began < 3 * (2 * DELAY + LATE)


@pytest.mark.parametrize(
    ("due", "rung", "left"),
    [(2.0, 6.4, 2.0), (HOUR, 6.4, 6.4), (-HOUR, 6.4, -HOUR), (30 * 24 * HOUR, HIGHEST, 30 * 24 * HOUR)],
)
def test_what_left_a_rung_of_the_ladder_waits_for_no_longer_than_that_but_on_the_highest(
    due: float, rung: float, left: float
) -> None:
    now = time.time()
    headers = {"sluiceway-due": repr(now + due), RUNG: f"{rung:g}"}
    delivery: Delivery = (1, False, "t", BasicProperties(message_id="a", headers=headers), b"", "c")
    assert open_letter(delivery, 1).due - now == pytest.approx(left, abs=1.0)
