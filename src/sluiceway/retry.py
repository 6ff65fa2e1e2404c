"""How often and how late a failed message is tried again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from msgspec import Struct, StructMeta

from .errors import OptionError, unknown

MAX_DELAY = 300.0  # seconds, unless said otherwise


class ByName(StructMeta):
    """The type of a Struct whose users write its fields by name: a misspelt one is told with the nearest right one."""

    if not TYPE_CHECKING:  # type checkers know a Struct's fields by themselves, and would believe this signature

        def __call__(self, *given: Any, **named: Any) -> Any:
            name, fields = self.__name__, self.__struct_fields__
            if given:
                raise OptionError(f"{name}: options are given by name, like {name}({fields[0]}={given[0]!r})")
            for one in named:
                if one not in fields:
                    raise unknown(name, one, fields)
            return super().__call__(**named)


class Retry(Struct, metaclass=ByName, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exponential backoff with jitter, held by the broker.

    - `attempts`: how many in all, the first included; 1 means no retry.
    - `base_delay`: seconds before the second attempt; each further delay is `multiplier` times the last.
    - `max_delay`: seconds, the most one delay grows to, `base_delay` or more; None: 300, or `base_delay` where that
      is more.
    - `jitter`: the share of each delay that is drawn at random, 0 to 1: 0.5 gives 50 % to 100 % of it, so that
      messages that failed together do not come back together.
    - `never`: a tuple of exception types that go to dead letters at once; the rest is tried again.

    Raises OptionError for a name or a value that is not allowed.
    """

    attempts: int = 4
    base_delay: float = 1.0
    multiplier: float = 2.0
    max_delay: float | None = None
    jitter: float = 0.5
    never: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        _check("attempts", self.attempts, _number(self.attempts, int, 1), "a whole number, 1 or more")
        _check("base_delay", self.base_delay, _number(self.base_delay, float, 0), "0 or more seconds")
        _check("multiplier", self.multiplier, _number(self.multiplier, float, 1), "1 or more")
        if self.max_delay is not None:
            _check("max_delay", self.max_delay, _number(self.max_delay, float, 0), "0 or more seconds")
            enough = f"base_delay ({self.base_delay:g} seconds) or more, or base_delay be less"
            _check("max_delay", self.max_delay, self.max_delay >= self.base_delay, enough)
        _check("jitter", self.jitter, _number(self.jitter, float, 0) and self.jitter <= 1, "between 0 and 1")
        _check("never", self.never, _exception_types(self.never), "a tuple of exception types")

    @property
    def longest_delay(self) -> float:
        """Seconds, the most that one delay grows to: `max_delay`, or what stands in its place."""
        return max(MAX_DELAY, self.base_delay) if self.max_delay is None else self.max_delay


def _check(name: str, value: Any, allowed: bool, what: str) -> None:
    if not allowed:
        raise OptionError(f"Retry: {name} must be {what}, got {value!r}")


def _number(value: Any, kind: type[int] | type[float], least: int) -> bool:
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    return number and least <= value <= sys.float_info.max


def _exception_types(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, type) and issubclass(one, BaseException) for one in value)


NO_RETRY = Retry(attempts=1)
