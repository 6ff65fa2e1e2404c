"""Lanes: messages of one key are handled one at a time, in the order in which they arrived; batches of one key too."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any

from ..message import QUEUED, SETTLED, Message


class _Lane:
    __slots__ = ("batched", "going_back", "overtaken", "running", "waiting")

    def __init__(self, running: Message[Any] | None) -> None:
        self.running = running  # its handler was entered
        self.overtaken = False  # an earlier one goes back, so the running one must not count
        self.waiting: deque[Message[Any]] = deque()
        self.batched: dict[Message[Any], None] = {}  # their handlers returned, they are in batches; in their order
        self.going_back: set[Message[Any]] = set()  # handed back and not settled yet: while any is, the lane is shut


class Lanes:
    """Which messages may start. A message without a key has no lane and always may.

    A lane is open while its running message is neither finished nor settled. When a message of it goes back to the
    broker the lane shuts: what comes behind goes back too, in order, and what still arrives follows, until the broker
    has them all; then the broker hands them out again in their order.
    """

    def __init__(self) -> None:
        self._lanes: dict[Hashable, _Lane] = {}
        self.waiting = 0

    def enter(
        self, messages: Iterable[Message[Any]], longest: int = sys.maxsize
    ) -> tuple[list[Message[Any]], list[Message[Any]]]:
        """Take arrivals; returns those that may start now and those that must go back behind an earlier one.

        No more than `longest` wait or are in batches of one lane, so that a hot key cannot fill the window; the rest
        goes back. What ended on its way here, since its lease was lost, is left out.
        """
        start, back = [], []
        for message in messages:
            if message.state != QUEUED:
                continue
            lane = None if message.key is None else self._lanes.get(message.key)
            if lane is None:
                if message.key is not None:
                    self._lanes[message.key] = _Lane(message)
                start.append(message)
            elif lane.going_back or len(lane.waiting) + len(lane.batched) >= longest:
                lane.going_back.add(message)
                back.append(message)
            elif lane.running is None:
                lane.running = message
                start.append(message)
            else:
                lane.waiting.append(message)
                self.waiting += 1
        return start, back

    def returned(self, message: Message[Any], *, batched: bool) -> Message[Any] | None:
        """A message's handler returned, and the message is in a batch if `batched`; returns the next that may start.

        One that goes back keeps its lane shut until `finish`.
        """
        lane = self._lanes.get(message.key)
        if lane is None or lane.running is not message or message in lane.going_back:
            return None
        if batched:
            lane.batched[message] = None
        lane.running = None
        return self._next(message.key, lane)

    def finish(self, message: Message[Any]) -> Message[Any] | None:
        """A message is done with its lane; returns the next one of the key, which may start. Idempotent."""
        lane = self._lanes.get(message.key)
        if lane is None:
            return None
        lane.going_back.discard(message)
        lane.batched.pop(message, None)
        if lane.running is message:
            lane.running = None
            lane.overtaken = False
        return self._next(message.key, lane) if lane.running is None else None

    def _next(self, key: Hashable, lane: _Lane) -> Message[Any] | None:
        if lane.waiting:  # all that wait come before all that go back
            lane.running = lane.waiting.popleft()
            self.waiting -= 1
        elif not (lane.going_back or lane.batched):
            del self._lanes[key]
        return lane.running

    def shut(self, message: Message[Any], *, entered: bool = False) -> list[Message[Any]]:
        """A message that runs or is in a batch goes back to the broker; returns those behind it, which go back too.

        But for one that runs behind it: that is overtaken, and goes back when its handler returns. `entered`: it counts
        as running as soon as it may start, since nobody can tell whether a thread has entered its handler.
        """
        lane = self._lanes.get(message.key)
        if lane is None:
            return []
        behind: list[Message[Any]] = []
        if message in lane.batched:
            order = list(lane.batched)
            behind = [one for one in order[order.index(message) + 1 :] if one.state < SETTLED]
            if lane.running is not None and lane.running.state == QUEUED and not entered:
                behind.append(lane.running)
            else:
                lane.overtaken = lane.running is not None
        elif lane.running is not message:
            return []
        lane.going_back.update((message, *behind))
        return behind + self._take_waiting(lane)

    def is_overtaken(self, message: Message[Any]) -> bool:
        """Whether an earlier message of its key goes back, or went, while this one runs: it must go back too."""
        lane = self._lanes.get(message.key)
        return lane is not None and lane.running is message and lane.overtaken

    def shut_out(self, messages: Iterable[Message[Any]]) -> list[Message[Any]]:
        """Which of the messages that are about to enter must go back, because their lane is shut."""
        back = []
        for message in messages:
            lane = None if message.key is None else self._lanes.get(message.key)
            if lane is not None and lane.going_back:
                lane.going_back.add(message)
                back.append(message)
        return back

    def turn_back(self, messages: Iterable[Message[Any]]) -> None:
        """Messages that were about to enter go back; until the broker has them their lanes are shut."""
        for message in messages:
            if message.key is not None:
                lane = self._lanes.setdefault(message.key, _Lane(None))
                lane.going_back.add(message)

    def take_waiting(self) -> list[Message[Any]]:
        """All that wait, to be handed back; until the broker has them their lanes are shut."""
        return [message for lane in self._lanes.values() for message in self._take_waiting(lane)]

    def _take_waiting(self, lane: _Lane) -> list[Message[Any]]:
        taken = [message for message in lane.waiting if message.state == QUEUED]  # others lost their lease: they ended
        self.waiting -= len(lane.waiting)
        lane.waiting.clear()
        lane.going_back.update(taken)
        return taken


class Turns:
    """Which batches may run: those that share no key with an earlier one that has not ended.

    Batches enter in the order in which they were emitted, so none waits for one that waits for it.
    """

    def __init__(self) -> None:
        self._batches: dict[Hashable, deque[int]] = {}  # per key, the first one first
        self._keys: dict[int, set[Hashable]] = {}

    def enter(self, batch: int, keys: Iterable[Hashable]) -> None:
        """A batch was emitted that has messages of these keys."""
        self._keys[batch] = set(keys)
        for key in self._keys[batch]:
            self._batches.setdefault(key, deque()).append(batch)

    def is_free(self, batch: int) -> bool:
        """Whether it is the batch's turn for each of its keys."""
        return all(self._batches[key][0] == batch for key in self._keys[batch])

    def leave(self, batch: int, keys: Iterable[Hashable]) -> None:
        """A batch that has not run has no messages of these keys any more."""
        for key in set(keys) & self._keys[batch]:
            self._keys[batch].discard(key)
            self._batches[key].remove(batch)
            if not self._batches[key]:
                del self._batches[key]

    def end(self, batch: int) -> None:
        """The messages of a batch are settled, or it has none any more. Idempotent."""
        if batch in self._keys:
            self.leave(batch, tuple(self._keys[batch]))
            del self._keys[batch]
