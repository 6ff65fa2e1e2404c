"""What a feed has given and is not settled: it outlives the sources that hand it out."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

from msgspec import Struct

from ..message import Message

_place = attrgetter("place")


class Entry(Struct, eq=False):
    """One event, from its fetch until it has ended for good.

    `message` is what is copied for each delivery, since handlers and transforms may change what they get. `error`: why
    the event could not be made a message. `place`: its order; `holder`: the source that has it; `published`: what goes
    out with the settle of this delivery has gone.
    """

    event: Any
    message: Message[Any]
    error: BaseException | None
    place: int = 0
    failures: int = 0
    holder: object = None
    published: bool = False


class Ledger:
    """The events of one feed by where they are: ready, waiting for their delay, parked, or in hand.

    With `ordered` an event is not handed out while an earlier one of its key waits, or is in another source's hand.
    """

    def __init__(self) -> None:
        self.at_end = False
        self.ordered = False
        self.finished = asyncio.Event()
        self.listeners: set[Callable[[], None]] = set()
        self._ready: list[Entry] = []  # by place
        self._delayed: set[Entry] = set()
        self._parked: set[Entry] = set()
        self._held: set[Entry] = set()
        self._count = 0

    @property
    def waiting(self) -> int:
        """Events in nobody's hand."""
        return len(self._ready) + len(self._delayed) + len(self._parked)

    def add(self, entries: Sequence[Entry]) -> None:
        """New events, last in order."""
        self.place(entries)
        self._ready += entries
        self.changed()

    def place(self, entries: Iterable[Entry]) -> None:
        """Give new events their place in the order."""
        for entry in entries:
            self._count += 1
            entry.place = self._count

    def take(self, holder: object, demand: int) -> list[Entry]:
        """The earliest events that may be handed out; `holder` has them from now on."""
        if self.ordered:
            self._unpark()
            taken = self._in_order(holder, demand)
            chosen = {entry.place for entry in taken}
            self._ready = [entry for entry in self._ready if entry.place not in chosen]
        else:
            taken, self._ready = self._ready[:demand], self._ready[demand:]
        self.hold(holder, taken)
        return taken

    def hold(self, holder: object, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.holder = holder
            self._held.add(entry)

    def end(self, entries: Iterable[Entry]) -> None:
        """They have ended for good, or are somebody else's."""
        self._held.difference_update(entries)
        self.changed()

    def back(self, entry: Entry, delay: float = 0.0) -> None:
        """It comes again, after `delay` seconds."""
        self._held.discard(entry)
        if delay > 0:
            self._delayed.add(entry)
            asyncio.get_running_loop().call_later(delay, self._due, entry)
        else:
            insort(self._ready, entry, key=_place)
            self.changed()

    def park(self, entry: Entry) -> None:
        """It comes again when no earlier one of its key is away."""
        self._held.discard(entry)
        self._parked.add(entry)
        self.changed()

    def changed(self) -> None:
        if self.at_end and not (self._ready or self._delayed or self._parked or self._held):
            self.finished.set()
        for listener in list(self.listeners):
            listener()

    def _due(self, entry: Entry) -> None:
        self._delayed.discard(entry)
        self.back(entry)

    def _unpark(self) -> None:
        for entry in sorted(self._parked, key=_place):
            if not _behind(entry, (*self._delayed, *self._held)):
                self._parked.discard(entry)
                insort(self._ready, entry, key=_place)

    def _in_order(self, holder: object, demand: int) -> list[Entry]:
        away = [*self._delayed, *self._parked, *(entry for entry in self._held if entry.holder is not holder)]
        first: dict[str, int] = {}
        for entry in away:
            if (key := entry.message.key) is not None:
                first[key] = min(entry.place, first.get(key, entry.place))
        taken: list[Entry] = []
        for entry in self._ready:
            if len(taken) == demand:
                break
            key = entry.message.key
            if key is None or entry.place < first.get(key, entry.place + 1):
                taken.append(entry)
        return taken


def _behind(entry: Entry, others: Iterable[Entry]) -> bool:
    key = entry.message.key
    return key is not None and any(one.message.key == key and one.place < entry.place for one in others)
