"""Gates limit demand from outside a pipeline: a pause, a rate limit, a circuit breaker."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Protocol
from weakref import WeakMethod


class Gate(Protocol):
    """Something that limits demand. It never holds a message that was received.

    The intake asks `allow(now, wanted)` before each receive and takes what it says; `now` is the loop's clock in
    seconds. A gate that opens or closes by itself calls what `on_change` gave it.
    """

    def allow(self, now: float, wanted: int) -> int:
        """How many of `wanted` messages may be asked for now; 0 closes the gate. Asking takes nothing."""
        ...

    def took(self, now: float, count: int) -> None:
        """`count` messages were received."""
        ...

    def opens_at(self, now: float) -> float | None:
        """When to ask again while it is closed, on the loop's clock; None: when it says that it changed."""
        ...

    def on_change(self, call: Callable[[], None]) -> None:
        """Call this whenever the answer of `allow` may have changed: this and what was given before.

        Each pipeline that has the gate gives one, and another one after a restart. It may be held weakly.
        """
        ...


class Pause:
    """The gate that a person opens and closes: `close()` stops demand, `open()` lets it flow again.

    Several consumers may share one.
    """

    def __init__(self) -> None:
        self.closed = False
        self._calls: list[Callable[[], Callable[[], None] | None]] = []  # weak: a pipeline that ended is forgotten

    def close(self) -> None:
        """Ask for nothing more. What is in hand is handled. Idempotent."""
        self._set(True)

    def open(self) -> None:
        """Ask for messages again. Idempotent."""
        self._set(False)

    def _set(self, closed: bool) -> None:
        if self.closed != closed:
            self.closed = closed
            for held in list(self._calls):
                call = held()
                if call is not None:
                    call()

    def allow(self, now: float, wanted: int) -> int:
        return 0 if self.closed else wanted

    def took(self, now: float, count: int) -> None:
        pass

    def opens_at(self, now: float) -> float | None:
        return None

    def on_change(self, call: Callable[[], None]) -> None:
        self._calls = [held for held in self._calls if held() is not None]
        self._calls.append(WeakMethod(call) if isinstance(call, MethodType) else lambda: call)
