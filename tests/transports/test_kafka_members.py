"""What is Kafka's own: partitions that come and go, and how far a group's offsets are committed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Producer

from sluiceway._decisions.commit_metadata import decode
from sluiceway.message import Message, Outgoing, Settlement
from sluiceway.source import Source, Subscription
from sluiceway.transports.kafka import KafkaSource, KafkaTransport
from tests.servers.kafka import Kafka, committed
from tests.transports.kafka_kit import SESSION

SOON = 20.0

pytestmark = pytest.mark.xdist_group("kafka-members")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    with Kafka(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    return f"{uuid.uuid4().hex[:8]}."


@pytest.fixture
async def transport(server: Kafka, prefix: str) -> AsyncIterator[KafkaTransport]:
    made = connectable(server, prefix)
    await made.connect()
    yield made
    await made.aclose()


def connectable(server: Kafka, prefix: str, **options: Any) -> KafkaTransport:
    return KafkaTransport(f"127.0.0.1:{server.port}", prefix=prefix, **{"session_timeout": SESSION, **options})


async def subscribe(transport: KafkaTransport, *topics: str, **options: Any) -> KafkaSource:
    return await transport.subscribe(Subscription(topics=topics, group="g", **{"window": 1000, **options}))


async def get(source: Source, count: int) -> list[Message[Any]]:
    messages: list[Message[Any]] = []
    async with asyncio.timeout(SOON):
        while len(messages) < count:
            messages += await source.receive(count - len(messages))
    return messages


async def publish(transport: KafkaTransport, topic: str, count: int, **fields: Any) -> None:
    await transport.publish([Outgoing(topic, b"%d" % number, **fields) for number in range(count)])


def numbers(messages: list[Message[Any]]) -> list[int]:
    return [int(message.body) for message in messages]


async def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def watermark(server: Kafka, prefix: str, topic: str = "t") -> tuple[int, str]:
    found = committed(server.admin(), f"{prefix}g", prefix + topic)
    assert found is not None
    return found


async def test_nothing_is_committed_past_unfinished_work(server: Kafka, prefix: str, transport: KafkaTransport) -> None:
    source = await subscribe(transport, "t")
    await publish(transport, "t", 10)
    messages = await get(source, 10)
    assert watermark(server, prefix)[0] == 0
    await source.settle(messages[3:], [])
    assert watermark(server, prefix)[0] == 0
    await source.settle(messages[:2], [])
    assert watermark(server, prefix)[0] == 2
    await source.settle([messages[2]], [])
    assert watermark(server, prefix)[0] == 10


async def test_before_a_message_is_in_anyones_hand_the_broker_knows_how_many_may_be(
    server: Kafka, prefix: str, transport: KafkaTransport
) -> None:
    source = await subscribe(transport, "t")
    await publish(transport, "t", 10)
    await get(source, 4)
    offset, metadata = watermark(server, prefix)
    (log,) = (p.log for p in source.member.books.partitions.values() if p.name == f"{prefix}t")
    assert decode(metadata, offset, log).window == 4


async def test_what_is_finished_above_unfinished_work_is_not_repeated_after_a_clean_leave(
    server: Kafka, prefix: str, transport: KafkaTransport
) -> None:
    source = await subscribe(transport, "t")
    await publish(transport, "t", 100)
    messages = await get(source, 100)
    await source.settle([one for one in messages if int(one.body) % 10], [])
    await source.aclose()
    again = await get(await subscribe(transport, "t"), 10)
    assert numbers(again) == list(range(0, 100, 10))
    assert all((one.attempt, one.suspect) == (1, False) for one in again)


async def test_a_member_that_leaves_in_good_order_hands_over_without_handling_twice(server: Kafka, prefix: str) -> None:
    clients = [connectable(server, prefix, partitions=4, session_timeout=6.0) for _ in range(2)]
    handled: Counter[int] = Counter()

    async def work(source: KafkaSource) -> None:
        while messages := await source.receive(20):
            await asyncio.sleep(0.01)
            handled.update(numbers(messages))
            assert not await source.settle(messages, [])

    for client in clients:
        await client.connect()
    sources = [await subscribe(clients[0], "t")]
    tasks = [asyncio.create_task(work(sources[0]))]
    await publish(clients[0], "t", 300)
    sources.append(await subscribe(clients[1], "t"))
    tasks.append(asyncio.create_task(work(sources[1])))
    await publish(clients[0], "t", 300)
    await until(lambda: sources[1].status().scopes, "the second has partitions")
    sources[0].stop()
    await tasks[0]
    await sources[0].aclose()
    await publish(clients[1], "t", 300)
    await until(lambda: sum(handled.values()) >= 900, "all are handled")
    sources[1].stop()
    await tasks[1]
    assert handled == Counter(dict.fromkeys(range(300), 3))
    for client in clients:
        await client.aclose()


async def test_a_partition_that_is_taken_away_says_so_and_waits_for_what_runs(server: Kafka, prefix: str) -> None:
    clients = [connectable(server, prefix, partitions=2, session_timeout=6.0) for _ in range(2)]
    for client in clients:
        await client.connect()
    told: list[float | None] = []

    async def revoked(scopes: frozenset[Any], seconds: float | None) -> None:
        told.append(seconds)

    first = await subscribe(clients[0], "t", on_revoke=revoked)
    await publish(clients[0], "t", 20)
    messages = await get(first, 20)
    second = asyncio.create_task(subscribe(clients[1], "t"))
    await until(lambda: told, "the first hears of it")
    assert told == [3.0]
    assert not await first.settle(messages, [])
    other = await second
    await publish(clients[0], "t", 20)
    seen: list[int] = []
    async with asyncio.timeout(SOON):
        while len(seen) < 20:
            for source in (first, other):
                call = asyncio.ensure_future(source.receive(20))
                await asyncio.wait([call], timeout=0.2)
                source.resize(0)
                got = list(await call)
                source.resize(100)
                seen += numbers(got)
                await source.settle(got, [])
    assert sorted(seen) == list(range(20))
    for client in clients:
        await client.aclose()


async def test_what_was_taken_away_before_it_was_settled_is_refused_as_lost(server: Kafka, prefix: str) -> None:
    clients = [connectable(server, prefix) for _ in range(2)]
    for client in clients:
        await client.connect()
    first = await subscribe(clients[0], "t")
    await publish(clients[0], "t", 3)
    messages = await get(first, 3)
    first.stop()
    await first.aclose()
    second = await subscribe(clients[1], "t")
    again = await get(second, 3)
    assert [one.kind for one in await first.settle(messages, [])] == ["lost"] * 3
    assert watermark(server, prefix)[0] == 0
    assert not await second.settle(again, [])
    for client in clients:
        await client.aclose()


async def test_a_topic_that_was_made_anew_is_read_from_its_first_record(
    server: Kafka, prefix: str, transport: KafkaTransport
) -> None:
    source = await subscribe(transport, "t")
    await publish(transport, "t", 5)
    await source.settle(await get(source, 5), [])
    await source.aclose()
    server.delete(f"{prefix}t")
    server.create(f"{prefix}t")
    await publish(transport, "t", 8)
    assert numbers(await get(await subscribe(transport, "t"), 8)) == list(range(8))


async def test_a_topic_that_is_made_anew_under_a_source_is_read_from_its_first_record(
    server: Kafka, prefix: str, transport: KafkaTransport
) -> None:
    source = await subscribe(transport, "t")
    await publish(transport, "t", 5)
    await source.settle(await get(source, 5), [])
    server.delete(f"{prefix}t")
    server.create(f"{prefix}t")
    await publish(transport, "t", 8)  # more than there were: offsets alone do not tell that they are others
    seen: set[int] = set()
    async with asyncio.timeout(SOON):
        while seen != set(range(8)):
            messages = await source.receive(8)
            seen.update(numbers(list(messages)))
            await source.settle(messages, [])


async def test_a_dead_letter_that_cannot_be_stored_leaves_its_message_ours(server: Kafka, prefix: str) -> None:
    transport = connectable(server, prefix, create=False)
    for name in ("t", "t.g.retry"):
        server.create(prefix + name)
    await transport.connect()
    source = await subscribe(transport, "t")
    await publish(transport, "t", 1)
    (message,) = await get(source, 1)
    letter = Settlement(message, "dead_letter", outputs=(Outgoing("t.g.dead", b"0"),))
    (refused,) = await source.settle([], [letter])
    assert (refused.kind, refused.message) == ("rejected", message)
    assert "t.g.dead" in refused.detail
    assert watermark(server, prefix)[0] == 0
    server.create(f"{prefix}t.g.dead")
    assert not await source.settle([], [letter])
    assert watermark(server, prefix)[0] == 1
    await transport.aclose()


async def test_a_partition_whose_metadata_is_full_stops_and_goes_on_when_the_first_are_finished(
    server: Kafka, prefix: str, transport: KafkaTransport
) -> None:
    """Every second record stays unfinished: what is finished between them does not fit any more."""
    source = await subscribe(transport, "t", window=20_000)
    count = 9_000
    await publish(transport, "t", count)
    held: dict[int, Message[Any]] = {}
    received = 0
    for _ in range(100):
        call = asyncio.ensure_future(source.receive(500))
        await asyncio.wait([call], timeout=1.0)
        source.resize(0)
        messages = list(await call)
        source.resize(20_000)
        if not messages:
            break
        received += len(messages)
        held |= {int(one.body): one for one in messages if int(one.body) % 2 == 0}
        assert not await source.settle([one for one in messages if int(one.body) % 2], [])
    assert received < count, "it did not stop"
    _, metadata = watermark(server, prefix)
    assert len(metadata) > 3_000
    assert not await source.settle(list(held.values()), [])
    rest = await get(source, count - received)
    assert not await source.settle(rest, [])
    assert watermark(server, prefix)[0] == count


async def test_a_member_that_stood_still_for_longer_than_its_session_loses_nothing(server: Kafka, prefix: str) -> None:
    transport = connectable(server, prefix)
    await transport.connect()
    await transport.ensure([Subscription(topics=("t",), group="g", window=1)], create=True)
    await publish(transport, "t", 300)
    url = f"{server.url()}?prefix={prefix}&session_timeout={SESSION}"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WORK, url, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    handled = {int(await process.stdout.readline()) for _ in range(20)}
    process.send_signal(signal.SIGSTOP)
    source = await subscribe(transport, "t")
    first = await get(source, 20)  # they are ours now
    assert not await source.settle(first, [])
    process.send_signal(signal.SIGCONT)
    ours = set(numbers(first))
    async with asyncio.timeout(SOON):
        theirs = asyncio.ensure_future(_numbers(process.stdout, handled))
        while len(handled | ours) < 300:
            call = asyncio.ensure_future(source.receive(5))
            await asyncio.wait([call], timeout=0.5)
            source.resize(0)
            got = list(await call)
            source.resize(1000)
            ours.update(numbers(got))
            assert not await source.settle(got, [])
            if watermark(server, prefix)[0] == 300:
                break
    process.kill()
    await process.wait()
    await theirs
    assert watermark(server, prefix)[0] == 300
    assert handled | ours == set(range(300))
    await transport.aclose()


async def _numbers(lines: asyncio.StreamReader, into: set[int]) -> None:
    while line := await lines.readline():
        into.add(int(line))


WORK = """
import asyncio, sys
from sluiceway.source import Subscription
from sluiceway.transports.kafka import KafkaTransport

