"""A queue that hands out the messages of each key in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from heapq import heapify, heappop, heappush

from ._queue import BODY, KEY, Entry, Hold, Queue, place_of

Heap = list[tuple[int, str]]


class Lane:
    """The messages of one key: waiting, parked, held by a source, and waiting for their retry."""

    __slots__ = ("delayed", "held", "parked", "waiting")

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Entry]] = []
        self.parked: list[tuple[int, Entry]] = []
        self.held: dict[int, Hold] = {}
        self.delayed: set[int] = set()

    @property
    def owner(self) -> Hold | None:
        """The source that holds messages of this key: while it does, no other gets any."""
        for hold in self.held.values():
            return hold
        return None

    @property
    def empty(self) -> bool:
        return not (self.waiting or self.parked or self.held or self.delayed)

    def open_to(self, hold: Hold) -> bool:
        return self.owner in (None, hold)

    def next_place(self) -> int | None:
        """The place of the message that may go out next; None when there is none or an earlier one is in its way."""
        if not self.waiting:
            return None
        place = self.waiting[0][0]
        if self.delayed and min(self.delayed) < place:
            return None
        if self.parked and self.parked[0][0] < place:
            return None
        return place

    def unpark(self) -> None:
        """Let go of parked messages that no earlier one stands before any more."""
        while self.parked:
            place = self.parked[0][0]
            if any(earlier < place for earlier in self.held) or any(earlier < place for earlier in self.delayed):
                return
            heappush(self.waiting, heappop(self.parked))


class KeyedQueue(Queue):
    """Hands out a message only when no earlier one of its key is held by another source, parked, or awaits its retry.

    Lanes that anyone may take from are in the heap `_open`; those of which a source holds messages are in its own
    heap. An item of a heap may be out of date: it is checked when it comes to the top. Whatever changes a lane
    offers it anew, so nothing is missed by throwing an old item away.
    """

    keyed = True

    def __init__(self) -> None:
        super().__init__()
        self.put = self.put_back
        self._lanes: dict[str, Lane] = {}
        self._open: Heap = []
        self._own: dict[Hold, Heap] = {}

    def put_back(self, entry: Entry) -> None:
        if entry[KEY] is None:
            super().put_back(entry)
            return
        lane, place = self._lane(entry[KEY]), place_of(entry)
        lane.delayed.discard(place)
        heappush(lane.waiting, (place, entry))
        if lane.waiting[0][0] == place or lane.parked:  # else an earlier one is on offer already
            self._offer(entry[KEY], lane)

    def hold(self, entry: Entry, hold: Hold) -> None:
        """Note that a source holds the message already."""
        if entry[KEY] is not None:
            self._lane(entry[KEY]).held[place_of(entry)] = hold

    def leave(self, entry: Entry) -> None:
        """Note that no source holds the message any more."""
        if entry[KEY] is not None:
            lane = self._lane(entry[KEY])
            lane.held.pop(place_of(entry), None)
            if lane.parked or not lane.held:  # else it stays on offer to its owner
                self._offer(entry[KEY], lane)

    def delay(self, entry: Entry) -> None:
        """Note that the message awaits its retry: later ones of its key wait behind it."""
        if entry[KEY] is not None:
            self._lane(entry[KEY]).delayed.add(place_of(entry))

    def park(self, entry: Entry) -> None:
        """Keep the message until no earlier one of its key is held or awaits its retry."""
        if entry[KEY] is None:
            super().put_back(entry)
            return
        lane = self._lane(entry[KEY])
        heappush(lane.parked, (place_of(entry), entry))
        self._offer(entry[KEY], lane)

    def forget(self, hold: Hold) -> None:
        """A source is gone for good. It holds nothing any more."""
        self._own.pop(hold, None)

    def wake(self) -> None:
        """Wake all waiting sources: which of them may take depends on the keys."""
        sleepers, self.sleepers = self.sleepers, []
        for hold in sleepers:
            hold.wake()

    def take(self, hold: Hold, count: int, max_bytes: int | None) -> list[Entry]:
        run: list[Entry] = []
        size, most = 0, 1 << 62 if max_bytes is None else max_bytes
        while len(run) < count and size < most and (entry := self.pop(hold)) is not None:
            run.append(entry)
            size += len(entry[BODY])
        return run

    def head(self, hold: Hold) -> int | None:
        places = (super().head(hold), self._top(self._open, hold), self._top(self._own.get(hold, []), hold))
        return min((place for place in places if place is not None), default=None)

    def pop(self, hold: Hold) -> Entry | None:
        own = self._own.get(hold, [])
        self._top(self._open, hold)
        self._top(own, hold)
        heap = own if own and (not self._open or own[0] < self._open[0]) else self._open
        keyless = super().head(hold)
        if not heap or (keyless is not None and keyless < heap[0][0]):
            return super().pop(hold)
        place, key = heappop(heap)
        lane = self._lanes[key]
        entry = heappop(lane.waiting)[1]
        lane.held[place] = hold
        if lane.waiting:
            self._offer(key, lane)
        return entry

    def waiting(self) -> Iterator[Entry]:
        yield from super().waiting()
        for lane in self._lanes.values():
            for _, entry in lane.waiting:
                yield entry

    def parked(self) -> Iterator[Entry]:
        for lane in self._lanes.values():
            for _, entry in lane.parked:
                yield entry

    def drop(self, places: Collection[int]) -> None:
        super().drop(places)
        for key, lane in list(self._lanes.items()):
            lane.waiting = [pair for pair in lane.waiting if pair[0] not in places]
            lane.parked = [pair for pair in lane.parked if pair[0] not in places]
            lane.delayed.difference_update(places)
            heapify(lane.waiting)
            heapify(lane.parked)
            self._offer(key, lane)

    def _lane(self, key: str) -> Lane:
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane()
        return lane

    def _offer(self, key: str, lane: Lane) -> None:
        """Put the lane where those look for it who may take from it."""
        lane.unpark()
        place = lane.next_place()
        if place is None:
            if lane.empty:
                del self._lanes[key]
            return
        owner = lane.owner
        heappush(self._open if owner is None else self._own.setdefault(owner, []), (place, key))
        if self.sleepers:
            self.wake()

    def _top(self, heap: Heap, hold: Hold) -> int | None:
        """The first place in the heap that is still right for this source."""
        while heap:
            place, key = heap[0]
            lane = self._lanes.get(key)
            if lane is not None and lane.next_place() == place and lane.open_to(hold):
                return place
            heappop(heap)
        return None
