"""Lanes: messages of one key are handled one at a time, in the order in which they arrived."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any

from ..message import QUEUED, Message


class _Lane:
    __slots__ = ("going_back", "running", "waiting")

    def __init__(self, running: Message[Any]) -> None:
        self.running: Message[Any] | None = running
        self.waiting: deque[Message[Any]] = deque()
        self.going_back: set[Message[Any]] = set()  # handed back and not settled yet: while any is, the lane is shut


class Lanes:
    """Which messages may start. A message without a key has no lane and always may.

    A lane is open while its running message is neither finished nor settled. When that message goes back to the broker
    the lane shuts: what waits behind it goes back too, in order, and what still arrives follows, until the broker has
    them all; then the broker hands them out again in their order.
    """

    def __init__(self) -> None:
        self._lanes: dict[Hashable, _Lane] = {}
        self.waiting = 0

    def enter(
        self, messages: Iterable[Message[Any]], longest: int = sys.maxsize
    ) -> tuple[list[Message[Any]], list[Message[Any]]]:
        """Take arrivals; returns those that may start now and those that must go back behind an earlier one.

        No more than `longest` wait in one lane, so that a hot key cannot fill the window; the rest goes back.
        """
        start, back = [], []
        for message in messages:
            lane = None if message.key is None else self._lanes.get(message.key)
            if lane is None:
                if message.key is not None:
                    self._lanes[message.key] = _Lane(message)
                start.append(message)
            elif lane.going_back or len(lane.waiting) >= longest:
                lane.going_back.add(message)
                back.append(message)
            else:
                lane.waiting.append(message)
                self.waiting += 1
        return start, back

    def finish(self, message: Message[Any]) -> Message[Any] | None:
        """A message is done with its lane; returns the next one of the key, which may start. Idempotent."""
        lane = self._lanes.get(message.key)
        if lane is None:
            return None
        lane.going_back.discard(message)
        if lane.running is message:
            lane.running = None
        if lane.running is not None:
            return None
        if lane.waiting:  # nothing waits in a lane that is shut
            lane.running = lane.waiting.popleft()
            self.waiting -= 1
        elif not lane.going_back:
            del self._lanes[message.key]
        return lane.running

    def shut(self, message: Message[Any]) -> list[Message[Any]]:
        """The running message of a lane goes back to the broker; returns those behind it, which go back too."""
        lane = self._lanes.get(message.key)
        if lane is None or lane.running is not message:
            return []
        behind = self._take_waiting(lane)
        lane.going_back.add(message)
        return behind

    def take_waiting(self) -> list[Message[Any]]:
        """All that wait, to be handed back; until the broker has them their lanes are shut."""
        return [message for lane in self._lanes.values() for message in self._take_waiting(lane)]

    def _take_waiting(self, lane: _Lane) -> list[Message[Any]]:
        taken = [message for message in lane.waiting if message.state == QUEUED]  # others lost their lease: they ended
        self.waiting -= len(lane.waiting)
        lane.waiting.clear()
        lane.going_back.update(taken)
        return taken
