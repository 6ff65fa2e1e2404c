"""Which deliveries of one channel are settled, and the fewest acks that say so."""

from __future__ import annotations

from collections.abc import Iterable


class Tags:
    """Delivery tags count from 1. One ack with `multiple` covers a tag and all before it, so it is sent only where each
    of those is settled."""

    def __init__(self) -> None:
        self.newest = 0  # the last that was delivered
        self._low = 1  # all below are settled
        self._done: set[int] = set()  # and these above

    def is_open(self, tag: int) -> bool:
        """Whether a delivery is not settled yet."""
        return tag >= self._low and tag not in self._done

    def open_until(self, tag: int) -> int:
        """How many up to `tag` are not settled."""
        if tag < self._low:
            return 0
        return tag + 1 - self._low - sum(done <= tag for done in self._done)

    def settle(self, tags: Iterable[int]) -> list[tuple[int, bool]]:
        """Note that these are settled; returns the acks to send, each a tag and whether it covers all before it too.

        Those that were settled before are passed over.
        """
        fresh = [tag for tag in tags if self.is_open(tag)]
        self._done.update(fresh)
        low = self._low
        while low in self._done:
            self._done.discard(low)
            low += 1
        self._low = low
        run = [tag for tag in fresh if tag < low]
        acks = [(tag, False) for tag in fresh if tag >= low]
        return [(max(run), True), *acks] if run else acks
