"""What a member is given and what is taken away from it. All of it runs inside its thread's polls."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import count
from typing import Protocol

from confluent_kafka import Consumer, KafkaException, TopicPartition

from ..._decisions.commit_metadata import NOTHING, decode
from ..._decisions.offsets import Offsets
from ..._decisions.topics import is_dead_letter_topic
from ...errors import TransportError
from ...source import Start
from .books import Books
from .partition import Partition
from .topics import PATIENCE, Topics, begin_at

log = logging.getLogger("sluiceway.kafka")

LOOK = 5.0  # seconds between looks at the ids of topics
MOST_WAIT = 10.0  # seconds that a partition which is taken away may wait for what runs

_OURS = "sluiceway"  # how metadata begins that we wrote


class Owner(Protocol):
    """What is asked of the member."""

    group: str
    topics: Topics
    consumer: Consumer
    session_timeout: float
    books: Books
    ended: bool

    def place(self, name: str) -> tuple[str, bool, Start]: ...
    def was_given(self, partitions: int) -> None: ...
    def tell_revoked(self, partitions: Sequence[Partition], seconds: float | None) -> None: ...
    def settle_for(self, seconds: float) -> None: ...
    def has_trouble(self, what: str) -> None: ...


class Joining:
    def __init__(self, member: Owner) -> None:
        self._member = member
        self._generations = count(1)
        self._met: set[str] = set()  # topics of which something was committed before
        self._looked_at = time.monotonic()

    def on_assign(self, consumer: Consumer, given: Sequence[TopicPartition]) -> None:
        """Begin where the group is, and write down where it begins in what it has not met."""
        member = self._member
        if given:
            begun = [self._begin(consumer, one) for one in self._committed(consumer, given)]
            for one in begun:
                member.books.partitions[one.name, one.number] = one
            begin = [TopicPartition(p.name, p.number, p.offsets.position) for p in begun]
            consumer.incremental_assign(begin)
            consumer.resume(begin)  # one that was paused when it was lost would be paused still
        member.was_given(len(given))

    def _committed(self, consumer: Consumer, given: Sequence[TopicPartition]) -> Sequence[TopicPartition]:
        while True:
            try:
                self._logs = self._member.topics.identities(sorted({one.topic for one in given}))
                return consumer.committed(list(given), timeout=PATIENCE)
            except Exception as error:  # whatever it is: to begin elsewhere would lose messages
                self._member.has_trouble(f"asking where group {self._member.group!r} is: {error}; trying again")
                if self._member.ended:
                    raise
                time.sleep(0.5)

    def _begin(self, consumer: Consumer, one: TopicPartition) -> Partition:
        topic, retries, start = self._member.place(one.topic)
        identity = f"{self._logs[one.topic]} {one.partition}"
        offset, told = one.offset, NOTHING
        if offset >= 0:
            self._met.add(one.topic)
            told = decode(one.metadata, offset, identity)
            if told is NOTHING and (one.metadata or "").startswith(_OURS):
                log.warning("%s was made anew since group %r was there; it begins at its first record", one.topic,
                            self._member.group)  # fmt: skip
                offset = -1
                start = "earliest"
        if offset < 0:
            first: Start = "earliest" if one.topic in self._met else start
            offset = begin_at(consumer, [one], {one.topic: first})[0][1]
        offsets = Offsets(offset, told)
        made = Partition(topic, one.topic, one.partition, next(self._generations), identity, offsets, retries=retries)
        if is_dead_letter_topic(topic):
            made.removed = self._member.topics.removed(TopicPartition(one.topic, one.partition))
        return made

    def on_revoke(self, consumer: Consumer, taken: Sequence[TopicPartition]) -> None:
        """Let what runs finish, for a while, commit, and let go."""
        member = self._member
        leaving = [p for one in taken if (p := member.books.partitions.get((one.topic, one.partition))) is not None]
        for p in leaving:
            p.leaving = True
        seconds = min(MOST_WAIT, member.session_timeout / 2)
        if any(p.hand for p in leaving):
            member.tell_revoked(leaving, seconds)
            deadline = time.monotonic() + seconds
            while any(p.hand for p in leaving) and time.monotonic() < deadline and not member.ended:
                member.settle_for(0.02)
        for p in leaving:
            p.give_back()
        member.books.commit_all(leaving)
        self._drop(leaving)
        consumer.incremental_unassign(list(taken))

    def on_lost(self, consumer: Consumer, taken: Sequence[TopicPartition]) -> None:
        """They are others' already: nothing may be committed."""
        member = self._member
        lost = [p for one in taken if (p := member.books.partitions.get((one.topic, one.partition))) is not None]
        log.warning("group %r has lost %d partitions: this member was not heard of for %g s; what is in hand of them"
                    " comes again elsewhere", member.group, len(lost), member.session_timeout)  # fmt: skip
        member.tell_revoked(lost, None)
        self._drop(lost)
        consumer.incremental_unassign(list(taken))

    def _drop(self, partitions: Sequence[Partition]) -> None:
        for p in partitions:
            del self._member.books.partitions[p.name, p.number]
            self._member.books.is_gone(p)

    def look_around(self) -> None:
        """Now and then, whether a topic was deleted and made anew: reading goes on silently where it was in the old
        one, behind records of the new one."""
        now = time.monotonic()
        if now - self._looked_at < LOOK:
            return
        self._looked_at = now
        partitions = list(self._member.books.partitions.values())
        try:
            logs = self._member.topics.identities(sorted({p.name for p in partitions}), patience=1.0)
        except TransportError as error:  # one may be deleted, and not be there again
            log.debug("group %r asks for the ids of its topics: %s", self._member.group, error)
            return
        for p in partitions:
            if p.log != f"{logs[p.name]} {p.number}":
                self.begin_anew(p)

    def begin_anew(self, p: Partition) -> None:
        """The log is another one, or has lost its end: go on at its first record."""
        log.warning("%s, partition %d, is not the log that it was; group %r goes on at its first record", p.name,
                    p.number, self._member.group)  # fmt: skip
        member = self._member
        member.tell_revoked([p], None)
        self._drop([p])
        try:
            self._logs = member.topics.identities([p.name])
            new = self._begin(member.consumer, TopicPartition(p.name, p.number, -1001))
            member.consumer.seek(TopicPartition(p.name, p.number, new.offsets.position))
        except KafkaException as error:
            member.has_trouble(f"going on in {p.name}: {error}")
            return
        new.paused = p.paused
        member.books.partitions[p.name, p.number] = new
