"""What rests in topics: shown, removed, counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from ..._decisions.commit_metadata import decode
from ...errors import OptionError, TransportError
from ...message import Stored
from ...source import Backlog, Subscription
from .partition import is_there
from .settings import Settings
from .topics import PATIENCE, REMOVED, Topics, ends
from .wire import read_record, retry_topic, topic_name

_PAGE = 200


class Shelf:
    """All of it blocks, so it runs on threads."""

    def __init__(self, settings: Settings, topics: Topics) -> None:
        self._settings = settings
        self._topics = topics

    def page(self, topic: str, after: str | None) -> list[Stored]:
        """The next records of a topic, oldest first within each partition."""
        name = topic_name(self._settings.prefix, topic)
        first, behind = _position(after) if after is not None else (0, -1)
        found: list[Stored] = []
        consumer = self._consumer(REMOVED)
        try:
            for number in range(first, self._topics.look().get(name, 0)):
                begin = behind + 1 if number == first else 0
                found += self._read(consumer, topic, TopicPartition(name, number), begin, _PAGE - len(found))
                if len(found) >= _PAGE:
                    break
        except KafkaException as error:
            raise TransportError(f"reading {topic!r}: {error.args[0].str()}") from error
        finally:
            consumer.close()
        return found

    def _read(self, consumer: Consumer, topic: str, where: TopicPartition, begin: int, most: int) -> list[Stored]:
        low, high = ends(consumer, where)
        at = max(low, begin)
        if at >= high:
            return []
        gone = self._topics.removed(where)
        consumer.assign([TopicPartition(where.topic, where.partition, at)])
        found: list[Stored] = []
        while at < high and len(found) < most:
            raw = consumer.poll(PATIENCE)
            if raw is None:
                break
            error = raw.error()
            if error is not None:
                raise KafkaException(error)
            offset = raw.offset() or 0
            at = offset + 1
            if offset < high and is_there(gone, offset):
                found.append(_stored(topic, where.partition, raw))
        return found

    def _identity(self, where: TopicPartition) -> str:
        return f"{self._topics.identities([where.topic])[where.topic]} {where.partition}"

    def remove(self, stored: Sequence[Stored]) -> None:
        """Write down that these are removed, and free those that are the first of their partition."""
        by_partition: dict[TopicPartition, list[int]] = {}
        for one in stored:
            number, offset = _position(one.position)
            name = topic_name(self._settings.prefix, one.topic)
            by_partition.setdefault(TopicPartition(name, number), []).append(offset)
        consumer = self._consumer(REMOVED)
        try:
            for where, offsets in by_partition.items():
                self._remove(consumer, where, offsets)
        except KafkaException as error:
            raise TransportError(f"removing records: {error.args[0].str()}") from error
        finally:
            consumer.close()

    def _remove(self, consumer: Consumer, where: TopicPartition, offsets: Sequence[int]) -> None:
        low, high = ends(consumer, where)
        gone = self._topics.removed(where)
        begin = gone.position
        gone.take(range(begin, high))
        gone.finish(range(begin, low))
        gone.finish(offsets)
        commit = gone.commit(self._identity(where), 0)
        if commit is None:
            raise TransportError(
                f"{where.topic}: too many single records are removed between others that stay; remove the oldest first"
            )
        done = [TopicPartition(where.topic, where.partition, commit.offset, metadata=commit.metadata)]
        consumer.commit(offsets=done, asynchronous=False)
        if commit.offset > low:
            self._topics.delete_before([TopicPartition(where.topic, where.partition, commit.offset)])

    def backlog(self, subscription: Subscription, held: int) -> Backlog:
        """What waits for a group, as its commits say."""
        settings, group = self._settings, subscription.group
        consumer = self._consumer(group)
        main = retries = 0
        seconds = 0.0
        try:
            there = self._topics.look()
            for topic in subscription.topics:
                for where, count in self._behind(consumer, topic_name(settings.prefix, topic), there):
                    main += count
                    seconds = max(seconds, _age(consumer, where)) if count > 0 else seconds
                waiting = self._behind(consumer, topic_name(settings.prefix, retry_topic(topic, group)), there)
                retries += sum(count for _, count in waiting)
        except KafkaException as error:
            raise TransportError(f"asking how far group {group!r} is: {error.args[0].str()}") from error
        finally:
            consumer.close()
        return Backlog(max(0, main + retries - held), seconds if main > held else 0.0)

    def _behind(self, consumer: Consumer, name: str, there: Any) -> list[tuple[TopicPartition, int]]:
        """The first offset of each partition that is not finished, and how many there are."""
        asked = [TopicPartition(name, number) for number in range(there.get(name, 0))]
        if not asked:
            return []
        identity = self._topics.identities([name])[name]
        found: list[tuple[TopicPartition, int]] = []
        for one in consumer.committed(asked, timeout=PATIENCE):
            low, high = ends(consumer, TopicPartition(name, one.partition))
            told = decode(one.metadata, one.offset, f"{identity} {one.partition}")
            finished = sum(length for length, known in told.runs if known is True)
            first = max(low, one.offset)
            found.append((TopicPartition(name, one.partition, first), max(0, high - first - finished)))
        return found

    def _consumer(self, group: str) -> Consumer:
        return Consumer(self._settings.consumer(group))


def _age(consumer: Consumer, where: TopicPartition) -> float:
    """Seconds since the record there was published."""
    consumer.assign([where])
    raw = consumer.poll(PATIENCE)
    if raw is None or raw.error() is not None:
        return 0.0
    return max(0.0, time.time() - read_record(raw).timestamp)


def _stored(topic: str, partition: int, raw: Any) -> Stored:
    record = read_record(raw)
    name = record.envelope.id or f"{raw.topic()}-{partition}-{record.offset}"
    where = f"{partition}:{record.offset}"
    return Stored(where, topic, record.body, name, record.key, record.envelope.headers, record.timestamp)


def _position(position: str) -> tuple[int, int]:
    partition, _, offset = position.partition(":")
    if not (partition.isdigit() and offset.isdigit()):
        raise OptionError(f"{position!r} is no position in a Kafka topic; use one that browse showed")
    return int(partition), int(offset)
