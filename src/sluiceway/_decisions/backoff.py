"""Delays that grow, are capped, and are spread by chance."""

from __future__ import annotations

import math

from ..retry import Retry


def retry_delay(retry: Retry, attempt: int, draw: float) -> float:
    """Seconds before the attempt after `attempt`; `draw` is a random number between 0 and 1."""
    try:
        grown = retry.base_delay * float(retry.multiplier) ** (attempt - 1)
    except OverflowError:  # far beyond every longest delay
        grown = math.inf if retry.base_delay else 0.0
    return min(retry.longest_delay, grown) * (1 - retry.jitter * draw)


def reconnect_delay(tries: int, draw: float, *, base: float = 0.05, cap: float = 5.0) -> float:
    """Seconds before the next try after `tries` that failed: exponential, capped, half of it drawn at random."""
    return float(min(cap, base * 2 ** min(tries, 30))) * (0.5 + 0.5 * draw)


class RestartRule:
    """Whether a crashed pipeline may start again: at most `max_restarts` in `max_seconds`."""

    def __init__(self, max_restarts: int, max_seconds: float) -> None:
        self.max_restarts = max_restarts
        self.max_seconds = max_seconds
        self._crashes: list[float] = []

    def crashed(self, now: float, draw: float) -> float | None:
        """Note a crash; returns the seconds to wait before the next start, or None to give up."""
        self._crashes = [*(at for at in self._crashes if now - at < self.max_seconds), now]
        recent = len(self._crashes)
        return None if recent > self.max_restarts else reconnect_delay(recent, draw)
