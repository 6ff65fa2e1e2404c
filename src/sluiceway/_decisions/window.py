"""How many messages a pipeline may hold: what its processors finish in `buffer_time` seconds."""

from __future__ import annotations

MEASURE_AFTER = 0.1  # seconds of full processors that make a rate worth believing


class Window:
    """The window, following the measured rate.

    A fixed prefetch is wrong twice: too small for fast handlers, where the round trip dominates, and too large for slow
    ones, where one worker hoards what another could run. `size` stays between `floor` and `ceiling`; when both are
    equal it is pinned. It shrinks while bodies are so large that `max_bytes` would be exceeded.

    `horizon`: seconds of work to hold (buffer time, at most a third of the lease).
    """

    def __init__(self, *, floor: int, ceiling: int, horizon: float, max_bytes: int) -> None:
        self.floor = floor
        self.ceiling = max(floor, ceiling)
        self.horizon = horizon
        self.max_bytes = max_bytes
        self._size = floor
        self._largest = 1
        self._since: float | None = None
        self._finished = 0

    @property
    def size(self) -> int:
        """The most messages to hold now, 1 or more."""
        return max(1, min(self._size, self.max_bytes // self._largest))

    def saw_body(self, largest: int) -> None:
        """Note the largest body, in bytes, of what was received. It is forgotten by a tenth per call."""
        self._largest = max(largest, self._largest * 9 // 10, 1)

    def observe(self, now: float, finished: int, *, starved: bool) -> None:
        """Note that `finished` messages are done in all, and whether the processors ran out of messages.

        Starved processors were too fast for the window: it may double towards what they could finish, and never
        shrinks, since a rate without enough messages says nothing of the handlers. Busy ones tell their true rate.
        """
        if self._since is None:
            self._since, self._finished = now, finished
            return
        elapsed, done = now - self._since, finished - self._finished
        if elapsed <= 0 or done <= 0 or (not starved and elapsed < MEASURE_AFTER):
            if starved and done <= 0:
                self._since = now  # nothing to do is no slow work
            return
        target = int(min(done / elapsed * self.horizon, self.ceiling))
        if starved:
            target = max(self._size, min(target, 2 * self._size))
        self._size = max(self.floor, min(self.ceiling, target))
        self._since, self._finished = now, finished
