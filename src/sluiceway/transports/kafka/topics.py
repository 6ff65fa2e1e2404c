"""Topics: which there are, where a group begins in them, and what was removed from those that can be browsed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from ..._decisions.commit_metadata import NOTHING, decode
from ..._decisions.offsets import Offsets
from ...errors import TransportError
from ...source import Start
from .settings import Settings

PATIENCE = 10.0  # seconds that one question to the brokers may take
REMOVED = "sluiceway-removed"  # the group whose offsets say what was removed: Kafka can delete no single record
_FOREVER = {"retention.ms": "-1", "cleanup.policy": "delete"}
_SOON = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.UNKNOWN_TOPIC_OR_PART)
_SELDOM = ("retry", "dead")  # last words of topics whose records nobody but us may end


class Topics:
    """Asks and makes. All of it blocks, so it runs on threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._admin = AdminClient(settings.client())
        self._known: set[str] = set()
        self._making = threading.Lock()

    def look(self) -> Mapping[str, int]:
        """All topics, and how many partitions each has."""
        found = self._ask(lambda: self._admin.list_topics(timeout=PATIENCE)).topics
        self._known = set(found)
        return {name: len(topic.partitions) for name, topic in found.items()}

    def forget(self, name: str) -> None:
        self._known.discard(name)

    def are_known(self, names: Iterable[str]) -> bool:
        return self._known.issuperset(names)

    def cover(self, names: Iterable[str]) -> list[str]:
        """Make those that are not there, if that is allowed; returns those that are missing then."""
        with self._making:
            if self.are_known(names):
                return []
            there = self.look()
            missing = sorted(set(names) - there.keys())
            if missing and self._settings.create:
                self._make(missing)
                return []
            return missing

    def _make(self, names: Sequence[str]) -> None:
        new = [
            NewTopic(
                name,
                self._settings.partitions,
                self._settings.replicas,
                config=_FOREVER if name.rpartition(".")[2] in _SELDOM else {},
            )
            for name in names
        ]
        for name, future in self._admin.create_topics(new, operation_timeout=PATIENCE).items():
            try:
                future.result(PATIENCE)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise TransportError(f"cannot make the topic {name!r}: {_text(error)}") from error
        self._known.update(names)

    def identities(self, names: Sequence[str], *, patience: float = PATIENCE) -> dict[str, str]:
        """The ids of topics: one that is made anew has another. Raises TransportError for one that is not there, and
        when nobody answers for `patience` seconds."""
        futures = self._admin.describe_topics(TopicCollection(list(names)), request_timeout=patience)
        return {
            name: str(self._ask(lambda future=future: future.result(PATIENCE)).topic_id)
            for name, future in futures.items()
        }

    def begin(self, group: str, starts: Mapping[str, Start]) -> None:
        """Commit where a group begins in topics that it has not met, unless it has members: they do it then."""
        consumer = Consumer(self._settings.consumer(group))
        try:
            there = self.look()
            asked = [TopicPartition(name, one) for name in starts for one in range(there.get(name, 0))]
            found = self._ask(lambda: consumer.committed(asked, timeout=PATIENCE)) if asked else []
            met = {one.topic for one in found if one.offset >= 0}
            new = [one for one in found if one.offset < 0]
            if new:
                begun = [
                    TopicPartition(one.topic, one.partition, offset)
                    for one, offset in begin_at(
                        consumer, new, {n: "earliest" if n in met else s for n, s in starts.items()}
                    )
                ]
                consumer.commit(offsets=begun, asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() not in (KafkaError.UNKNOWN_MEMBER_ID, KafkaError.ILLEGAL_GENERATION):
                raise TransportError(f"cannot say where group {group!r} begins: {_text(error)}") from error
        finally:
            consumer.close()

    def removed(self, where: TopicPartition) -> Offsets:
        """Which offsets of a partition were removed: those that are finished. Raises TransportError."""
        identity = self.identities([where.topic])[where.topic]
        consumer = Consumer(self._settings.consumer(REMOVED))
        try:
            (found,) = self._ask(lambda: consumer.committed([where], timeout=PATIENCE))
        finally:
            consumer.close()
        told = decode(found.metadata, found.offset, f"{identity} {where.partition}")
        return Offsets(0 if told is NOTHING else found.offset, told)

    def close(self) -> None:
        """Give up the connections. Nothing may be asked any more."""
        del self._admin

    def delete_before(self, offsets: Sequence[TopicPartition]) -> None:
        """Free the records below these offsets."""
        for future in self._admin.delete_records(list(offsets), request_timeout=PATIENCE).values():
            self._ask(lambda future=future: future.result(PATIENCE))

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except KafkaException as error:
            raise TransportError(f"{self._settings.where()} does not say: {_text(error)}") from error


def ends(consumer: Consumer, where: TopicPartition) -> tuple[int, int]:
    """The first offset of a partition and the one after its last. One that was just made, or whose leader moves, has
    some time to have a leader. Raises KafkaException."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            low, high = consumer.get_watermark_offsets(where, timeout=PATIENCE)
            return low, high
        except KafkaException as error:
            if error.args[0].code() not in _SOON or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def begin_at(
    consumer: Consumer, asked: Sequence[TopicPartition], starts: Mapping[str, Start]
) -> list[tuple[TopicPartition, int]]:
    """The offsets at which to begin. Raises KafkaException."""
    found: list[tuple[TopicPartition, int]] = []
    for one in asked:
        low, high = ends(consumer, one)
        start = starts.get(one.topic, "earliest")
        offset = high if start == "latest" else low
        if isinstance(start, datetime):
            at = TopicPartition(one.topic, one.partition, int(start.timestamp() * 1000))
            (since,) = consumer.offsets_for_times([at], timeout=PATIENCE)
            offset = since.offset if since.offset >= 0 else high
        found.append((one, offset))
    return found


def _text(error: KafkaException) -> str:
    return str(error.args[0].str())
