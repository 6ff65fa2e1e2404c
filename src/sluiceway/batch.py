"""Batches: what a batch handler gets, and when a batch is full."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

from msgspec import Struct

from .errors import AlreadySettled, ForeignMessage, OptionError
from .message import SETTLED, Message

T = TypeVar("T")
R = TypeVar("R")

Trigger = Literal["size", "split", "timeout", "flush", "order", "drain", "revoke", "starved"]


class Split(Struct, Generic[T], frozen=True):
    """When a batch is full, beside its size: by what is in it.

    `step(accumulator, message)` is called for each message that joins a batch, with `message.value` set; it returns the
    next accumulator, and whether the batch is full now. The message is the batch's last then. There is an accumulator
    per batch key, and each begins with `start`. After a batch that `step` called full the next one of its key begins
    with what it returned; after one that was emitted for another reason, with `start`. When `step` raises, the message
    fails and is not in the batch. Raises OptionError for a `step` that cannot be called.

        Split(0, lambda lines, message: ((lines + message.value) % 500, lines + message.value >= 500))
    """

    start: T
    step: Callable[[T, Message[Any]], tuple[T, bool]]

    def __post_init__(self) -> None:
        if not callable(self.step):
            raise OptionError(f"Split: step must be a function (accumulator, message); got {self.step!r}")

    @staticmethod
    def bytes(limit: int) -> Split[int]:
        """Full once the bodies of a batch have `limit` bytes or more. Raises OptionError for a limit below 1."""
        if type(limit) is not int or limit < 1:
            raise OptionError(f"Split.bytes: limit must be 1 or more bytes, got {limit!r}")

        def step(size: int, message: Message[Any]) -> tuple[int, bool]:
            size += len(message.body)
            return (0, True) if size >= limit else (size, False)

        step.__name__ = f"{limit:,} bytes"  # what `sluiceway inspect` shows of it
        return Split(0, step)


class BatchInfo(Struct, frozen=True):
    """Why and where a batch was emitted. `trigger`: size, split, timeout, flush, order, drain, revoke or starved.

    `order`: a later message of a key that is in this batch went to another one, which must run after it.
    """

    batcher: str
    key: Hashable
    size: int
    trigger: Trigger


class Batch(Sequence[Message[Any]], Generic[R]):
    """The messages of one batch, in the order in which their handlers returned. It cannot be changed.

    `values` are what the handlers returned, in the same order. `batch[i].fail(error)` fails one message; the rest is
    acked when the batch handler returns.
    """

    __slots__ = ("_messages", "info")

    def __init__(self, messages: Sequence[Message[Any]], info: BatchInfo) -> None:
        self._messages = tuple(messages)
        self.info = info

    @overload
    def __getitem__(self, index: int) -> Message[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Message[Any], ...]: ...
    def __getitem__(self, index: int | slice) -> Message[Any] | tuple[Message[Any], ...]:
        return self._messages[index]

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[Message[Any]]:
        return iter(self._messages)

    @property
    def values(self) -> list[R]:
        """What the handlers returned, in the order of the messages."""
        return [message.value for message in self._messages]

    @property
    def key(self) -> Hashable:
        """The batch key that all messages share; None without one."""
        return self.info.key

    def fail(self, message: Message[Any], error: BaseException | type[BaseException] | str) -> None:
        """Fail one message of this batch. Raises ForeignMessage when it is not of this batch, TypeError when it is no
        message."""
        if not isinstance(message, Message):
            raise TypeError(
                f"batch.fail takes a message of the batch, got {message!r}; write batch.fail(batch[i], error)"
            )
        if not any(message is own for own in self._messages):
            raise ForeignMessage(f"message {message.id} of {message.topic!r} is not of this batch of {len(self)}")
        message.fail(error)

    async def ack(self, messages: Sequence[Message[Any]] | None = None) -> None:
        """Settle messages of this batch as successes now, in one call; None: all that were not failed or settled.

        Returns when the broker has taken them; what the batch handler does later no longer counts for them. Raises
        ForeignMessage and AlreadySettled, before anything is settled, when one is not of this batch or was settled; and
        LeaseLost, when all have ended, if another consumer has one of them. TypeError for what is no sequence.
        """
        if isinstance(messages, Message):
            raise TypeError("batch.ack takes a sequence of messages, or nothing for all; write batch.ack([message])")
        if messages is None:
            messages = [one for one in self._messages if one.state < SETTLED and one.error is None]
        own = set(self._messages)
        for one in messages:
            if one not in own:
                raise ForeignMessage(f"message {one.id} of {one.topic!r} is not of this batch of {len(self)}")
            if one.state >= SETTLED or one.settler is None:
                raise AlreadySettled(f"message {one.id} of {one.topic!r} is settled already")
        if messages and (settler := messages[0].settler) is not None:
            await settler.settle_now(tuple(dict.fromkeys(messages)))

    def __repr__(self) -> str:
        return f"<Batch of {len(self)} for {self.info.batcher!r}, key {self.info.key!r}, by {self.info.trigger}>"


BatchHandler = Callable[[Batch[Any]], Awaitable[Any]]
"""What a batch processor runs for one batch: batch middleware and the user's batch handler, composed."""
