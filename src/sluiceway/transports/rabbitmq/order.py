"""Order: what a source with `order_by` knows of its keys.

A message has a place, given when it first comes, which its copies keep. What comes too early waits in a *room*, in hand
and at its place in the queue; what goes back as a copy is *away*. A *record* of that is at the broker, in a queue that
keeps the newest one only, before a copy is: from it the process that comes next knows what it has to wait for.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ..._decisions.away import Away
from ...message import QUEUED, Message

LATE = 3.0  # seconds that what is due may take, until the queue is asked for it
_MOST = 10_000  # places in one record


class _Entry(Struct, gc=False):
    """A message with a key that is not settled. `queue`: the number of that which it comes from."""

    key: str
    id: str
    queue: int


class Order:
    """All of one epoch. It asks the broker nothing."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}  # by tag, of all that are in hand
        self.room: dict[int, Message[Any]] = {}  # came too early, by tag
        self._away: Away[int] = Away()
        self._entries: dict[int, _Entry] = {}  # by place
        self._here: dict[int, int] = {}  # the tag of each place that is in hand, and not going
        self._errors: dict[int, BaseException] = {}  # by tag: why a message cannot be handled
        self._noted: dict[str, int] = {}  # by id: the places that were in the hand of the one before
        self._moved: set[int] = set()  # the places of which there are copies, or a record that comes first
        self._newest = 0

    # -- what comes

    def came(self, message: Message[Any], queue: int, place: int | None) -> int | None:
        """A message with a key has arrived; `place` is its copy's. Returns its place; None when it is in hand twice."""
        noted, given = self._noted.pop(message.id, None), place is not None
        if place is None:
            place = noted if noted is not None else max(self._newest + 1, time.time_ns() // 1000)
        self._newest = max(self._newest, place)
        if place in self._here:
            return None
        if given or noted is not None:
            self._moved.add(place)
        self.places[message.token] = place
        self._here[place] = message.token
        self._entries[place] = _Entry(message.key or "", message.id, queue)
        if message.error is not None:
            self._errors[message.token] = message.error
        return place

    def expect(self, message: Message[Any], queue: int, place: int, due: float) -> None:
        """A copy has come before it is due, and goes up again."""
        self._newest = max(self._newest, place)
        self._entries[place] = _Entry(message.key or "", message.id, queue)
        self._away.expect(message.key, place, due)

    def takes(self, message: Message[Any]) -> bool:
        """Whether a message may be handed out now. If not, it waits in the room."""
        if message.key is None or self._away.comes(message.key, self.places[message.token], message.token):
            return True
        self.room[message.token] = message
        self._away.parks(message.token, math.inf, behind_held=False)
        return False

    def called(self) -> list[Message[Any]]:
        """Those of the room that may leave it now, in their order."""
        return [self.room.pop(tag) for tag in self._away.calls(time.time()) if tag in self.room]

    # -- what ends

    def stays(self, message: Message[Any], *, parked: bool) -> None:
        """It was handed out, is not any more, and comes again when nothing is in its way; `parked`: also nothing that
        is in hand now."""
        self.room[message.token] = message
        message.error = self._errors.get(message.token)
        self._away.parks(message.token, math.inf, behind_held=parked)

    def goes(self, tag: int, due: float) -> None:
        """A copy of it is about to be sent, and comes at `due`."""
        if not self.is_going(tag):
            place = self.places[tag]
            self._moved.add(place)
            del self._here[place]
            if self.room.pop(tag, None) is None:
                self._away.goes(tag, due)
            else:
                self._away.expect(self._entries[place].key, place, due)

    def is_going(self, tag: int) -> bool:
        """Whether a copy of what is in hand was about to be sent already."""
        place = self.places.get(tag)
        return place is not None and self._here.get(place) != tag

    def ended(self, tags: Sequence[int]) -> None:
        """The broker need not know of these deliveries any more."""
        for tag in tags:
            place = self.places.pop(tag, None)
            if place is None:
                continue
            self._errors.pop(tag, None)
            self._away.ends(tag)
            if self._here.get(place) == tag:
                del self._here[place]
                self._moved.discard(place)
                self._away.forgets(self._entries.pop(place).key, place)

    def due(self, tag: int) -> float:
        """When that comes which a message waits for, seconds since 1970; now when that is in hand."""
        place = self.places[tag]
        due = self._away.first_due(self._entries[place].key, time.time())
        return due if due < math.inf else time.time()

    # -- what does not come

    def overdue(self) -> list[tuple[str, int, int]]:
        """The key, place and queue of what should have come by now."""
        before = time.time() - LATE
        return [(key, place, self._entries[place].queue) for key, place, due in self._all_away() if due < before]

    def forgets(self, key: str, place: int) -> None:
        """The queue says that it is not there."""
        if self._is_away(place):
            self._away.forgets(key, place)
            self._entries.pop(place, None)
            self._moved.discard(place)

    def _is_away(self, place: int) -> bool:
        return place not in self._here and place in self._entries

    def free(self, busy: set[str | None]) -> list[Message[Any]]:
        """Take those out of the room that wait for nothing: their keys are not `busy`, and nothing of them is away."""
        busy = busy | {key for key, _, _ in self._all_away()}
        places = sorted(self.places[tag] for tag, message in self.room.items() if message.key not in busy)
        for key, place in self._away.overdue(math.inf):
            if place not in self._entries:
                self._away.forgets(key, place)
        found = [self.room.pop(self._here[place]) for place in places]
        for message, place in zip(found, places, strict=True):
            self._away.forgets(message.key, place)
        return found

    # -- too many wait

    def crowd(self, busy: set[str | None], most: int) -> list[Message[Any]]:
        """Of each queue of which at least `most` wait in the room: those that wait for what is away, and so may go away
        too; the first of a key first. Not those of `busy` keys: they wait for what is in hand."""
        count = Counter(self._entries[self.places[tag]].queue for tag in self.room)
        full = {queue for queue, waiting in count.items() if waiting >= most}
        if not full:
            return []
        room = [self.room[tag] for tag in self._away.all_parked() if tag in self.room]
        return [one for one in room if one.key not in busy and self._entries[self.places[one.token]].queue in full]

    # -- the record

    def record(self, queue: int) -> list[tuple[int, str, str, float]]:
        """Place, key, id and time of all that are away or were, and of those that are before one of them.

        What was away has lost its place in the queue, also when it is in hand again: when this process dies, what is
        behind it may come before it.
        """
        dues = {place: due for _, place, due in self._all_away()}
        moved = dues.keys() | (self._moved & self._here.keys())
        last: dict[str, int] = {}
        for place in moved:
            key = self._entries[place].key
            last[key] = max(place, last.get(key, 0))
        before = {place for place in self._here if place < last.get(self._entries[place].key, 0)} if last else set()
        places = [place for place in sorted(moved | before) if self._entries[place].queue == queue]
        return [(at, self._entries[at].key, self._entries[at].id, dues.get(at, 0.0)) for at in places[:_MOST]]

    def _all_away(self) -> list[tuple[str, int, float]]:
        return [(self._entries[place].key, place, due) for place, due in self._away.dues() if self._is_away(place)]

    def learn(self, queue: int, record: Sequence[tuple[int, str, str, float]]) -> None:
        """What the record says that the one before has left."""
        for place, key, name, due in record:
            self._newest = max(self._newest, place)
            self._entries[place] = _Entry(key, name, queue)
            self._noted[name] = place
            self._away.expect(key, place, due or time.time())


def untouched(message: Message[Any], *, suspect: bool) -> Message[Any]:
    """As it came."""
    fresh = {"payload": None, "value": None, "routing": None, "error": None, "outputs": None, "settler": None}
    return replace(message, suspect=suspect, state=QUEUED, ending=None, **fresh)


def write(away: Sequence[tuple[int, str, str, float]], explained: dict[str, int]) -> bytes:
    """A record as it is kept at the broker. JSON in ASCII: a key may be no text."""
    return json.dumps({"away": away, "explained": explained}).encode()


def read(bodies: Sequence[bytes]) -> tuple[list[tuple[int, str, str, float]], dict[str, int]]:
    """The newest of these records, which is the last; an empty one where none can be read."""
    for body in reversed(bodies):
        try:
            found = json.loads(body)
            away = [(int(place), str(key), str(name), float(due)) for place, key, name, due in found["away"]]
            return away, {str(name): int(count) for name, count in found["explained"].items()}
        except (ValueError, LookupError, TypeError, AttributeError):  # somebody else has put that there
            continue
    return [], {}
