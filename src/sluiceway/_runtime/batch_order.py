"""What `order_by` needs of batchers: batches that share an ordering key run one at a time, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from msgspec.structs import replace

from .._decisions.batching import Emitted
from .._decisions.lanes import Turns
from ..message import Message


class BatchOrder:
    """Whose turn it is, over all batchers of a pipeline.

    `emitted` is told of each batch when it is emitted; `abandoned` of the last message of each key in a batch whose
    handler ignores its cancellation; `start` lets every batcher start what may run.
    """

    def __init__(
        self,
        emitted: Callable[[Sequence[Message[Any]]], None],
        abandoned: Callable[[Message[Any]], None],
        start: Callable[[], None],
    ) -> None:
        self._turns = Turns()
        self._emitted = emitted
        self._abandoned = abandoned
        self._start = start

    def enter(self, messages: list[Message[Any]]) -> None:
        """A batch was emitted; its list stays the same object until it is over."""
        self._turns.enter(id(messages), {message.key for message in messages if message.key is not None})
        self._emitted(messages)

    def next_in(self, queue: deque[Emitted]) -> int | None:
        """Where the first batch is whose turn it is; None without one."""
        return next((index for index, (messages, _) in enumerate(queue) if self._turns.is_free(id(messages))), None)

    def over(self, messages: list[Message[Any]]) -> None:
        """A batch is settled, or will never run: what waited for it may."""
        self._turns.end(id(messages))
        self._start()

    def drop(self, queue: deque[Emitted], messages: Collection[Message[Any]]) -> None:
        """Take messages out of batches that wait to run: they go back to the broker."""
        for index in reversed(range(len(queue))):
            batch, info = queue[index]
            gone = [message for message in batch if message in messages]
            if not gone:
                continue
            batch[:] = [message for message in batch if message not in messages]
            if batch:
                queue[index] = batch, replace(info, size=len(batch))
                self._turns.leave(id(batch), {message.key for message in gone})
            else:
                del queue[index]
                self._turns.end(id(batch))

    def abandon(self, messages: Sequence[Message[Any]]) -> None:
        """The handler of a batch runs on though its time is up: what is behind its messages goes back."""
        for message in {message.key: message for message in messages}.values():
            self._abandoned(message)


def behind_failed(messages: Sequence[Message[Any]]) -> list[Message[Any]]:
    """The messages of a batch that did not fail, but an earlier one of their key did, and may go back."""
    failed: set[str] = set()
    behind = []
    for message in messages:
        if message.error is not None or (message.ending is not None and message.ending.on_success == "release"):
            if message.key is not None:
                failed.add(message.key)
        elif message.key in failed:
            behind.append(message)
    return behind
