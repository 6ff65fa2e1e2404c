"""What the event loop and the I/O thread hand to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from .store import Store

Deliver = Callable[[Any, BaseException | None], None]
"""Takes a result or an error."""


class Job:
    """Something to do with the store, and whom to tell.

    `deliver` is called on `loop`, or with None on the I/O thread itself, after the commit. `full`: the commit must
    survive a power cut. `reads`: it changes nothing and needs no transaction.
    """

    __slots__ = ("deliver", "full", "loop", "reads", "work")

    def __init__(
        self,
        work: Callable[[Store], Any],
        deliver: Deliver,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        full: bool = False,
        reads: bool = False,
    ) -> None:
        self.work = work
        self.deliver = deliver
        self.loop = loop
        self.full = full
        self.reads = reads


class Host(Protocol):
    """What the I/O thread does for its parts."""

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread, before the jobs that wait. From any thread."""

    def tell(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have `call` run on `loop` when the thread's turn ends."""

    def transact(self, jobs: list[Job], *, precise: bool = False) -> None:
        """Do all jobs in one transaction, and deliver their results."""


def for_future(future: asyncio.Future[Any]) -> Deliver:
    """Hand a result to who waits for `future`, unless he has gone."""

    def deliver(result: Any, error: BaseException | None) -> None:
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

    return deliver
