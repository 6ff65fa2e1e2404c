"""How many messages a worker process may have in hand: one that runs, and those sent ahead of it."""

from __future__ import annotations

AHEAD = 0.02  # seconds of work that are sent ahead: more than a message takes to a worker and back on a busy machine
MOST = 64
NEW = 0.2  # the weight of the newest message in the mean


class Ahead:
    """Follows how long messages take.

    Fast handlers would wait for the way of each message, so they get several at once. A slow one gets one at a time:
    what waits behind it could run elsewhere.
    """

    def __init__(self) -> None:
        self.limit = 1  # messages in the hand of one worker
        self._mean: float | None = None

    def saw(self, seconds: float) -> None:
        """A message took so many seconds in a worker."""
        self._mean = seconds if self._mean is None else self._mean + NEW * (seconds - self._mean)
        self.limit = 1 + min(MOST, int(AHEAD / max(self._mean, AHEAD / MOST)))
