"""Kafka clients compared: loops written by hand over each of them, that read 200-byte JSON, decode it and commit.

`python -m bench.clients.kafka` starts a broker of its own on loopback. What is not importable is left out, with how to
install it. Each loop reads the same topic in a group of its own, from when its partitions are assigned to its last
commit. `poll` takes one record at a time; `stored` leaves the commits to librdkafka, which does them every 5 seconds,
so none is waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from ..payload import decode, encode, order
from ..servers import server

TOPIC = "orders"
BODIES = [encode(order(number)) for number in range(10_000)]

_groups = (f"bench-{number}" for number in itertools.count())


def _consumer(servers: str, **more: Any) -> tuple[Consumer, list[float]]:
    """A consumer of a group of its own, and when its partitions were assigned."""
    began: list[float] = []
    consumer = Consumer({
        "bootstrap.servers": servers, "group.id": next(_groups), "auto.offset.reset": "earliest",
        "enable.auto.commit": False, "log_level": 2, **more,
    })  # fmt: skip
    consumer.subscribe([TOPIC], on_assign=lambda *_: began.append(time.perf_counter()))
    return consumer, began


def _value(record: Any) -> bytes:
    if record.error() is not None:
        raise RuntimeError(record.error().str())
    value: bytes = record.value()
    return value


def consume(servers: str, count: int, total: int, *, wait: bool = True) -> float:
    """`consume(count)` and a commit per batch, which is waited for."""
    consumer, began = _consumer(servers)
    done = 0
    while done < total:
        records = consumer.consume(count, 1.0)
        for record in records:
            decode(_value(record))
        done += len(records)
        if records:
            consumer.commit(asynchronous=not wait and done < total)
    elapsed = time.perf_counter() - began[0]
    consumer.close()
    return elapsed


def consume_behind(servers: str, count: int, total: int) -> float:
    """The same, but only the last commit is waited for: the others are on their way while the next batch is decoded."""
    return consume(servers, count, total, wait=False)


def poll(servers: str, count: int, total: int) -> float:
    """One at a time, with a commit for each `count`."""
    consumer, began = _consumer(servers)
    done = 0
    while done < total:
        record = consumer.poll(1.0)
        if record is None:
            continue
        decode(_value(record))
        done += 1
        if done % count == 0:
            consumer.commit(asynchronous=False)
    elapsed = time.perf_counter() - began[0]
    consumer.close()
    return elapsed


def stored(servers: str, count: int, total: int) -> float:
    """`consume(count)`; the offsets are stored, and committed by librdkafka's own clock."""
    consumer, began = _consumer(servers, **{"enable.auto.commit": True, "enable.auto.offset.store": False})
    done = 0
    while done < total:
        records = consumer.consume(count, 1.0)
        for record in records:
            decode(_value(record))
            consumer.store_offsets(record)
        done += len(records)
    elapsed = time.perf_counter() - began[0]
    consumer.close()
    return elapsed


async def aio(servers: str, count: int, total: int) -> float:
    """confluent-kafka's own asyncio consumer: each call goes to a thread."""
    from confluent_kafka.aio import AIOConsumer

    began: list[float] = []

    async def on_assign(*_: object) -> None:
        began.append(time.perf_counter())

    consumer = AIOConsumer({
        "bootstrap.servers": servers, "group.id": next(_groups), "auto.offset.reset": "earliest",
        "enable.auto.commit": False, "log_level": 2,
    })  # fmt: skip
    await consumer.subscribe([TOPIC], on_assign=on_assign)
    done = 0
    while done < total:
        records = await consumer.consume(count, 1.0)
        for record in records:
            decode(_value(record))
        if records:
            await consumer.commit(asynchronous=False)
        done += len(records)
    elapsed = time.perf_counter() - began[0]
    await consumer.close()
    return elapsed


async def aiokafka(servers: str, count: int, total: int) -> float:
    """`getmany` and a commit per batch."""
    import aiokafka as library

    class Assigned(library.ConsumerRebalanceListener):  # type: ignore[misc]
        began = 0.0

        def on_partitions_revoked(self, revoked: object) -> None:
            """Nothing to do."""

        def on_partitions_assigned(self, assigned: object) -> None:
            self.began = time.perf_counter()

    listener = Assigned()
    consumer = library.AIOKafkaConsumer(
        bootstrap_servers=servers, group_id=next(_groups), auto_offset_reset="earliest", enable_auto_commit=False
    )
    consumer.subscribe([TOPIC], listener=listener)
    await consumer.start()
    done = 0
    while done < total:
        found = await consumer.getmany(timeout_ms=1000, max_records=count)
        for records in found.values():
            for record in records:
                decode(record.value)
            done += len(records)
        if found:
            await consumer.commit()
    elapsed = time.perf_counter() - listener.began
    await consumer.stop()
    return elapsed


CLIENTS: dict[str, tuple[str, Callable[[str, int, int], float | Awaitable[float]]]] = {
    "confluent-kafka, consume": ("confluent_kafka", consume),
    "confluent-kafka, consume, commits behind": ("confluent_kafka", consume_behind),
    "confluent-kafka, consume, stored": ("confluent_kafka", stored),
    "confluent-kafka, poll": ("confluent_kafka", poll),
    "confluent-kafka, AIOConsumer": ("confluent_kafka", aio),
    "aiokafka": ("aiokafka", aiokafka),
}


def fill(servers: str, total: int, partitions: int) -> None:
    admin = AdminClient({"bootstrap.servers": servers})
    admin.create_topics([NewTopic(TOPIC, partitions, 1)], operation_timeout=10)[TOPIC].result(10)
    producer = Producer({"bootstrap.servers": servers, "linger.ms": 20, "queue.buffering.max.messages": total})
    for number in range(total):
        producer.produce(TOPIC, BODIES[number % len(BODIES)], partition=number % partitions)
    if producer.flush(60):
        raise SystemExit("the topic was not filled within a minute")


def measure(run: Callable[..., Any], servers: str, count: int, total: int) -> tuple[float, float]:
    """Messages/s, and µs of this process's CPU per message, librdkafka's threads with it."""
    cpu = time.process_time()
    made = run(servers, count, total)
    elapsed = asyncio.run(made) if asyncio.iscoroutine(made) else made
    return total / elapsed, (time.process_time() - cpu) / total * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measures of each client, in turn; the median is shown")
    parser.add_argument("--count", type=int, default=500, help="messages per batch")
    parser.add_argument("--total", type=int, default=100_000, help="messages in the topic")
    parser.add_argument("--partitions", type=int, default=1)
    given = parser.parse_args()
    present = {}
    for name, (module, run) in CLIENTS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: not installed; to measure it: pip install {module}")
        else:
            present[name] = run
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in present}
    with tempfile.TemporaryDirectory() as folder, server("kafka", Path(folder)) as url:
        servers = url.removeprefix("kafka://")
        fill(servers, given.total, given.partitions)
        for _ in range(given.rounds):
            for name, run in present.items():
                figures[name].append(measure(run, servers, given.count, given.total))
    print(f"{'client':44} {'messages/s':>12} {'CPU µs/message':>16}")
    for name, pairs in figures.items():
        rate, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:44} {rate:12,.0f} {cpu:16.1f}")


if __name__ == "__main__":
    main()
