"""Watching a pipeline while it is measured: when it is done, and that it never holds more than its window (G1)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import apsw

from sluiceway import App
from sluiceway.telemetry import MessageFailed, PipelineCrashed, Received, Settled

SAMPLE_EVERY = 0.05  # seconds between counts of what a broker says is held

Counting = AbstractContextManager[Callable[[], int]]
"""Gives, on the thread that enters it, a function that counts what the broker has handed out."""


@contextlib.contextmanager
def handed_out(path: Path) -> Iterator[Callable[[], int]]:
    """Counts what is handed out in a SQLite file."""
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    yield lambda: len(db.execute("SELECT seq FROM queue WHERE state = 2").fetchall())
    db.close()


class Watch:
    """Listens to an app's one pipeline.

    What is held grows only when a receive returns, so G1 is checked at each: by the pipeline's own count and, where
    `held_by_broker` can be asked cheaply, by the broker's. A receive may fill the window that held when it was asked,
    which is the one seen at the receive before; the window changes nowhere else.
    """

    def __init__(self, app: App, held_by_broker: Callable[[], int] | None = None) -> None:
        self.app = app
        self.settled = 0
        self.receives = 0
        self.window = self.largest_window = app.manager.stats()[0].window
        self.largest_held = 0
        self.faults: list[str] = []
        self._held_by_broker = held_by_broker
        self._target = 0
        self._done: asyncio.Future[None] | None = None
        self.on_settled: Callable[[int], None] | None = None
        app.telemetry.attach(self._received, Received)
        app.telemetry.attach(self._settled, Settled)
        app.telemetry.attach(self._failed, MessageFailed, PipelineCrashed)

    async def until(self, settled: int) -> None:
        """Return at the settle that makes it `settled` in all. Raises AssertionError for what went wrong meanwhile."""
        if self.settled < settled:
            self._target = settled
            self._done = asyncio.get_running_loop().create_future()
            await self._done
        self.check()

    def check(self) -> None:
        """Raise AssertionError when more was held than the window allowed, or a message failed."""
        assert not self.faults, self.faults[0]
        assert self.settled == 0 or self.receives > 0, "no receive was seen"

    def _received(self, event: Received) -> None:
        self.receives += 1
        self._allow("the pipeline holds", event.held, self.window)
        if self._held_by_broker is not None:
            self._allow("the broker counts", self._held_by_broker(), self.window)
        self.largest_held = max(self.largest_held, event.held)
        self.window = event.window
        self.largest_window = max(self.largest_window, event.window)

    def _allow(self, who: str, held: int, window: int) -> None:
        if held > window:
            self._fault(f"G1: {who} {held} messages with a window of {window}")

    def _settled(self, event: Settled) -> None:
        self.settled += event.count
        if event.outcome != "ack":
            self._fault(f"{event.count} messages ended in {event.outcome}")
        if self.on_settled is not None:
            self.on_settled(event.count)
        if self._done is not None and not self._done.done() and self.settled >= self._target:
            self._done.set_result(None)

    def _failed(self, event: Any) -> None:
        self._fault(f"{type(event).__name__}: {event.error!r}")

    def _fault(self, text: str) -> None:
        self.faults.append(text)
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    @contextlib.contextmanager
    def sampling(self, counting: Counting) -> Iterator[None]:
        """Meanwhile ask the broker how much is handed out, again and again on a thread."""
        stop = Event()

        def sample() -> None:
            try:
                with counting as held:
                    while not stop.wait(SAMPLE_EVERY):
                        self._allow("the broker says there are handed out", held(), self.largest_window)
            except Exception as error:
                self.faults.append(f"the broker could not be asked what is handed out: {error!r}")

        thread = Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
