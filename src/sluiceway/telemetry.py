"""What a pipeline tells: every event is a class here, attached to by type.

    app.telemetry.attach(lambda event: print(event), MessageFailed)

Listeners are called in the loop and must return at once. One that raises is detached, once, with a log line. An event
that nobody listens to is not even made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from msgspec import Struct

from .message import BatchInfo, Outcome

log = logging.getLogger("sluiceway.telemetry")


class Event(Struct, frozen=True, kw_only=True):
    """What all events have: the consumer's name."""

    consumer: str


class PipelineStarted(Event, frozen=True):
    """A pipeline runs: its source is open. `restarts`: how often it crashed before."""

    topics: tuple[str, ...]
    group: str
    restarts: int = 0


class PipelineCrashed(Event, frozen=True):
    """A pipeline crashed and starts again in `delay` seconds; None: it is given up."""

    error: BaseException
    delay: float | None


class PipelineStopped(Event, frozen=True):
    """A pipeline has drained in `seconds`: `released` went back unstarted, `cancelled` were cut off while running."""

    seconds: float
    released: int
    cancelled: int


class Received(Event, frozen=True):
    """One receive returned: `count` messages of a demand of `demand`."""

    demand: int
    count: int


class MessageFailed(Event, frozen=True):
    """A handler or a batch handler failed a message; `outcome` is what happens with it, after `delay` seconds."""

    topic: str
    id: str
    attempt: int
    error: BaseException
    outcome: Outcome
    delay: float


class SuspectRuns(Event, frozen=True):
    """A message that was in hand when a process died runs alone."""

    topic: str
    id: str
    attempt: int


class BatchFinished(Event, frozen=True):
    """A batch handler returned or raised after `seconds`; `failed` of the batch's messages failed."""

    info: BatchInfo
    seconds: float
    failed: int


class Settled(Event, frozen=True):
    """The broker took `count` settlements of one outcome."""

    outcome: Outcome
    count: int


class SettleRefused(Event, frozen=True):
    """The broker refused to settle a message: its lease was `lost`, or what belongs to it was `rejected`."""

    topic: str
    id: str
    kind: Literal["lost", "rejected"]
    detail: str


Listener = Callable[[Any], None]


class Telemetry:
    """Who listens to what. One per app, handed to every pipeline."""

    def __init__(self) -> None:
        self._listeners: dict[type[Event], tuple[Listener, ...]] = {}

    def attach(self, listener: Listener, *events: type[Event]) -> None:
        """Call `listener` for each event of these types (none named, or `Event`: for all)."""
        for kind in Event.__subclasses__() if Event in events or not events else events:
            self._listeners[kind] = (*self._listeners.get(kind, ()), listener)

    def detach(self, listener: Listener) -> None:
        """Stop calling `listener`. Idempotent."""
        for kind, listeners in list(self._listeners.items()):
            kept = tuple(other for other in listeners if other != listener)
            if kept:
                self._listeners[kind] = kept
            else:
                del self._listeners[kind]

    def wants(self, kind: type[Event]) -> bool:
        """Whether anybody listens to `kind`: ask before making an event."""
        return kind in self._listeners

    def emit(self, event: Event) -> None:
        """Hand `event` to its listeners, in the order in which they were attached."""
        for listener in self._listeners.get(type(event), ()):
            try:
                listener(event)
            except Exception:
                log.exception("a telemetry listener raised on %s and is detached", type(event).__name__)
                self.detach(listener)
