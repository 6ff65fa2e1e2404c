"""Which records of one partition are finished, in any order, and so how far its offset may be committed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .commit_metadata import LIMIT, NOTHING, Note, Run, Told, encode


class Commit(NamedTuple):
    offset: int
    metadata: str


class Offsets:
    """The records of one partition, from when it was assigned until it is taken away.

    Offsets come in increasing order, with gaps: a topic may be compacted, and transactions take offsets for themselves.
    What is kept are the records that are not finished; all others that came are. So a million records that are
    finished behind one that is not cost nothing.

    The owner before, if it died, had records in hand, and nobody knows which. So the first ones that come, as many as
    it might have had, count as handed out before, unless a note says how often they were.
    """

    def __init__(self, start: int, told: Told = NOTHING) -> None:
        """`start`: the committed offset, or where to begin; `told`: what was committed with it."""
        self.position = start
        """The offset from which is read next."""
        self._end = start  # nothing at or above it has come
        self._came = 0  # how many records have
        self._open: dict[int, int] = {}  # what is not finished, in order, and as which record it came
        self._notes: dict[int, Note] = {}
        self._released: set[int] = set()
        self._blamed = told.window  # so many records that come were in hand when the owner before died
        self._told = deque(_placed(start, told.runs))  # what was told of offsets that have not come

    def __len__(self) -> int:
        """How many records are not finished."""
        return len(self._open)

    @property
    def watermark(self) -> int:
        """The offset to commit: the lowest that is not finished, or else the one after all. It never goes back."""
        return next(iter(self._open), self._end)

    @property
    def finished_above(self) -> int:
        """How many records are finished above the watermark."""
        first = next(iter(self._open.values()), self._came)
        return self._came - first - len(self._open)

    def take(self, offsets: Sequence[int]) -> Sequence[int]:
        """Records were read: which of them to hand out. The others are finished, or in hand.

        Those that have a note then are counted as handed out, and nobody may have them before that is committed.
        Raises ValueError for offsets below `position`: the log is not the one that it was, since the topic was made
        anew or has lost its end. Its records are others, though their offsets have been seen.
        """
        if not offsets:
            return offsets
        if offsets[0] < self.position:
            raise ValueError(f"offset {offsets[0]} came where {self.position} or a later one was due")
        if offsets[0] < self._end or self._told or self._blamed:
            wanted: Sequence[int] = [offset for offset in offsets if self._wants(offset)]
        else:
            wanted, came = offsets, self._came
            self._came = came + len(offsets)
            self._open.update(zip(offsets, range(came, self._came), strict=True))
        self.position = offsets[-1] + 1
        self._end = max(self._end, self.position)
        return wanted

    def _wants(self, offset: int) -> bool:
        if offset < self._end:
            if offset not in self._released:
                return False
            self._released.discard(offset)
            self.hand_out(offset)
            return True
        while self._told and self._told[0][1] <= offset:
            self._told.popleft()
        known = self._told[0][2] if self._told and self._told[0][0] <= offset else False
        if known is not True:
            self._open[offset] = self._came
            if known:
                self._notes[offset] = known
            elif self._blamed:
                self._blamed -= 1
                self._notes[offset] = Note()
            self.hand_out(offset)
        self._came += 1
        return known is not True

    def reach(self, offset: int) -> None:
        """Reading has got to this offset, and all records below it have come: at the end of a log of transactions are
        offsets without a record. They may be committed too, or the group would seem to be behind. Never goes back."""
        if self.position == self._end < offset:
            self.position = self._end = offset

    def hand_out(self, offset: int) -> None:
        """It is handed out again, from memory, as after a failure. If it has a note, that is counted."""
        if (note := self._notes.get(offset)) is not None:
            self._notes[offset] = note._replace(deliveries=note.deliveries + 1)

    def finish(self, offsets: Iterable[int]) -> None:
        """They are handled, or are elsewhere for good. Idempotent."""
        forget = self._open.pop
        if not (self._notes or self._released):
            for offset in offsets:
                forget(offset, None)
            return
        for offset in offsets:
            forget(offset, None)
            self._notes.pop(offset, None)
            self._released.discard(offset)

    def release(self, offsets: Iterable[int]) -> None:
        """They are not in hand any more: not counted, and handed out again when they are read again. Idempotent."""
        for offset in offsets:
            if offset in self._open and offset not in self._released:
                self._released.add(offset)
                if (note := self._notes.get(offset)) is not None:
                    self._notes[offset] = note._replace(deliveries=note.deliveries - 1)

    def rewind(self) -> int | None:
        """From where to read again what was released, if anything was; it is `position` then.

        If no record comes of that very offset, it has left the log meanwhile, and is to be finished.
        """
        if not self._released:
            return None
        self.position = min(self._released)
        return self.position

    def has_note(self, offset: int) -> bool:
        """Whether the record has counts of its own, which a commit tells."""
        return offset in self._notes

    def note(self, offset: int) -> Note:
        """The counts of a record that is not finished."""
        return self._notes.get(offset, Note())

    def write(self, offset: int, note: Note) -> None:
        """Give it other counts, which are durable when they are committed. Nothing happens if it is finished."""
        if offset in self._open:
            self._notes[offset] = note

    def commit(self, log: str, window: int, *, limit: int = LIMIT) -> Commit | None:
        """What to commit now. What was finished or written by then is settled when it is committed.

        `window`: the most records that may be in hand, or finished and not settled, until the next commit; 0 when
        nothing is in hand any more. `log` and `limit` as in `encode`.

        None if there is not the room to tell all of it. Then the last commit stands, nothing more is settled, and the
        partition should be paused until more is finished and there is.
        """
        offset = self.watermark
        metadata = encode(offset, log, max(window, self._blamed), self._runs(), limit=limit)
        return None if metadata is None else Commit(offset, metadata)

    def _runs(self) -> Iterator[Run]:
        """What is known of all offsets from the watermark upwards."""
        at = self.watermark
        if self.finished_above or self._notes:
            start, came = at, self._open[at]
            known = self._notes.get(at, False)
            for offset, nth in self._open.items():
                note = self._notes.get(offset, False)
                if nth != came:  # those between are finished
                    yield at - start, known
                    yield offset - at, True
                    start, known = offset, note
                elif note != known:
                    yield at - start, known
                    start, known = at, note
                at, came = offset + 1, nth + 1
            yield at - start, known
            if came != self._came:
                yield self._end - at, True
                at = self._end
        for start, end, told in self._told:
            if end > self._end:
                start = max(start, self._end)
                yield start - at, False
                yield end - start, told
                at = end


def _placed(at: int, runs: Iterable[Run]) -> Iterator[tuple[int, int, Note | bool]]:
    """Those runs that tell something: the first offset, and the one after the last."""
    for length, known in runs:
        if known is not False:
            yield at, at + length, known
        at += length
