"""A rate limit: never more than so many messages in any so many seconds.

The window slides. A counter that is set back once per interval lets twice the limit through around each of its ends,
and a bucket of tokens lets through its content and what flows in meanwhile; whoever sits behind the limit counts any
interval, and refuses those. (No library was found that tells how many are free, takes `now` and sleeps nowhere:
aiolimiter, limits and pyrate-limiter take one at a time, by a clock of their own.)
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct

GRAIN = 100  # what is taken within this share of the interval counts from its end: 100 entries, at most 1 % too late


class _Taken(Struct):
    """Messages taken together: when the first and the last of them were."""

    first: float
    last: float
    count: int


class SlidingWindow:
    """At most `messages` are taken in any `seconds`."""

    def __init__(self, messages: int, seconds: float) -> None:
        self.messages = messages
        self.seconds = seconds
        self._taken: deque[_Taken] = deque()
        self._count = 0

    def free(self, now: float) -> int:
        """How many may be taken now."""
        self._forget(now)
        return max(0, self.messages - self._count)

    def take(self, now: float, count: int) -> None:
        """Note that `count` were taken; also more than are free."""
        self._count += count
        if self._taken and now - self._taken[-1].first < self.seconds / GRAIN:
            self._taken[-1].last = now
            self._taken[-1].count += count
        else:
            self._taken.append(_Taken(now, now, count))

    def opens_at(self, now: float) -> float:
        """When one may be taken: `now` or later."""
        self._forget(now)
        left = self._count
        at = now
        for taken in self._taken:
            if left < self.messages:
                break
            left -= taken.count
            at = taken.last + self.seconds
        return at

    def leaves_at(self, now: float) -> float:
        """When the oldest of what was taken counts no more: `now` when nothing counts."""
        self._forget(now)
        return self._taken[0].last + self.seconds if self._taken else now

    def resets_at(self, now: float) -> float:
        """When all may be taken, if none is until then: `now` or later."""
        self._forget(now)
        return self._taken[-1].last + self.seconds if self._taken else now

    def clear(self) -> None:
        """Forget what was taken."""
        self._taken.clear()
        self._count = 0

    def _forget(self, now: float) -> None:
        while self._taken and now >= self._taken[0].last + self.seconds:
            self._count -= self._taken.popleft().count


class Limit(Struct, frozen=True):
    """At most `messages` in any `seconds`, and at most `burst` of them at once; None: all of them may come at once."""

    messages: int
    seconds: float
    burst: int | None = None


class Rate:
    """What is free under a limit that may change."""

    def __init__(self, limit: Limit) -> None:
        self._window = SlidingWindow(limit.messages, limit.seconds)
        self._bursts = SlidingWindow(limit.messages, limit.seconds)
        self._next: tuple[float, Limit] | None = None  # when which limit takes the place of this one
        self._set(limit)

    def limit(self, now: float) -> Limit:
        """The limit that holds now."""
        if self._next is not None and now >= self._next[0]:
            for window in (self._window, self._bursts):
                window.free(now)  # what counts no more under this limit does not under the next one either
            self._set(self._next[1])
        return self._limit

    def free(self, now: float) -> int:
        """How many may be taken now."""
        self.limit(now)
        return min(self._window.free(now), self._bursts.free(now))

    def take(self, now: float, count: int) -> None:
        """Note that `count` were taken; also more than are free."""
        self.limit(now)
        self._window.take(now, count)
        self._bursts.take(now, count)

    def opens_at(self, now: float) -> float:
        """When to look again whether one may be taken: `now` or later."""
        self.limit(now)
        at = max(self._window.opens_at(now), self._bursts.opens_at(now))
        return at if self._next is None else min(at, self._next[0])

    def grows_at(self, now: float) -> float | None:
        """When to look again whether more may be taken than now; None: all may."""
        at = self.opens_at(now)
        times = [at] if at > now else [self._window.leaves_at(now), self._bursts.leaves_at(now)]
        return min((at for at in times if at > now), default=None)

    def resets_at(self, now: float) -> float:
        """When all may be taken, if none is until then: `now` or later."""
        self.limit(now)
        return self._window.resets_at(now)

    def change(self, now: float, limit: Limit, *, at_once: bool) -> None:
        """Put `limit` in the place of this one, at once or when what was taken until now counts no more.

        What was taken still counts under the new one.
        """
        if at_once:
            self._set(limit)
        else:
            self._next = (self.resets_at(now), limit)

    def clear(self) -> None:
        """Forget what was taken."""
        self._window.clear()
        self._bursts.clear()

    def _set(self, limit: Limit) -> None:
        self._limit = limit
        self._next = None
        self._window.messages, self._window.seconds = limit.messages, limit.seconds
        # At most `burst` in its share of the interval: as fast as the limit allows in the long run, but evenly.
        burst = limit.burst or limit.messages
        share = 1.0 if burst == limit.messages else burst / limit.messages
        self._bursts.messages, self._bursts.seconds = burst, limit.seconds * share
