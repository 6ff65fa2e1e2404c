"""What the event loop asks of a member's thread, and how it hears."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..._decisions.commit_metadata import Note
from ...message import Message


class Token(NamedTuple):
    """Which hand-over of which record."""

    topic: str
    partition: int
    generation: int
    offset: int
    delivery: int


class Ask:
    """A receive that waits. It is answered once; what comes after it gave up goes back."""

    def __init__(self, source: Any, topics: frozenset[str], demand: int, max_bytes: int) -> None:
        self.source = source
        self.topics = topics
        self.demand = demand
        self.max_bytes = max_bytes
        self.answer: asyncio.Future[list[Message[Any]]] = asyncio.get_running_loop().create_future()


End = None | Note | bool
"""How a hand-over ends. None: finished; True: handed back as it was; a note: handed back with these counts; False: it
goes on, and what was noted of it is to be committed."""


class Settling:
    """Ends of hand-overs; `done` has those that are not ours any more, when the rest is committed."""

    def __init__(self, ends: Sequence[tuple[Token, End]]) -> None:
        self.ends = ends
        self.lost: list[Token] = []
        self.waits = 0  # for the commits of so many partitions
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[list[Token]] = self._loop.create_future()


def answer(future: asyncio.Future[Any], result: Any) -> Callable[[], None]:
    """What gives a future its result, in its loop, unless it has one."""

    def give() -> None:
        if not future.done():
            future.set_result(result)

    return give


def run_in(loop: asyncio.AbstractEventLoop, make: Any) -> None:
    """Start a coroutine in a loop, from another thread, and wait for nothing."""
    try:
        loop.call_soon_threadsafe(make)
    except RuntimeError:  # the loop is closed: nobody is left to hear
        return
