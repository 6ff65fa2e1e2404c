"""Which messages share a batch, and when it goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any, Literal, NamedTuple

from ..batch import BatchInfo, Split, Trigger
from ..message import Message, Routing

Add = Callable[[Message[Any], Any], "Change | None"]
Emitted = tuple[list[Message[Any]], BatchInfo]
_UNROUTED = Routing()


class Change(NamedTuple):
    """What became of the batch of `key` when a message joined it: it was opened, or is to be emitted."""

    key: Hashable
    kind: Literal["opened", "size", "split", "flush"]


class Forming:
    """The batches of one batcher that are not yet full, one per key, oldest first.

    A batch's time starts when its first message arrives; it is due `timeout` seconds later.
    """

    def __init__(
        self,
        name: str,
        size: int,
        timeout: float,
        key: Callable[[Any], Hashable] | None = None,
        split: Split[Any] | None = None,
    ) -> None:
        self.name = name
        self.key = key
        self.size = size
        self.timeout = timeout
        self.split = split
        self._batches: dict[Hashable, list[Message[Any]]] = {}
        self._unkeyed: list[Message[Any]] = []  # always the same list, so that a processor's loop can hold on to it
        self._due: dict[Hashable, float] = {}  # in the order of the first messages, which is the order of the times
        self._accumulators: dict[Hashable, Any] = {}

    def add(self, message: Message[Any], value: Any) -> Change | None:
        """Put a message whose handler returned `value` into its key's batch.

        `opened`: the batch is new, call `opened(key, now)`. Any other change: call `take(key, ...)`. Raises what the
        user's key function and split raise, and leaves the message out then.
        """
        _, key, flush = message.routing or _UNROUTED
        if key is None and self.key is not None:
            key = self.key(value)
        hash(key)
        message.value = value
        split = self.split is not None and self._step(self.split, key, message)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = self._unkeyed if key is None else []
        batch.append(message)
        if flush:
            return Change(key, "flush")
        if split:
            return Change(key, "split")
        if len(batch) >= self.size:
            return Change(key, "size")
        return Change(key, "opened") if len(batch) == 1 else None

    def _step(self, split: Split[Any], key: Hashable, message: Message[Any]) -> bool:
        accumulator, full = split.step(self._accumulators.get(key, split.start), message)
        self._accumulators[key] = accumulator
        return full

    def plain(self) -> tuple[list[Message[Any]], int]:
        """The batch of all messages without a key, and up to which length another may be appended without `add`: when
        it is not empty, what nobody routed neither opens it nor makes it full. 0 where more decides than the size."""
        return self._unkeyed, 0 if self.key is not None or self.split is not None else self.size - 1

    @property
    def count(self) -> int:
        """Messages in all forming batches. Any thread may ask: the copy is made in one step."""
        return sum(map(len, self._batches.copy().values()))

    def opened(self, key: Hashable, now: float) -> float:
        """Start the time of a batch; returns when it is due."""
        due = self._due[key] = now + self.timeout
        return due

    def take(self, key: Hashable, trigger: Trigger) -> Emitted:
        """The batch of `key`, which is no longer forming."""
        batch = self._batches.pop(key)
        if key is None:
            batch = batch.copy()
            self._unkeyed.clear()
        self._due.pop(key, None)
        if trigger != "split":
            self._accumulators.pop(key, None)
        return batch, BatchInfo(self.name, key, len(batch), trigger)

    def remove(self, messages: Collection[Message[Any]]) -> None:
        """Messages go back to the broker instead. What a split has counted of them stays: their batch goes early."""
        for key, batch in list(self._batches.items()):
            batch[:] = [message for message in batch if message not in messages]
            if not batch:
                del self._batches[key]
                self._due.pop(key, None)
                self._accumulators.pop(key, None)

    def has(self, key: Hashable) -> bool:
        """Whether a batch of this key is forming."""
        return key in self._batches

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
