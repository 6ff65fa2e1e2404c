"""Which messages share a batch, and when it goes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal

from ..message import BatchInfo, Message

Trigger = Literal["size", "timeout", "flush", "drain", "revoke", "starved"]
Emitted = tuple[list[Message[Any]], BatchInfo]


class Forming:
    """The batches of one batcher that are not yet full, one per key, oldest first.

    A batch's time starts when its first message arrives; it is due `timeout` seconds later.
    """

    def __init__(self, name: str, size: int, timeout: float) -> None:
        self.name = name
        self.size = size
        self.timeout = timeout
        self.count = 0  # messages in all forming batches
        self._batches: dict[Hashable, list[Message[Any]]] = {}
        self._due: dict[Hashable, float] = {}  # in the order of the first messages, which is the order of the times

    def add(self, message: Message[Any], key: Hashable) -> Literal["opened", "full"] | None:
        """Put a message into its key's batch. `opened`: call `opened(key, now)`; `full`: call `take(key, ...)`."""
        batch = self._batches.get(key)
        self.count += 1
        if batch is None:
            self._batches[key] = [message]
            return "full" if self.size == 1 or message.flush else "opened"
        batch.append(message)
        return "full" if len(batch) >= self.size or message.flush else None

    def opened(self, key: Hashable, now: float) -> float:
        """Start the time of a batch; returns when it is due."""
        due = self._due[key] = now + self.timeout
        return due

    def take(self, key: Hashable, trigger: Trigger) -> Emitted:
        """The batch of `key`, which is no longer forming."""
        batch = self._batches.pop(key)
        self._due.pop(key, None)
        self.count -= len(batch)
        return batch, BatchInfo(self.name, key, len(batch), trigger)

    def take_due(self, now: float) -> list[Emitted]:
        """The batches whose time is over."""
        keys = []
        for key, due in self._due.items():
            if due > now:
                break
            keys.append(key)
        return [self.take(key, "timeout") for key in keys]

    def take_oldest(self) -> Emitted | None:
        """The batch that waits longest, for a window that is full of forming batches."""
        return self.take(next(iter(self._batches)), "starved") if self._batches else None

    def take_all(self, trigger: Trigger) -> list[Emitted]:
        """All batches, for a drain."""
        return [self.take(key, trigger) for key in list(self._batches)]

    def next_due(self) -> float | None:
        """When the next batch's time is over; None without one."""
        return next(iter(self._due.values()), None)

    def oldest_due(self) -> float:
        """When the oldest batch is due, to compare batchers; infinity without one."""
        return next(iter(self._due.values()), float("inf"))
