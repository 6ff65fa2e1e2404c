"""RabbitMQ: what kills its processes is found, and those beside it are not blamed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluiceway.message import Message, Outgoing, Settlement
from sluiceway.source import Source, Subscription
from sluiceway.transports.rabbitmq import RabbitMQTransport
from tests.servers.proxy import Proxy
from tests.transports.rabbitmq_kit import RabbitMQBroker, shared_server

SOON = 20.0
SUBSCRIPTION = Subscription(topics=("t",), group="g", window=100)


@pytest.fixture
def broker() -> Iterator[RabbitMQBroker]:
    server = shared_server()
    with Proxy(server.port) as proxy:
        yield RabbitMQBroker(server, proxy)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has lived for half a second may take what others left."""
    monkeypatch.setattr("sluiceway.transports.rabbitmq.suspects.STEADY", 0.5)


async def one(source: Source) -> Message[bytes]:
    async with asyncio.timeout(SOON):
        (message,) = await source.receive(1)
    return message


async def left_by_a_process_that_died_with_it_alone(broker: RabbitMQBroker) -> RabbitMQTransport:
    """A message was in hand at two deaths, the second while it ran alone. Returns a client that saw neither."""
    other = RabbitMQTransport(broker.url())
    await other.connect()
    await other.ensure([SUBSCRIPTION], create=True)
    await other.publish([Outgoing("t", b"a")])
    await broker.die_holding("t", "g", 1)
    dying = broker.client()
    await dying.connect()
    source = await dying.subscribe(SUBSCRIPTION)
    message = await one(source)
    assert await source.suspect(message)
    assert broker.proxy is not None
    broker.proxy.refuse()
    broker.proxy.cut()
    await dying.aclose()
    return other


@pytest.mark.usefixtures("steady")
async def test_a_suspect_that_a_process_died_with_is_taken_by_another_and_counts_one_death_more(
    broker: RabbitMQBroker,
) -> None:
    other = await left_by_a_process_that_died_with_it_alone(broker)
    source = await other.subscribe(SUBSCRIPTION)
    message = await one(source)
    assert (message.body, message.attempt, message.suspicions, message.deliveries) == (b"a", 2, 1, 3)
    assert message.suspect
    assert await source.suspect(message)
    assert (message.attempt, message.suspicions, message.suspect) == (3, 2, False)
    assert not await source.settle([message], [])
    await other.aclose()


@pytest.mark.usefixtures("steady")
async def test_a_suspect_is_not_taken_while_others_are_in_hand(broker: RabbitMQBroker) -> None:
    other = await left_by_a_process_that_died_with_it_alone(broker)
    source = await other.subscribe(SUBSCRIPTION)
    await other.publish([Outgoing("t", b"beside")])
    beside = await one(source)
    assert beside.body == b"beside"
    call = asyncio.create_task(one(source))
    held = []
    for _ in range(3):
        held.append(await asyncio.to_thread(broker.server.held, f"{broker.exchange}|g|t|suspects"))
        await asyncio.sleep(0.1)
    assert held == [0, 0, 0]
    await source.settle([beside], [])
    assert (await call).body == b"a"
    await other.aclose()


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("delay", [0.0, 0.3])
async def test_a_suspect_that_rests_goes_back_among_the_suspects_as_it_is(broker: RabbitMQBroker, delay: float) -> None:
    other = await left_by_a_process_that_died_with_it_alone(broker)
    source = await other.subscribe(SUBSCRIPTION)
    for _ in range(2):
        message = await one(source)
        assert (message.attempt, message.suspicions, message.deliveries, message.suspect) == (2, 1, 3, True)
        await source.settle([], [Settlement(message, "release", delay=delay)])
    await other.aclose()


@pytest.mark.slow
async def test_one_poison_message_among_two_hundred_costs_one_dead_letter_with_two_processes(
    broker: RabbitMQBroker, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    ledger.touch()
    client = RabbitMQTransport(broker.url())
    await client.connect()
    await client.ensure([SUBSCRIPTION], create=True)
    good = [b"%d" % number for number in range(200)]
    await client.publish([Outgoing("t", body) for body in [*good[:90], b"poison", *good[90:]]])
    command = [sys.executable, "-m", "sluiceway.testing._actor", "work", broker.url(), "g", "50", str(ledger)]
    processes = [start(command) for _ in range(2)]
    try:
        deadline = time.monotonic() + 90
        letters: list[bytes] = []
        while not letters or not set(good) <= ended(ledger):
            assert time.monotonic() < deadline, (letters, set(good) - ended(ledger))
            for index, process in enumerate(processes):
                if process.poll() is not None:
                    assert process.returncode == -signal.SIGKILL
                    processes[index] = start(command)
            await asyncio.sleep(0.1)
            letters = [stored.body async for stored in client.browse("t.g.dead")]
        for process in processes:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 30) in (0, -signal.SIGKILL)
    finally:
        for process in processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert letters == [b"poison"]
    starts = Counter(line.split()[2] for line in ledger.read_bytes().splitlines() if line.startswith(b"start"))
    assert 3 <= starts.pop(b"poison") <= 5
    await client.aclose()


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command)


def ended(ledger: Path) -> set[bytes]:
    return {line.split()[2] for line in ledger.read_bytes().splitlines() if line.startswith(b"end")}
