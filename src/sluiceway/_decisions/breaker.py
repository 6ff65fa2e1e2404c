"""A circuit breaker: when demand stops because of failures, and when one message may try whether that is over.

The well-kept libraries (pybreaker, purgatory, aiobreaker) refuse calls. Here an open breaker has to say how many
messages may be asked for, and when next; none does, and none takes `now`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from typing import Literal

from ..retry import Retry
from .backoff import retry_delay

BreakerState = Literal["closed", "open", "half-open"]
Start = Literal["pass", "probe", "back", "gives way"]

PROBES = 3  # failed probes of one message, of which the last counts
WAY = 1.0  # seconds, at most, for which a message that failed as the probe gives way to others


class Breaker:
    """Closed, it lets all messages pass. `failures` within `within` seconds open it: none passes. After a delay it is
    half-open: one message passes, the probe. When that succeeds the breaker closes; when it fails, it opens again, for
    longer each time, as `backoff` says.

    A probe's failure is the dependency's and not the message's own. But it may be the message. So one that has failed
    as the probe gives way once, each time that the breaker is half-open, to those that have not; and when there are
    none, or none of them succeeds either, of every `PROBES` failed probes of one message the last counts.

    All methods take `now` in seconds; `draw` is a random number between 0 and 1. `message` is what names a message.
    """

    def __init__(self, failures: int, within: float, backoff: Retry) -> None:
        self.within = within
        self.backoff = backoff
        self._state: BreakerState = "closed"
        self._failed: deque[float] = deque(maxlen=failures)
        self._opened = 0  # times in a row
        self._delay = 0.0  # how long it opened the last time
        self._due = 0.0  # open: when it is half-open; half-open: when a message may be asked for
        self._probing = False
        self._probes: Counter[Hashable] = Counter()  # failed ones by message, since it was closed and since one counted
        self._gave_way: set[Hashable] = set()  # messages, since it was half-open

    @property
    def closed(self) -> bool:
        """Whether everything passes."""
        return self._state == "closed"

    def state(self, now: float) -> BreakerState:
        """Closed, open or half-open."""
        if self._state == "open" and now >= self._due:
            self._state = "half-open"
        return self._state

    def allow(self, now: float, wanted: int) -> int:
        """How many of `wanted` messages may be asked for."""
        if self._state == "closed":
            return wanted
        return min(wanted, 1) if self.state(now) == "half-open" and not self._probing and now >= self._due else 0

    def took(self, now: float) -> None:
        """A message was received. If it never starts, another may be asked for after the delay."""
        if self._state == "half-open":
            self._due = now + self._delay

    def opens_at(self, now: float) -> float | None:
        """When the next message may be asked for; None: now, or once the probe has ended."""
        return None if self._state == "closed" or self._probing or now >= self._due else self._due

    @property
    def way(self) -> float:
        """For how many seconds a message gives way."""
        return min(WAY, self._delay)

    def starts(self, now: float, message: Hashable) -> Start:
        """What becomes of a message that is about to start: it passes, is the probe, goes back, or gives way."""
        state = self.state(now)
        if state == "closed":
            return "pass"
        if state == "open" or self._probing:
            return "back"
        if self._probes[message] and message not in self._gave_way:
            self._gave_way.add(message)
            self._due = now
            return "gives way"
        self._probing = True
        return "probe"

    def failed(self, now: float, draw: float) -> bool:
        """A message that is no probe failed; returns whether that opened the breaker."""
        if self._state != "closed":
            return False  # it had started before
        self._failed.append(now)
        if len(self._failed) < (self._failed.maxlen or 1) or now - self._failed[0] > self.within:
            return False
        self._open(now, draw)
        return True

    def close(self) -> None:
        """The probe succeeded, or a person says so."""
        self._state = "closed"
        self._probing = False
        self._opened = 0
        self._failed.clear()
        self._probes.clear()

    def probe_failed(self, now: float, draw: float, message: Hashable) -> tuple[float, bool]:
        """Open again; returns for how many seconds, and whether the failure counts."""
        self._open(now, draw)
        self._probes[message] += 1
        counts = self._probes[message] == PROBES
        if counts:
            del self._probes[message]
        return self._delay, counts

    def probe_unknown(self, now: float) -> None:
        """The probe ended in a way that says nothing: the next message is the probe."""
        self._probing = False
        self._due = now

    def _open(self, now: float, draw: float) -> None:
        self._state = "open"
        self._probing = False
        self._opened += 1
        self._gave_way.clear()
        self._failed.clear()
        self._delay = retry_delay(self.backoff, self._opened, draw)
        self._due = now + self._delay
