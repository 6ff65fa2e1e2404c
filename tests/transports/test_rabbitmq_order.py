"""RabbitMQ: `order_by` over retries, drains, deaths and suspects, one process of a group after the other."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pika
import pytest

from sluiceway import App, Message, Retry
from sluiceway.message import Outgoing, Settlement
from sluiceway.source import Source, Subscription
from sluiceway.transport import Transport
from sluiceway.transports.rabbitmq import RabbitMQTransport, order
from sluiceway.transports.rabbitmq.ordered import OrderedSource
from tests.servers.proxy import Proxy
from tests.transports.rabbitmq_kit import RabbitMQBroker, shared_server, take, until

PATIENCE = 90.0  # seconds: after a death what was in hand rests, and what was settled just before is waited for


@pytest.fixture
def broker() -> Iterator[RabbitMQBroker]:
    server = shared_server()
    with Proxy(server.port) as proxy:
        yield RabbitMQBroker(server, proxy)


@asynccontextmanager
async def connected(broker: RabbitMQBroker) -> AsyncIterator[RabbitMQTransport]:
    """A transport that the proxy does not harm."""
    transport = RabbitMQTransport(broker.url())
    await transport.connect()
    yield transport
    await transport.aclose()


@pytest.fixture
async def transport(broker: RabbitMQBroker) -> AsyncIterator[RabbitMQTransport]:
    async with connected(broker) as transport:
        await transport.ensure([subscription()], create=True)
        yield transport


def subscription(*topics: str, window: int = 100, ordered: bool = True) -> Subscription:
    return Subscription(topics=topics or ("t",), group="g", window=window, order_by="key" if ordered else None)


async def ordered(transport: Transport, *topics: str, window: int = 100) -> OrderedSource:
    source = await transport.subscribe(subscription(*topics, window=window))
    assert isinstance(source, OrderedSource)
    return source


async def publish(transport: RabbitMQTransport, *bodies: bytes, key: str | None = "k", topic: str = "t") -> None:
    await transport.publish([Outgoing(topic, body, key) for body in bodies])


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def bodies(messages: list[Message[Any]]) -> list[bytes]:
    return [message.body for message in messages]


async def one(source: Source) -> Message[Any]:
    (message,) = await take(source, 1)
    return message


async def nothing(source: Source, seconds: float = 0.4) -> None:
    call = asyncio.create_task(source.receive(10))
    await asyncio.sleep(seconds)
    source.resize(0)
    assert not await call
    source.resize(1000)


def counts(broker: RabbitMQBroker, queue: str = "t") -> int:
    """How many messages the broker has pushed to nobody."""
    connection = pika.BlockingConnection(pika.URLParameters(broker.server.url()))
    count: int = connection.channel().queue_declare(f"{broker.exchange}|g|{queue}", passive=True).method.message_count
    connection.close()
    return count


# -- one process ---------------------------------------------------------------------------------------------------


async def test_keys_stay_in_order_though_many_fail_and_one_key_is_most_of_the_topic(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    app, done = App(broker.url(), group="g"), dict[str | None, list[int]]()

    @app.consumer("t", order_by="key", concurrency=4, max_demand=8, retry=Retry(attempts=20, base_delay=0.02))
    async def handle(message: Message[bytes]) -> None:
        number = int(message.body)
        if number % 11 == 5 and message.attempt < 3:
            raise ValueError("not yet")
        done.setdefault(message.key, []).append(number)

    for number in range(200):
        await publish(transport, b"%d" % number, key=f"key {number % 6}" if number % 3 == 0 else "hot")
    async with app.running():
        await until(lambda: sum(map(len, done.values())) == 200)
    assert all(numbers == sorted(numbers) for numbers in done.values())


async def test_what_is_parked_behind_what_is_in_hand_costs_the_broker_nothing(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    source = await ordered(transport)
    await publish(transport, *numbered(10))
    held = await take(source, 10)
    await source.settle([], [Settlement(message, "park") for message in held[1:]])
    await nothing(source)
    assert await asyncio.to_thread(counts, broker) == 0
    for expected in range(1, 10):
        await source.settle([held[0]], [])
        held = [await one(source)]
        assert held[0].body == b"%d" % expected


async def test_other_keys_pass_a_key_of_which_more_waits_than_the_broker_pushes(transport: RabbitMQTransport) -> None:
    source = await ordered(transport, window=10)
    await publish(transport, *numbered(60))
    failed = await one(source)
    await source.settle([], [Settlement(failed, "retry", delay=2.0)])
    await publish(transport, b"other", key="other")
    other = await one(source)
    assert other.body == b"other"
    await source.settle([other], [])
    got: list[Message[Any]] = []
    while len(got) < 60:
        messages = await take(source, 1)
        got += messages
        await source.settle(messages, [])
    assert bodies(got) == numbered(60)
    assert [message.attempt for message in got] == [2] + [1] * 59
    assert not any(message.suspect for message in got)


async def test_a_window_of_one_waits_for_a_retry_and_for_nothing_else(transport: RabbitMQTransport) -> None:
    source = await ordered(transport, window=1)
    await publish(transport, *numbered(4))
    await source.settle([], [Settlement(await one(source), "retry", delay=0.3)])
    got = []
    for _ in range(4):
        got.append(await one(source))
        await source.settle(got[-1:], [])
    assert bodies(got) == numbered(4)


async def test_a_key_keeps_its_order_over_several_topics_in_one_process(transport: RabbitMQTransport) -> None:
    source = await ordered(transport, "a", "b")
    await publish(transport, b"0", topic="a")
    await source.settle([], [Settlement(await one(source), "retry", delay=0.6)])
    await publish(transport, b"1", topic="b")
    assert bodies(await take(source, 2)) == [b"0", b"1"]


async def test_what_another_takes_and_settles_holds_nobody_up(
    broker: RabbitMQBroker, transport: RabbitMQTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "LATE", 0.5)
    source = await ordered(transport)
    await publish(transport, *numbered(3))
    await source.settle([], [Settlement(await one(source), "retry", delay=1.0)])
    connection = await asyncio.to_thread(pika.BlockingConnection, pika.URLParameters(broker.server.url()))
    connection.channel().queue_purge(f"{broker.exchange}||0.8 s")
    connection.close()
    assert bodies(await take(source, 2)) == [b"1", b"2"]


async def test_a_message_with_a_delay_of_its_own_holds_up_no_other_of_its_key(transport: RabbitMQTransport) -> None:
    source = await ordered(transport)
    await transport.publish([Outgoing("t", b"later", "k", delay=0.7)])
    await publish(transport, b"now")
    got = await one(source)
    assert got.body == b"now"
    await source.settle([got], [])
    assert (await one(source)).body == b"later"


# -- one after the other -------------------------------------------------------------------------------------------


async def test_one_process_has_all_and_the_next_takes_its_turn_when_it_ends(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    first = await ordered(transport)
    await publish(transport, *numbered(2))
    held = await one(first)
    async with connected(broker) as elsewhere:
        second = await ordered(elsewhere)
        call = asyncio.create_task(take(second, 1))
        await publish(transport, b"other", key="other")
        await asyncio.sleep(0.4)
        assert not call.done()
        await first.settle([held], [])
        await first.aclose()
        (message,) = await call
        assert (message.body, message.attempt, message.deliveries, message.suspect) == (b"1", 1, 1, False)
        assert (await one(second)).body == b"other"


async def test_what_a_drain_hands_back_is_in_its_place_and_blames_nobody(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    first = await ordered(transport)
    await publish(transport, *numbered(300))
    held = await take(first, 50)
    await first.settle(held[:3], [])
    first.stop()
    await first.settle([], [Settlement(message, "release") for message in reversed(held[3:])])
    await first.aclose()
    for _ in range(2):
        async with connected(broker) as elsewhere:
            again = await take(await ordered(elsewhere, window=1000), 297)
            assert bodies(again) == numbered(300)[3:]
            assert [(one.attempt, one.deliveries, one.suspect) for one in again] == [(1, 1, False)] * 297


async def test_what_still_runs_on_a_thread_is_kept_and_the_rest_is_handed_to_the_next_process(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    first = await ordered(transport)
    await publish(transport, b"runs", key="a")
    await publish(transport, *numbered(3))
    runs, held = await take(first, 2)
    assert (runs.body, held.body) == (b"runs", b"0")
    await first.aclose(keep=[runs])
    async with connected(broker) as elsewhere:
        again = await take(await ordered(elsewhere), 3)
        assert bodies(again) == numbered(3)
        assert not any(message.suspect for message in again)


async def test_what_waits_for_its_retry_is_remembered_by_the_next_process(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    source = await ordered(transport)
    await publish(transport, *numbered(4), key="k\udce9")
    failed, second = await take(source, 2)
    began = time.monotonic()
    await source.settle([], [Settlement(failed, "retry", delay=2.0), Settlement(second, "park")])
    await source.aclose()
    async with connected(broker) as elsewhere:
        source = await ordered(elsewhere)
        await publish(elsewhere, b"other", key="other")
        assert bodies(await take(source, 1)) == [b"other"]
        again = await take(source, 4)
        assert time.monotonic() - began >= 1.9
        assert bodies(again) == numbered(4)
        assert [message.attempt for message in again] == [2, 1, 1, 1]
        assert not any(message.suspect for message in again)


async def test_a_process_that_dies_leaves_its_retries_and_what_was_in_hand_in_their_order(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    """The second message is away, and the first is in hand and has no place that others could read."""
    dying = broker.client()
    await dying.connect()
    source = await ordered(dying)
    await publish(transport, *numbered(4))
    _, second = await take(source, 2)
    await source.settle([], [Settlement(second, "retry", delay=1.0)])
    assert broker.proxy is not None
    broker.proxy.refuse()
    broker.proxy.cut()
    after, again = await ordered(transport), list[Message[Any]]()
    while len(again) < 4:
        again += await take(after, 1)
        await after.settle(again[-1:], [])
    assert bodies(again) == numbered(4)
    assert [message.attempt for message in again] == [1, 2, 1, 1]
    assert [message.suspect for message in again] == [True, False, True, True]
    await dying.aclose()


async def test_a_connection_that_breaks_blames_nobody_and_keeps_the_order(
    broker: RabbitMQBroker, transport: RabbitMQTransport
) -> None:
    through = broker.client()
    await through.connect()
    source = await ordered(through)
    await publish(transport, *numbered(20))
    held = await take(source, 5)
    await until(lambda: len(source._hand.unsettled()) == 20)  # what is on its way is suspected
    await source.settle([], [Settlement(held[0], "retry", delay=1.0)])
    await source.settle([], [Settlement(message, "park") for message in held[1:]])
    await source.flush()
    await broker.expire(source)
    again = await take(source, 20)
    assert bodies(again) == numbered(20)
    assert not [message.body for message in again if message.suspect]
    await through.aclose()


@pytest.mark.slow
async def test_what_a_killed_process_leaves_is_handled_by_the_next_in_order(
    broker: RabbitMQBroker, transport: RabbitMQTransport, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    ledger.touch()
    keys, each = [f"key-{number}" for number in range(8)], 40
    processes = [worker(broker, ledger) for _ in range(2)]

    def ended() -> int:
        return ledger.read_text().count("end ")

    try:
        for number in range(each):
            await transport.publish([Outgoing("t", b"%d" % number, key) for key in keys])
        for share in (30, 120, 200):
            await until(lambda share=share: ended() >= share, PATIENCE)  # type: ignore[misc]
            active = int(ledger.read_text().splitlines()[-1].split()[1])
            victim = next(one for one in processes if one.pid == active)
            processes.remove(victim)
            victim.kill()
            victim.wait()
            processes.append(worker(broker, ledger))
            await until(lambda share=share: ended() >= share + 40, PATIENCE)  # type: ignore[misc]
            active = int(ledger.read_text().splitlines()[-1].split()[1])
            leaving = next(one for one in processes if one.pid == active)
            processes.remove(leaving)
            leaving.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(leaving.wait, 30) == 0
            processes.append(worker(broker, ledger))
        await until(lambda: firsts(ledger) == {key: list(range(each)) for key in keys}, PATIENCE)
        for process in processes:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert await asyncio.to_thread(counts, broker) == 0


def worker(broker: RabbitMQBroker, ledger: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.transports.redis_order_worker", broker.url(), str(ledger)])


def firsts(ledger: Path) -> dict[str, list[int]]:
    """The numbers of each key in the order in which they were first handled to the end, over all processes."""
    found: dict[str, dict[int, None]] = {}
    for line in ledger.read_text().splitlines():
        word, _, key, number = line.split()
        if word == "end":
            found.setdefault(key, {})[int(number)] = None
    return {key: list(numbers) for key, numbers in found.items()}


@pytest.mark.slow
async def test_one_poison_message_of_a_key_costs_one_dead_letter_and_keeps_the_order_of_all_keys(
    broker: RabbitMQBroker, transport: RabbitMQTransport, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    ledger.touch()
    keys, each = [f"key-{number}" for number in range(5)], 20
    for number in range(each):
        await transport.publish([Outgoing("t", b"%d" % number, key) for key in keys])
        if number == 8:
            await transport.publish([Outgoing("t", b"poison", keys[2])])
    processes = [poisoned(broker, ledger) for _ in range(2)]
    letters: list[bytes] = []
    try:
        deadline = time.monotonic() + 120
        while not letters or firsts(ledger) != {key: list(range(each)) for key in keys}:
            assert time.monotonic() < deadline, (letters, firsts(ledger))
            for index, process in enumerate(processes):
                if process.poll() is not None:
                    assert process.returncode == -signal.SIGKILL
                    processes[index] = poisoned(broker, ledger)
            await asyncio.sleep(0.2)
            letters = [stored.body async for stored in transport.browse("t.g.dead")]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert letters == [b"poison"]
    starts = Counter(line.split()[3] for line in ledger.read_text().splitlines() if line.startswith("start"))
    assert 3 <= starts["poison"] <= 5


def poisoned(broker: RabbitMQBroker, ledger: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.transports.redis_order_worker", broker.url(), str(ledger), "poison"]
    return subprocess.Popen(command)


# -- with and without ----------------------------------------------------------------------------------------------


async def test_a_queue_that_was_made_without_order_cannot_get_one_and_the_error_says_what_to_do(
    transport: RabbitMQTransport,
) -> None:
    await transport.ensure([subscription("before", ordered=False)], create=True)
    (finding,) = await transport.ensure([subscription("before")], create=True)
    assert finding.level == "error"
    assert "was made without order_by" in finding.text
    assert "delete the queue" in finding.text


async def test_a_consumer_without_order_takes_from_a_queue_that_has_one_and_the_log_says_so(
    broker: RabbitMQBroker, transport: RabbitMQTransport, caplog: pytest.LogCaptureFixture
) -> None:
    await publish(transport, *numbered(30))
    async with connected(broker) as elsewhere:
        source = await elsewhere.subscribe(subscription(ordered=False))
        got: list[Message[Any]] = []
        while len(got) < 30:
            got += await take(source, 1)
            await source.settle(got[-1:], [])
    assert bodies(got) == numbered(30)
    assert any("was made for order_by" in record.getMessage() for record in caplog.records)