async def main(url):
    transport = KafkaTransport.from_url(url)
    await transport.connect()
    source = await transport.subscribe(Subscription(topics=("t",), group="g", window=10))
    while True:
        for message in await source.receive(5):
            await asyncio.sleep(0.01)
            print(message.body.decode(), flush=True)
            await source.settle([message], [])

asyncio.run(main(sys.argv[1]))
"""

HOLD = """
import asyncio, os, signal, sys
from sluiceway.source import Subscription
from sluiceway.transports.kafka import KafkaTransport

async def main(url, count):
    transport = KafkaTransport.from_url(url)
    await transport.connect()
    source = await transport.subscribe(Subscription(topics=("t",), group="g", window=count))
    held = []
    while len(held) < count:
        held += await source.receive(count - len(held))
    await source.settle([one for one in held if one.body != b"0"], [])
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def test_a_process_that_is_killed_above_a_stuck_record_repeats_only_that(
    server: Kafka, prefix: str, transport: KafkaTransport
) -> None:
    await transport.ensure([Subscription(topics=("t",), group="g", window=1)], create=True)
    await publish(transport, "t", 1_100)
    url = f"{server.url()}?prefix={prefix}&session_timeout={SESSION}"
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", HOLD, url, "1000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    messages = await get(await subscribe(transport, "t"), 101)
    assert numbers(messages) == [0, *range(1_000, 1_100)]
    assert [int(one.body) for one in messages if one.suspect] == [0]


async def test_a_delayed_retry_does_not_hold_up_one_that_is_due_sooner(transport: KafkaTransport) -> None:
    source = await subscribe(transport, "t")
    await publish(transport, "t", 2)
    later, sooner = await get(source, 2)
    await source.settle([], [Settlement(later, "retry", delay=3600)])
    await source.settle([], [Settlement(sooner, "retry", delay=0.2)])
    assert numbers(await get(source, 1)) == [1]


async def test_a_strangers_null_is_an_empty_body_and_its_key_is_the_messages(
    server: Kafka, prefix: str, transport: KafkaTransport
) -> None:
    source = await subscribe(transport, "t")
    producer = Producer({**server.client(), "log_level": 2})
    producer.produce(f"{prefix}t", None, b"k\xff", headers=[("h", None)])
    assert producer.flush(10) == 0
    (message,) = await get(source, 1)
    assert (message.body, message.key, dict(message.headers)) == (b"", "k\udcff", {"h": ""})
