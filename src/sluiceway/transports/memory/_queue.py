"""The queues of the in-memory broker: plain ones, and keyed ones that hand out each key in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator
from heapq import heapify, heappop, heappush
from itertools import repeat
from typing import Any

from ..._decisions.suspicion import is_suspect, suspicions_now

Entry = tuple[Any, ...]
"""A message as one group keeps it: what `Message` is made of at its next hand-over, in the order of its fields.

Topic, body, id, key, headers, timestamp, scope, token; and once it was handed over, deliveries, failures, suspicions
and suspect. Entries never change, so that groups share them. The token is the message's place, a number that grows
with every publish; an entry that came back has (place, times it came back), so that a settle of the hand-over before
is told from one of the next.
"""

TOPIC, BODY, ID, KEY, HEADERS, TIMESTAMP, SCOPE, TOKEN, DELIVERIES, FAILURES, SUSPICIONS, SUSPECT = range(12)


class Private(tuple[Any, ...]):
    """An entry that was published to one group; no other group gets a copy."""

    __slots__ = ()


def place_of(entry: Entry) -> int:
    """Where the entry stands among all: smaller is earlier."""
    token = entry[TOKEN]
    return token if type(token) is int else token[0]


def counts_of(entry: Entry) -> tuple[int, int, int]:
    """Deliveries, failures and suspicions, as the next hand-over will say."""
    return entry[DELIVERIES:SUSPECT] if len(entry) > DELIVERIES else (1, 0, 0)


def again(entry: Entry, *, deliveries: int = 0) -> Entry:
    """The entry for the next hand-over, with so many deliveries more."""
    token = _next_token(entry)
    if deliveries == 0 and len(entry) == DELIVERIES:
        return type(entry)((*entry[:TOKEN], token))
    counts = counts_of(entry)
    return _counted(entry, token, counts[0] + deliveries, counts[1], counts[2])


def retried(entry: Entry, *, counted: bool) -> Entry:
    """The entry for the next hand-over after its handler ended: whatever died with it in hand before, it was not this
    message's doing."""
    failures = counts_of(entry)[1] + counted
    return _counted(entry, _next_token(entry), 1 + failures, failures, 0)


def _next_token(entry: Entry) -> Any:
    token = entry[TOKEN]
    return (token, 1) if type(token) is int else (token[0], token[1] + 1)


def suspected(entry: Entry) -> Entry:
    """The entry, suspected of the deaths that had it in hand."""
    deliveries, failures, suspicions = counts_of(entry)
    suspicions = suspicions_now(deliveries, failures, suspicions)
    return _counted(entry, entry[TOKEN], 1 + failures + suspicions, failures, suspicions)


def as_new(entry: Entry) -> Entry:
    """The entry for a group that never saw it."""
    return type(entry)((*entry[:TOKEN], place_of(entry)))


def _counted(entry: Entry, token: Any, deliveries: int, failures: int, suspicions: int) -> Entry:
    suspect = is_suspect(deliveries, failures, suspicions)
    return type(entry)((*entry[:TOKEN], token, deliveries, failures, suspicions, suspect))


class Hold:
    """What one source holds, as the broker keeps it: deliveries by token. It outlives a source that was dropped."""

    __slots__ = ("group", "held", "loop", "queues", "topics", "waiter")

    def __init__(self, group: str, topics: frozenset[str], loop: asyncio.AbstractEventLoop) -> None:
        self.group = group
        self.topics = topics
        self.loop = loop
        self.queues: tuple[Queue, ...] = ()
        self.held: dict[Any, Entry] = {}
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> bool:
        """Wake the source's waiting receive; False when none waits."""
        if self.waiter is None or self.waiter.done() or self.loop.is_closed():
            return False
        self.waiter.set_result(None)
        return True


class Queue:
    """Messages that wait for the members of a group.

    `ready` holds what was never handed over, in order, so that the usual way is an append and a popleft. What came
    back is in `back`, a heap by place; taking merges the two.
    """

    keyed = False

    def __init__(self) -> None:
        self.ready: deque[Entry] = deque()
        self.back: list[tuple[int, Entry]] = []
        self.sleepers: list[Hold] = []
        self.put: Callable[[Entry], None] = self.ready.append
        """Add a message that was never handed over. Does not wake."""

    def put_back(self, entry: Entry) -> None:
        """Add a message in its place. Does not wake."""
        heappush(self.back, (place_of(entry), entry))

    def wake(self) -> None:
        """Wake one waiting source; when it leaves something, it wakes the next."""
        while self.sleepers:
            if self.sleepers.pop(0).wake():
                return

    def take(self, hold: Hold, count: int, max_bytes: int | None) -> list[Entry]:
        """Up to `count` messages, oldest first; with `max_bytes` stop once their bodies reach that."""
        if max_bytes is not None:
            return take_each((self,), hold, count, max_bytes)
        run: list[Entry] = []
        while self.back and len(run) < count and (entry := self.pop(hold)) is not None:
            run.append(entry)
        ready = self.ready
        if run:
            count -= len(run)
        if count >= len(ready):
            run.extend(ready)
            ready.clear()
        else:
            pop = ready.popleft
            run += [pop() for _ in repeat(None, count)]
        return run

    def head(self, hold: Hold) -> int | None:
        """The place of what `pop` would give; None when there is nothing for this source."""
        first = self.ready[0][TOKEN] if self.ready else None
        if self.back and (first is None or self.back[0][0] < first):
            return self.back[0][0]
        return first

    def pop(self, hold: Hold) -> Entry | None:
        """The oldest message; None when there is nothing for this source."""
        if self.back and (not self.ready or self.back[0][0] < self.ready[0][TOKEN]):
            return heappop(self.back)[1]
        return self.ready.popleft() if self.ready else None

    def waiting(self) -> Iterator[Entry]:
        """All messages that wait, in no order."""
        yield from self.ready
        for _, entry in self.back:
            yield entry

    def parked(self) -> Iterator[Entry]:
        """All messages that wait behind an earlier one of their key."""
        return iter(())

    def drop(self, places: Collection[int]) -> None:
        """Remove waiting messages for good."""
        kept = [entry for entry in self.ready if entry[TOKEN] not in places]
        self.ready.clear()  # in place: `put` is bound to it
        self.ready.extend(kept)
        self.back = [pair for pair in self.back if pair[0] not in places]
        heapify(self.back)


def take_each(queues: tuple[Queue, ...], hold: Hold, count: int, max_bytes: int) -> list[Entry]:
    """Up to `count` messages of several queues, oldest first, and no more once their bodies reach `max_bytes`."""
    run: list[Entry] = []
    size = 0
    while len(run) < count and (not run or size < max_bytes):
        heads = [(place, index) for index, queue in enumerate(queues) if (place := queue.head(hold)) is not None]
        if not heads or (entry := queues[min(heads)[1]].pop(hold)) is None:
            break
        run.append(entry)
        size += len(entry[BODY])
    return run
