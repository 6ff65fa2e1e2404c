"""Which messages share a batch, and when it goes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

from ..message import BATCHED, BatchInfo, Message

Trigger = Literal["size", "timeout", "flush", "drain", "revoke", "starved"]
Change = Literal["opened", "full", "flush"]
Emitted = tuple[list[Message[Any]], BatchInfo]


class Forming:
    """The batches of one batcher that are not yet full, one per key, oldest first.

    A batch's time starts when its first message arrives; it is due `timeout` seconds later.
    """

    def __init__(self, name: str, size: int, timeout: float, key: Callable[[Any], Hashable] | None = None) -> None:
        self.name = name
        self.key = key
        self.size = size
        self.timeout = timeout
        self._batches: dict[Hashable, list[Message[Any]]] = {}
        self._due: dict[Hashable, float] = {}  # in the order of the first messages, which is the order of the times

    def add(self, message: Message[Any], value: Any) -> Change | None:
        """Put a message whose handler returned `value` into its key's batch. Raises what the key function raises.

        `opened`: the batch is new, call `opened(key, now)`. `full` or `flush`: call `take(key, ...)`.
        """
        key = message.batch_key
        if key is None and self.key is not None:
            key = message.batch_key = self.key(value)
        batch = self._batches.get(key)
        if value is not None:  # as it is already; writing an attribute is a third of what this costs
            message.value = value
        message.state = BATCHED
        if batch is None:
            self._batches[key] = [message]
            if self.size > 1 and not message.flush:
                return "opened"
        else:
            batch.append(message)
            if len(batch) < self.size and not message.flush:
                return None
        return "flush" if message.flush else "full"

    @property
    def count(self) -> int:
        """Messages in all forming batches."""
        return sum(map(len, self._batches.values()))

    def opened(self, key: Hashable, now: float) -> float:
        """Start the time of a batch; returns when it is due."""
        due = self._due[key] = now + self.timeout
        return due

    def take(self, key: Hashable, trigger: Trigger) -> Emitted:
        """The batch of `key`, which is no longer forming."""
        batch = self._batches.pop(key)
        self._due.pop(key, None)
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
