"""Credit: how much the broker may push. A prefetch cannot change, so a consumer more adds to it."""

from __future__ import annotations

import asyncio
import time

from .hand import Hand
from .hub import Hub
from .inlet import Inlet

_UNUSED = 5.0  # seconds that credit far above the demand is left with the broker
_CONSUMERS = 8  # after so many one takes their place


class Credit:
    """As much as is held and asked for: what the broker pushes beyond that, others cannot handle.

    `quiet` is set while no consumer is left and all that came has arrived.
    """

    def __init__(self, hub: Hub, inlet: Inlet, hand: Hand) -> None:
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.stale = 0  # the newest tag of a consumer that has ended
        self._hub = hub
        self._inlet = inlet
        self._hand = hand
        self._credit = 0  # what the broker may push, over all consumers
        self._consumers = 0  # at the broker, for each queue
        self._used = 0.0  # when a large part of the credit was last asked for

    def opened(self) -> None:
        """There is a channel, without consumers."""
        self._credit = self._consumers = self.stale = 0

    def ended(self) -> None:
        """The channel has ended."""
        self._credit = self._consumers = 0
        self.quiet.set()

    def is_quiet(self) -> None:
        """The broker says that no consumer is left."""
        self.stale = self._hand.tags.newest
        self.quiet.set()

    def ask(self, demand: int, window: int, *, apart: bool) -> None:
        """Let the broker push what is asked for. `apart`: nothing beside what it may push already."""
        if not self._hand.epoch or (not self.quiet.is_set() and not self._credit):
            return
        stale = self._hand.tags.open_until(self.stale)
        need = min(window, len(self._hand.held) + demand)
        now = time.monotonic()
        if 2 * need > self._credit:
            self._used = now
        elif now - self._used > _UNUSED:
            self.withdraw()
            return
        more = need - self._credit - stale
        if more > 0 and not (apart and self._credit):
            if self._consumers == _CONSUMERS:
                self.withdraw()
                return
            self._credit += more
            self._consumers += 1
            self.quiet.clear()
            self._hub.io.call(self._inlet.consume, self._hand.epoch, more)

    def withdraw(self) -> None:
        """Let the broker push nothing more."""
        if self._credit and self._hand.epoch:
            self._hub.takes_back(self._inlet.queues, self._credit)
            self._credit = self._consumers = 0
            self._hub.io.call(self._inlet.cancel, self._hand.epoch)
