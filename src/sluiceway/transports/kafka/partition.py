"""A partition that is ours: what has come, what is in hand, what is finished and not committed yet."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

from ..._decisions.commit_metadata import Note
from ..._decisions.offsets import Commit, Offsets
from ..._decisions.suspicion import is_suspect
from ...message import Message
from .requests import End, Settling, Token
from .wire import Record, make_message


class Held(NamedTuple):
    record: Record
    delivery: int
    source: Any


class Partition:
    """`topic` is what its messages are of, `name` what Kafka calls it, `log` the id that commits are sealed with. With
    `retries` it holds copies that wait until they are due, so they are handed out in any order, and each that is gets
    a note: else the metadata says how many may be in hand, and means the first ones."""

    def __init__(
        self, topic: str, name: str, number: int, generation: int, log: str, offsets: Offsets, *, retries: bool
    ):
        self.topic = topic
        self.name = name
        self.number = number
        self.generation = generation
        self.log = log
        self.offsets = offsets
        self.retries = retries
        self.hand: dict[int, Held] = {}
        self.ready: list[tuple[float, int, Record]] = []  # a heap, by when they are due
        self.unconfirmed: set[int] = set()  # hand-overs that have ended, and no commit tells of it
        self.waiters: list[Settling] = []
        self.dirty = True
        self.blocked = False  # there is no room in the metadata to tell more
        self.paused = False
        self.leaving = False  # it is being taken away: nothing more is handed out
        self.removed: Offsets | None = None  # what was removed of dead letters
        self.committed: Commit | None = None
        self._in_hand_unnoted = 0
        self._told_window = 0  # as many were in hand without a note at the last commit

    @property
    def scope(self) -> tuple[str, int, int]:
        return self.name, self.number, self.generation

    def came(self, records: Sequence[Record]) -> list[Record]:
        """Records were read: those that are to be handled. Raises ValueError as `Offsets.take` does."""
        wanted = set(self.offsets.take([record.offset for record in records]))
        for offset in wanted:
            if self.offsets.has_note(offset):
                self._uncount(offset)  # it is counted when it is handed out
        return [record for record in records if record.offset in wanted]

    def put(self, record: Record, due: float = 0.0) -> None:
        heappush(self.ready, (due, record.offset, record))

    def next_due(self) -> float | None:
        """When the next one may be handed out, in seconds since 1970; None when nothing waits."""
        if not self.ready or (self.blocked and self.hand):
            return None
        return self.ready[0][0]

    def hand_out(self, source: Any, delivery: int) -> Message[Any]:
        """Hand out the next one. It may be given to nobody before what is noted of it is committed."""
        _, offset, record = heappop(self.ready)
        offsets = self.offsets
        noted = offsets.has_note(offset)
        if self.retries and not noted:
            said = record.envelope
            before = max(record.deliveries, said.failures + said.suspicions)
            offsets.write(offset, Note(before, said.failures, said.suspicions))
            noted = True
        self.hand[offset] = Held(record, delivery, source)
        message = make_message(record, self.topic, f"{self.name}-{self.number}-{offset}")
        if noted:
            offsets.hand_out(offset)
            note = offsets.note(offset)
            message.deliveries, message.failures, message.suspicions = note
            message.suspect = is_suspect(*note)
            self.dirty = True
        else:
            self._in_hand_unnoted += 1
            self.dirty = self.dirty or self._in_hand_unnoted > self._told_window
        message.scope = self.scope
        message.token = Token(self.name, self.number, self.generation, offset, delivery)
        return message

    def end(self, token: Token, how: End) -> bool:
        """A hand-over ends. False: it had ended, or is not ours."""
        held = self.hand.get(token.offset)
        if held is None or held.delivery != token.delivery:
            return token.delivery in self.unconfirmed
        self.dirty = True
        if how is False:
            return True
        del self.hand[token.offset]
        self.unconfirmed.add(token.delivery)
        noted = self.offsets.has_note(token.offset)
        if not noted:
            self._in_hand_unnoted -= 1
        if how is None:
            self.offsets.finish((token.offset,))
            return True
        if isinstance(how, Note):
            if noted or how != Note(0):
                self.offsets.write(token.offset, how)
        elif noted:
            self._uncount(token.offset)
        self.put(held.record)
        return True

    def write(self, offset: int, note: Note) -> None:
        """Give a record in hand other counts, which are durable when they are committed."""
        if offset in self.hand:
            if not self.offsets.has_note(offset):
                self._in_hand_unnoted -= 1
            self.offsets.write(offset, note)
            self.dirty = True

    def finish(self, offset: int) -> None:
        """A record that was not handed out is none of ours, or is elsewhere for good."""
        self.offsets.finish((offset,))
        self.dirty = True

    def give_back(self, *, keep: frozenset[int] = frozenset()) -> None:
        """Nothing is in hand any more, but for `keep`, deliveries that count as in a dead process's hand."""
        for offset, held in self.hand.items():
            if held.delivery in keep:
                if not self.offsets.has_note(offset):
                    self.offsets.write(offset, Note())
            elif self.offsets.has_note(offset):
                self._uncount(offset)
        self.hand.clear()
        self._in_hand_unnoted = 0
        self.dirty = True

    def commit(self) -> Commit | None:
        """What to commit, if it is news; None also where there is no room to tell it, and then it is `blocked`."""
        found = self.offsets.commit(self.log, self._in_hand_unnoted)
        self.blocked = found is None
        return None if found == self.committed else found

    def is_committed(self, what: Commit | None) -> None:
        """A commit has succeeded, or there was nothing new to tell."""
        if what is not None:
            self.committed = what
            self._told_window = self._in_hand_unnoted
        self.dirty = False
        self.unconfirmed.clear()

    def _uncount(self, offset: int) -> None:
        note = self.offsets.note(offset)
        self.offsets.write(offset, note._replace(deliveries=max(0, note.deliveries - 1)))


def is_there(removed: Offsets, offset: int) -> bool:
    """Whether a record was not removed. Asked for one after the other, upwards."""
    return offset >= removed.position and bool(removed.take((offset,)))
