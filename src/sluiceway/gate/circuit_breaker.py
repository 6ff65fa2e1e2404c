"""The circuit breaker."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .._decisions.breaker import Breaker, BreakerState
from ..errors import OptionError
from ..retry import Retry
from .circuit import Circuit, CircuitWatch
from .contract import loop_time

UNNAMED = "circuit breaker"
JITTER = 0.2  # of each time that it is open, so that many processes do not try again together


class CircuitBreaker:
    """Stops demand while what the handlers depend on is down, instead of burning the attempts of message after message.

        database = CircuitBreaker("database", failures=5, within=10, on=(ConnectionError, TimeoutError))
        @app.consumer("orders", gates=[database])

    - Closed, everything passes. `failures` failures within `within` seconds open it. A batch that fails as a whole is
      one failure, and so is a handler that ran over the consumer's `timeout`. What fails until then counts as ever.
    - Open, nothing is asked for. Messages and batches in hand that have not started go back to the broker, uncounted.
    - After `reset_after` seconds it is half-open: one message is asked for, the probe. When it succeeds the breaker
      closes. When it fails, that is not counted as an attempt and tried again later, and the breaker opens again, twice
      as long each time up to `max_reset_after`. 80 % to 100 % of each time is drawn at random.
    - Next time a message that has not been the probe comes first. Every third failed probe of one message counts as an
      attempt, so that one which itself makes the dependency fail does not keep the breaker open for ever.

    `on` are the exception types that count; name those that speak of the dependency, and not of one bad message.
    Reject, Release, DecodeError and `RetryLater(counted=False)` never do. A probe that ends by those, or by another
    exception, says nothing: the next message is the probe. Pipelines may share a breaker, with one probe in all. Each
    process has its own.

    `on_state(breaker)` is called in the loop after each change of `state`, for half-open when the probe starts; one
    that raises is logged. `name` is for logs. Raises OptionError for a value that is not allowed.
    """

    def __init__(
        self,
        name: str = UNNAMED,
        *,
        failures: int = 5,
        within: float = 10.0,
        reset_after: float = 30.0,
        max_reset_after: float = 300.0,
        on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        on_state: Callable[[CircuitBreaker], None] | None = None,
    ) -> None:
        _check(name, "name", name, _is_name(name), "a non-empty string")
        _check(name, "failures", failures, _is_count(failures), "a whole number, 1 or more")
        _check(name, "within", within, _is_seconds(within), "seconds, more than 0")
        _check(name, "reset_after", reset_after, _is_seconds(reset_after), "seconds, more than 0")
        enough = _is_seconds(max_reset_after) and max_reset_after >= reset_after
        _check(name, "max_reset_after", max_reset_after, enough, f"seconds, reset_after ({reset_after}) or more")
        types = on if isinstance(on, tuple) else (on,)
        _check(name, "on", on, _are_exceptions(types), "an exception type or a tuple of them")
        _check(name, "on_state", on_state, on_state is None or callable(on_state), "a function (breaker), or None")
        backoff = Retry(base_delay=reset_after, max_delay=max_reset_after, jitter=JITTER)
        self.name = name
        self._on_state = on_state
        opens = f"{failures} failures in {within:g} s"
        self._rule = f"{opens} open it, for {reset_after:g} to {max_reset_after:g} s"
        self._circuit = Circuit(name, Breaker(failures, within, backoff), types, self._changed)

    @property
    def state(self) -> BreakerState:
        """Where it stands now: `closed`, `open` or `half-open`."""
        return self._circuit.breaker.state(loop_time())

    @property
    def error(self) -> BaseException | None:
        """The last failure that opened it; None while it is closed."""
        return self._circuit.error

    def reset(self) -> None:
        """Close it, whatever failed before. Call it in the loop's thread. Idempotent."""
        self._circuit.close()

    def watch(self, *, batched: bool) -> CircuitWatch:
        """What sees the messages of one pipeline; pipelines call this."""
        return CircuitWatch(self._circuit, batched)

    def allow(self, now: float, wanted: int) -> int:
        return self._circuit.breaker.allow(now, wanted)

    def took(self, now: float, count: int) -> None:
        self._circuit.breaker.took(now)

    def opens_at(self, now: float) -> float | None:
        return self._circuit.breaker.opens_at(now)

    def on_change(self, call: Callable[[], None]) -> None:
        self._circuit.changes.add(call)

    def _changed(self) -> None:
        if self._on_state is not None:
            self._on_state(self)

    def __str__(self) -> str:
        which = "" if self.name == UNNAMED else f" {self.name!r}"
        return f"{UNNAMED}{which} is {self.state}"

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.name!r}, {self.state}: {self._rule}>"


def _check(name: str, option: str, value: Any, allowed: bool, what: str) -> None:
    if not allowed:
        raise OptionError(f"CircuitBreaker {name!r}: {option} must be {what}; got {value!r}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _are_exceptions(types: tuple[Any, ...]) -> bool:
    return bool(types) and all(isinstance(one, type) and issubclass(one, BaseException) for one in types)
