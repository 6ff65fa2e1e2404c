"""Counting what the pipelines of this process do."""

from __future__ import annotations

from collections import Counter, deque

from ..app import App
from ..telemetry import MessageFailed, Settled
from .events import ConsumerStatus

RATE_SECONDS = 2.0  # the rate shown is over about so long


class Counts:
    """What became of the messages of each consumer, from the app's events; and at what rate."""

    def __init__(self, app: App, names: tuple[str, ...]) -> None:
        self.names = names
        self.failed: Counter[str] = Counter()
        self.waiting: dict[str, int | None] = {}
        self._app = app
        self._emptied = False
        self._settled: Counter[tuple[str, str]] = Counter()
        self._past: deque[tuple[float, dict[str, int]]] = deque()
        app.telemetry.attach(self._on_settled, Settled)
        app.telemetry.attach(self._on_failed, MessageFailed)

    def emptied(self) -> None:
        """Nothing waits, as `ConsumerManager.idle` has found; that is what the last status says."""
        self._emptied = True

    def stopped_asking(self) -> None:
        """What waits is not known any more, unless nothing did: a drain hands back what no answer has counted."""
        known = self._emptied and self._app.transport.features.backlog
        self.waiting = dict.fromkeys(self.names, 0 if known else None)

    def of(self, name: str, outcome: str) -> int:
        """How many of a consumer's messages ended so."""
        return self._settled[name, outcome]

    def total(self, outcome: str) -> int:
        """How many messages ended so."""
        return sum(self.of(name, outcome) for name in self.names)

    def status(self, now: float) -> tuple[ConsumerStatus, ...]:
        """Every consumer at this moment; `now` is the loop's clock."""
        rates = self._rates(now)
        return tuple(
            ConsumerStatus(
                consumer=one.consumer,
                state=one.state,
                reason=one.reason,
                restarts=one.restarts,
                handled=self.of(one.consumer, "ack"),
                rate=rates[one.consumer],
                in_hand=one.held,
                window=one.window,
                failed=self.failed[one.consumer],
                retried=self.of(one.consumer, "retry"),
                dead_lettered=self.of(one.consumer, "dead_letter"),
                released=self.of(one.consumer, "release"),
                waiting=self.waiting.get(one.consumer),
            )
            for one in self._app.manager.stats()
            if one.consumer in self.names
        )

    def _rates(self, now: float) -> dict[str, float]:
        handled = {name: self.of(name, "ack") for name in self.names}
        self._past.append((now, handled))
        while len(self._past) > 2 and now - self._past[0][0] > RATE_SECONDS:
            self._past.popleft()
        since, before = self._past[0]
        seconds = now - since
        return {name: round((handled[name] - before[name]) / seconds, 1) if seconds > 0 else 0.0 for name in self.names}

    def _on_settled(self, event: Settled) -> None:
        self._settled[event.consumer, event.outcome] += event.count

    def _on_failed(self, event: MessageFailed) -> None:
        if event.outcome != "release":  # a drain hands back what it cuts off: that is nobody's failure
            self.failed[event.consumer] += 1
