"""Reading by demand: as much as is asked for, and a little ahead; what nobody asks for is paused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from confluent_kafka import Consumer, KafkaError, TopicPartition

from .books import Books
from .partition import Partition, is_there
from .wire import Record, read_record

NAP = 0.05  # seconds for which nothing but a commit's end or a record is noticed
PAUSE_AFTER = 0.1  # seconds without demand after which a partition is paused: that throws away what was fetched
AHEAD = 1_000  # records that are read of a partition before anyone asks for them
AHEAD_BYTES = 8 * 1024 * 1024  # and their bytes, by the largest body that came lately
AT_ONCE = 500  # records that are read in one go


class Owner(Protocol):
    """What is asked of the member."""

    group: str

    def sleep(self, seconds: float) -> None: ...
    def is_called(self) -> bool: ...
    def begin_anew(self, p: Partition) -> None: ...
    def forward(self, p: Partition, record: Record) -> None: ...
    def has_news(self, error: KafkaError | None) -> None: ...


class Reader:
    def __init__(self, owner: Owner, consumer: Consumer, books: Books) -> None:
        self._owner = owner
        self._consumer = consumer
        self._books = books
        self._largest = 64 * 1024  # bytes of the largest body that came lately
        self._nap = 0.001
        self._wanted_at = 0.0
        self._polled_at = 0.0

    def be_quick(self) -> None:
        """Something happens: look again soon."""
        self._nap = 0.001

    def read(self) -> None:
        now = time.time()
        missing, wait = self._look(now)
        self._pause_and_resume()
        if missing:
            records = self._consumer.consume(min(missing, AT_ONCE, max(1, self._most_bytes // self._largest)), 0)
        elif time.monotonic() - self._polled_at > NAP:
            records = self._one(0)  # for what happens to the member; a record that comes along is kept
        else:
            records = []
        if not records and wait > 0 and not self._owner.is_called():
            if missing and not self._books.in_hand:
                records = self._one(min(wait, NAP))
            else:
                self._owner.sleep(min(wait, self._nap if missing else NAP))
                self._nap = min(0.02, self._nap * 1.5)
        if records:
            self._nap = 0.001
            self._came(records)

    def _one(self, seconds: float) -> list[Any]:
        record = self._consumer.poll(seconds)
        self._polled_at = time.monotonic()
        return [] if record is None else [record]

    @property
    def _most_bytes(self) -> int:
        return min((ask.max_bytes for ask in self._books.asks), default=1)

    def _look(self, now: float) -> tuple[int, float]:
        """How many more records are asked for, and for how long there is nothing else to do."""
        wait = NAP
        missing = 0
        for ask in self._books.asks:
            ready = 0
            for p in self._books.partitions.values():
                if p.topic in ask.topics and (due := p.next_due()) is not None:
                    wait = min(wait, due - now)
                    ready += 0 if p.retries else len(p.ready)
            missing += max(0, ask.demand - ready)
        if self._books.dirty:
            wait = min(wait, self._books.commit_again - time.monotonic())
        return missing, wait

    def _pause_and_resume(self) -> None:
        """Only what is asked for is read. One that is paused and resumed fetches again, so it takes a moment."""
        now = time.monotonic()
        wanted = {topic for ask in self._books.asks for topic in ask.topics}
        if wanted:
            self._wanted_at = now
        for p in self._books.partitions.values():
            if p.retries or p.topic in wanted:
                pause = self._is_ahead(p) or p.blocked
            else:
                pause = bool(p.ready) and (p.paused or now - self._wanted_at > PAUSE_AFTER or self._is_ahead(p))
            if pause != p.paused and not p.leaving:
                p.paused = pause
                (self._consumer.pause if pause else self._consumer.resume)([TopicPartition(p.name, p.number)])

    def _is_ahead(self, p: Partition) -> bool:
        return len(p.ready) >= min(AHEAD, max(1, AHEAD_BYTES // self._largest))

    def _came(self, raws: Sequence[Any]) -> None:
        by_partition: dict[tuple[str, int], list[Record]] = {}
        largest = 0
        for raw in raws:
            error = raw.error()
            if error is not None:
                self._owner.has_news(error)
                continue
            record = read_record(raw)
            largest = max(largest, len(record.body))
            by_partition.setdefault((raw.topic(), raw.partition()), []).append(record)
        self._largest = max(1, largest, self._largest // 2)
        if by_partition:
            self._owner.has_news(None)
        for where, records in by_partition.items():
            p = self._books.partitions.get(where)
            if p is None:
                continue
            try:
                self._put(p, p.came(records))
            except ValueError:
                self._owner.begin_anew(p)

    def _put(self, p: Partition, records: Sequence[Record]) -> None:
        now = time.time()
        for record in records:
            elsewhere = record.envelope.group not in (None, self._owner.group)
            if elsewhere or (p.removed is not None and not is_there(p.removed, record.offset)):
                p.finish(record.offset)
            elif p.retries:
                p.put(record, record.due if record.due > now else 0.0)
            elif record.due > now:
                self._owner.forward(p, record)
            else:
                p.put(record)
