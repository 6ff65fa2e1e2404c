"""Pause: the gate that a person opens and closes."""

from __future__ import annotations

from collections.abc import Callable

from .contract import Changes


class Pause:
    """The gate that a person opens and closes: `close()` stops demand, `open()` lets it flow again.

    Several consumers may share one.
    """

    def __init__(self) -> None:
        self.closed = False
        self._changes = Changes()

    def close(self) -> None:
        """Ask for nothing more. What is in hand is handled. Idempotent."""
        self._set(True)

    def open(self) -> None:
        """Ask for messages again. Idempotent."""
        self._set(False)

    def _set(self, closed: bool) -> None:
        if self.closed != closed:
            self.closed = closed
            self._changes.tell()

    def allow(self, now: float, wanted: int) -> int:
        return 0 if self.closed else wanted

    def took(self, now: float, count: int) -> None:
        pass

    def opens_at(self, now: float) -> float | None:
        return None

    def on_change(self, call: Callable[[], None]) -> None:
        self._changes.add(call)

    def __str__(self) -> str:
        return f"{'closed' if self.closed else 'open'} by hand"
