"""What is behind a circuit breaker: its decisions, the probe, and what it sees of each pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .._decisions.breaker import Breaker, BreakerState, Start
from ..batch import Batch, BatchHandler
from ..errors import DecodeError, Reject, Release, RetryLater
from ..message import SETTLED, Handler, Message
from .contract import Changes, loop_time

log = logging.getLogger("sluiceway.gate")


class Circuit:
    """One circuit breaker, as the pipelines that share it see it. `on_state` is called after each change of state."""

    def __init__(
        self, name: str, breaker: Breaker, on: tuple[type[BaseException], ...], on_state: Callable[[], None]
    ) -> None:
        self.name = name
        self.breaker = breaker
        self.changes = Changes()
        self.error: BaseException | None = None  # the last failure that opened it
        self._on = on
        self._on_state = on_state
        self._told: BreakerState = "closed"
        self._probe: Message[Any] | None = None

    def counts(self, error: BaseException) -> bool:
        """Whether `error` is a failure."""
        if isinstance(error, (Reject, Release, DecodeError)):
            return False
        return isinstance(error, self._on) and not (isinstance(error, RetryLater) and not error.counted)

    def starts(self, message: Message[Any]) -> Start:
        """What becomes of a message that is about to start."""
        start = self.breaker.starts(loop_time(), message.id)
        if start == "probe":
            self._probe = message
            self._tell()
        elif start == "gives way":
            self.changes.tell()  # another may be asked for
        return start

    def refusal(self) -> Release:
        """What a message or a batch that may not start ends with."""
        return Release(f"{self.name} is {self.breaker.state(loop_time())}")

    def probe_in(self, messages: Sequence[Message[Any]]) -> Message[Any] | None:
        """The probe, when it is one of these."""
        return self._probe if self._probe is not None and self._probe in messages else None

    def failed(self, error: BaseException) -> None:
        """A message that is no probe failed."""
        now = loop_time()
        if self.counts(error) and self.breaker.failed(now, _draw()):
            self._opened(error, (self.breaker.opens_at(now) or now) - now)

    def probe_failed(self, probe: Message[Any], error: BaseException) -> float | None:
        """Open again; returns in how many seconds the probe comes again, None: its failure counts as any other."""
        self._probe = None
        seconds, counts = self.breaker.probe_failed(loop_time(), _draw(), probe.id)
        self._opened(error, seconds)
        return None if counts else seconds

    def probe_unknown(self) -> None:
        """The probe ended in a way that says nothing of what the breaker is for."""
        self._probe = None
        self.breaker.probe_unknown(loop_time())
        self.changes.tell()

    def close(self) -> None:
        """The probe succeeded, or a person closes it."""
        was_closed = self.breaker.closed
        self.error = self._probe = None
        self.breaker.close()
        if not was_closed:
            log.info("%s is closed: messages flow again", self.name)
            self._tell()

    def _opened(self, error: BaseException, seconds: float) -> None:
        self.error = error
        log.warning(
            "%s is open (%s: %s); one message tries again in %.2f s", self.name, type(error).__name__, error, seconds
        )
        self._tell()

    def _tell(self) -> None:
        self.changes.tell()
        state = self.breaker.state(loop_time())
        if state == self._told:
            return
        self._told = state
        try:
            self._on_state()
        except Exception:
            log.exception("%s: on_state raised", self.name)


class CircuitWatch:
    """What a circuit breaker sees of one pipeline."""

    def __init__(self, circuit: Circuit, batched: bool) -> None:
        self._circuit = circuit
        self._batched = batched
        self._mine: Message[Any] | None = None  # the last probe of this pipeline
        self._giving_way: set[Message[Any]] = set()  # not started, so that others are the probe

    async def message(self, message: Message[Any], call_next: Handler) -> Any:
        circuit = self._circuit
        if circuit.breaker.closed:
            return await call_next(message)
        match circuit.starts(message):
            case "probe":
                self._mine = message
            case "gives way":
                self._giving_way.add(message)
                raise Release(f"it failed as the probe of {circuit.name} before; others are tried first")
            case "back":
                raise circuit.refusal()
        value = await call_next(message)
        ended = not self._batched or message.state >= SETTLED  # it may have acked itself
        if ended and message.error is None and circuit.probe_in((message,)):
            circuit.close()
        return value

    async def batch(self, batch: Batch[Any], call_next: BatchHandler) -> Any:
        circuit = self._circuit
        if not (circuit.breaker.closed or circuit.probe_in(batch)):
            raise circuit.refusal()
        value = await call_next(batch)
        probe = circuit.probe_in(batch)
        if probe is not None and probe.error is None:
            circuit.close()
        return value

    def failed(self, messages: Sequence[Message[Any]]) -> Mapping[Message[Any], RetryLater]:
        circuit = self._circuit
        way = self._giving_way.intersection(messages)
        self._giving_way -= way
        uncounted = {one: RetryLater(circuit.breaker.way, counted=False) for one in way}
        probe = circuit.probe_in(messages)
        if probe is None:
            for error in {id(one.error): one.error for one in messages}.values():  # a failed batch has one for all
                if error is not None:
                    circuit.failed(error)
        elif probe.error is None or not circuit.counts(probe.error):
            circuit.probe_unknown()
        else:
            seconds = circuit.probe_failed(probe, probe.error)
            if seconds is not None:
                uncounted[probe] = RetryLater(seconds, f"{circuit.name}: the probe failed", counted=False)
        return uncounted

    def gone(self, messages: Collection[Message[Any]]) -> None:
        if self._mine is not None and self._mine in messages and self._circuit.probe_in((self._mine,)):
            self._circuit.probe_unknown()

    def stopped(self) -> None:
        if self._mine is not None:
            self.gone((self._mine,))


def _draw() -> float:
    import random  # at the first failure: loading it takes 9 ms

    return random.random()
