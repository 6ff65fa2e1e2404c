"""The rate limit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .._decisions.rate import Limit, Rate
from ..errors import OptionError
from .contract import Changes, loop_time


class RateLimit:
    """Never more than `messages` received in any `seconds`, by all pipelines of this process that share it.

        limit = RateLimit(100, 60)
        @app.consumer("orders", gates=[limit])
        @app.consumer("refunds", gates=[limit])

    `burst` is the most at once; with `burst=1` messages come evenly, `seconds / messages` apart. Without it all of
    `messages` may come at once. Demand is limited before the broker is asked: what is over the limit stays there, for
    any other process. Every delivery counts, retries too. Pipelines that have messages share the limit evenly; one to
    which none come soon keeps no more than a single message of it from the others.

    Each process has its own: four worker processes receive four times as much.

    Raises OptionError unless `messages` is 1 or more, `seconds` more than 0 and `burst` between 1 and `messages`.
    """

    def __init__(self, messages: int, seconds: float, *, burst: int | None = None) -> None:
        self._rate = Rate(_limit(messages, seconds, burst))
        self._changes = Changes()

    @property
    def messages(self) -> int:
        """How many may be received in `seconds`."""
        return self._rate.limit(loop_time()).messages

    @property
    def seconds(self) -> float:
        """In how many seconds `messages` may be received."""
        return self._rate.limit(loop_time()).seconds

    @property
    def burst(self) -> int:
        """How many may be received at once."""
        limit = self._rate.limit(loop_time())
        return limit.burst or limit.messages

    @property
    def allowed(self) -> int:
        """How many may be received now."""
        return self._rate.free(loop_time())

    @property
    def resets_at(self) -> float:
        """When what was received until now counts no more, on the loop's clock; now when nothing counts."""
        return self._rate.resets_at(loop_time())

    def change(
        self, *, messages: int | None = None, seconds: float | None = None, burst: int | None = None, now: bool = True
    ) -> None:
        """Change the limit, at once, or with `now=False` at `resets_at`; what is left out stays as it is.

        What was received before still counts: a limit that is lowered below that allows nothing until enough of it is
        older than `seconds`. What is in hand is handled. A later call replaces one that has not taken effect. Call it
        in the loop's thread. Raises OptionError.
        """
        at = loop_time()
        limit = self._rate.limit(at)
        changed = _limit(
            limit.messages if messages is None else messages,
            limit.seconds if seconds is None else seconds,
            limit.burst if burst is None else burst,
        )
        self._rate.change(at, changed, at_once=now)
        self._changes.tell()

    def reset(self) -> None:
        """Forget what was received: all of the limit is free at once. Call it in the loop's thread."""
        self._rate.clear()
        self._changes.tell()

    def allow(self, now: float, wanted: int) -> int:
        return min(wanted, self._rate.free(now))

    def took(self, now: float, count: int) -> None:
        self._rate.take(now, count)

    def opens_at(self, now: float) -> float | None:
        return self._rate.grows_at(now)

    def on_change(self, call: Callable[[], None]) -> None:
        self._changes.add(call)

    def __str__(self) -> str:
        return f"rate limit of {self.messages} in {self.seconds:g} s"

    def __repr__(self) -> str:
        burst = "" if self.burst == self.messages else f", {self.burst} at once"
        return f"<RateLimit of {self.messages} in {self.seconds:g} s{burst}>"


def _limit(messages: Any, seconds: Any, burst: Any) -> Limit:
    if not (_is_int(messages) and messages >= 1):
        raise OptionError(f"RateLimit: messages must be a whole number, 1 or more; got {messages!r}")
    if not ((_is_int(seconds) or isinstance(seconds, float)) and 0 < seconds <= sys.float_info.max):
        raise OptionError(f"RateLimit: seconds must be more than 0; got {seconds!r}")
    if burst is not None and not (_is_int(burst) and 1 <= burst <= messages):
        raise OptionError(f"RateLimit: burst must be a whole number from 1 to messages ({messages}); got {burst!r}")
    return Limit(messages, float(seconds), burst)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
