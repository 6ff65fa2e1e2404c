"""Leases are renewed from a thread, so that no handler that blocks the loop can lose them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from ..message import Message
from ..source import Renewer, Source
from .chance import draw
from .settler import PipelineSettler

log = logging.getLogger("sluiceway.leases")


class LeaseKeeper:
    """Renews the leases of all that is held every third of the lease, with jitter, on one thread of its own. While
    nothing is held the thread sleeps, until `needed` is set."""

    def __init__(self, name: str, source: Source, settler: PipelineSettler) -> None:
        self.name = name
        self.source = source
        self.settler = settler
        self.needed = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        if self.source.renewer is not None and self.source.lease is not None:
            renew = (self.source.renewer, self.source.lease / 3)
            thread = threading.Thread(target=self._run, args=renew, name=f"{self.name}: leases", daemon=True)
            thread.start()
            self._thread = thread

    async def stop(self) -> None:
        """Stop renewing. Idempotent."""
        self._stop.set()
        self.needed.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def _run(self, make: Callable[[], Renewer], interval: float) -> None:
        renewer: Renewer | None = None
        pause = interval
        while self.needed.wait() and not self._stop.wait(pause * (0.8 + 0.2 * draw())):
            pause = interval
            held = list(self.settler.held)  # one step of C code, so the loop cannot change the set meanwhile
            if not held:
                self.needed.clear()
                if self.settler.held or self._stop.is_set():  # since just now
                    self.needed.set()
                continue
            try:
                if renewer is None:
                    renewer = make()
                lost = set(renewer.renew([message.token for message in held]))
            except Exception as error:
                log.warning("%s: renewing %d leases failed: %s; trying again soon", self.name, len(held), error)
                if renewer is not None:
                    renewer.close()
                renewer = None
                pause = min(interval, 1.0)
                continue
            if lost:
                self._tell([message for message in held if message.token in lost])
        if renewer is not None:
            renewer.close()

    def _tell(self, lost: list[Message[Any]]) -> None:
        log.warning("%s: %d leases were lost; other consumers handle those messages again", self.name, len(lost))
        try:
            self._loop.call_soon_threadsafe(self.settler.forget, lost)
        except RuntimeError:
            self._stop.set()  # the loop is closed
