"""What a pipeline tells: every event is a class here, attached to by type.

    app.telemetry.attach(lambda event: print(event), MessageFailed)

Listeners are called in the loop and must return at once. One that raises is detached, once, with a log line. An event
that nobody listens to is not even made, and listeners come and go while pipelines run.

What takes a while is a span of two events: one ends in `Started`, the other in `Finished`. The second has the same
fields, the `seconds` between the two, and the `error` that it ended with: None when it went well. A span whose start
was told ends exactly once, also when it is cut off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from inspect import iscoroutinefunction
from typing import Any, Literal

from msgspec import Struct

from .batch import BatchInfo
from .errors import OptionError
from .message import Outcome
from .topology import Topology

log = logging.getLogger("sluiceway.telemetry")


class Event(Struct, frozen=True, kw_only=True):
    """What all events have: `consumer`, its name; empty where no consumer did it."""

    consumer: str


# -- the life of a pipeline ------------------------------------------------------------------------------------------


class PipelineStarted(Event, frozen=True):
    """A pipeline runs: its source is open. `topology`: its stages; `restarts`: how often it crashed before."""

    topology: Topology
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


# -- from the broker to the processors -------------------------------------------------------------------------------


class Demanded(Event, frozen=True):
    """The source is asked for up to `demand` messages."""

    demand: int


class Received(Event, frozen=True):
    """One receive returned: `count` messages of a demand of `demand`. With them `held` are held, and up to `window`
    may be."""

    demand: int
    count: int
    held: int
    window: int


class Queued(Event, frozen=True):
    """`count` messages wait for a processor now, in their lanes where there are such; with them `unstarted` wait.

    What was received and is too large, or is a suspect that has to wait, is not among them.
    """

    count: int
    unstarted: int


class WindowFull(Event, frozen=True):
    """`window` messages are received and unsettled: demand stops until the broker has taken some settlements."""

    window: int


class SuspectRuns(Event, frozen=True):
    """A message that was in hand when a process died runs alone."""

    topic: str
    id: str
    attempt: int


# -- handlers --------------------------------------------------------------------------------------------------------


class RunStarted(Event, frozen=True):
    """A processor begins a run: it takes message after message until none waits or other work has its turn.

    `processor`: the name of its task, thread or process. On threads and in processes each message is a run.
    """

    processor: str


class RunFinished(Event, frozen=True):
    """A processor has ended a run over `count` messages, of which `failed` failed. `error`: what cut it off."""

    processor: str
    count: int
    failed: int
    seconds: float
    error: BaseException | None


class MessageStarted(Event, frozen=True):
    """A processor enters the handler, and the middleware round it, with a decoded message."""

    topic: str
    id: str
    attempt: int


class MessageFinished(Event, frozen=True):
    """The handler returned or raised after `seconds`. `error`: what it raised, or failed the message with.

    A handler that is cut off ends with `CancelledError`; one that ignores that, or runs on a thread, ends when it ends.
    """

    topic: str
    id: str
    attempt: int
    seconds: float
    error: BaseException | None


class MessageFailed(Event, frozen=True):
    """A message failed; `outcome` is what happens with it, after `delay` seconds.

    `error` is what its handler or batch handler failed with, or why it could not be decoded, routed or run in time.
    """

    topic: str
    id: str
    attempt: int
    error: BaseException
    outcome: Outcome
    delay: float


class HandleFailedStarted(Event, frozen=True):
    """`handle_failed` is called with the messages `ids`, which are not tried again."""

    ids: tuple[str, ...]


class HandleFailedFinished(Event, frozen=True):
    """`handle_failed` returned or raised after `seconds`; its messages end as decided either way."""

    ids: tuple[str, ...]
    seconds: float
    error: BaseException | None


# -- batches ---------------------------------------------------------------------------------------------------------


class BatchEmitted(Event, frozen=True):
    """A batcher has emitted a batch: it waits for a batch processor. `info` says why it went and what it holds."""

    info: BatchInfo


class BatchStarted(Event, frozen=True):
    """A batch processor enters the batch handler with the messages `ids`."""

    info: BatchInfo
    ids: tuple[str, ...]


class BatchFinished(Event, frozen=True):
    """A batch handler returned or raised after `seconds`; `failed` of the batch's messages failed.

    `error` failed the whole batch; None also when only single messages failed.
    """

    info: BatchInfo
    ids: tuple[str, ...]
    failed: int
    seconds: float
    error: BaseException | None


# -- back to the broker ----------------------------------------------------------------------------------------------


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


class Published(Event, frozen=True):
    """The broker has `count` messages that were published to `topic`.

    Either a handler's, with the settle of its message, or the app's own: then `consumer` is empty.
    """

    topic: str
    count: int


Listener = Callable[[Any], None]


class Attachment:
    """A listener that is attached. Call `detach()`, or attach it in a `with` block, at whose end it is detached."""

    __slots__ = ("_telemetry", "attached", "listener")

    def __init__(self, telemetry: Telemetry, listener: Listener) -> None:
        self._telemetry = telemetry
        self.listener = listener
        self.attached = True

    def detach(self) -> None:
        """Call the listener no more for the events that were attached here. Idempotent."""
        self._telemetry._drop((self,))

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


class Telemetry:
    """Who listens to what. One per app, handed to every pipeline.

    `attached` has the listeners of each event that has some: where each call costs too much, look there.
    """

    def __init__(self) -> None:
        self.attached: dict[type[Event], tuple[Attachment, ...]] = {}
        self._watchers: list[Callable[[], None]] = []

    def attach(self, listener: Listener, *events: type[Event]) -> Attachment:
        """Call `listener` for each event of these types (none named, or `Event`: for all), until it is detached.

        It works at once, also for pipelines that run. Spans that have begun are told from their next start on. Raises
        OptionError for what is no event class or no plain function.
        """
        _check(listener, events)
        attachment = Attachment(self, listener)
        for kind in Event.__subclasses__() if Event in events or not events else dict.fromkeys(events):
            self.attached[kind] = (*self.attached.get(kind, ()), attachment)
        self._changed()
        return attachment

    def detach(self, listener: Listener) -> None:
        """Stop calling `listener`, wherever it was attached. Idempotent."""
        self._drop([one for many in self.attached.values() for one in many if one.listener == listener])

    def wants(self, *kinds: type[Event]) -> bool:
        """Whether anybody listens to one of `kinds`: ask before making an event."""
        return bool(self.attached) and not self.attached.keys().isdisjoint(kinds)

    def emit(self, event: Event) -> None:
        """Hand `event` to its listeners, in the order in which they were attached."""
        for one in self.attached.get(type(event), ()):
            if one.attached:
                try:
                    one.listener(event)
                except Exception:
                    log.exception("a telemetry listener raised on %s and is detached", type(event).__name__)
                    self.detach(one.listener)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever `wants` may answer otherwise than before: for who would have to ask too often."""
        self._watchers.append(changed)

    def unwatch(self, changed: Callable[[], None]) -> None:
        """Call `changed` no more. Idempotent."""
        if changed in self._watchers:
            self._watchers.remove(changed)

    def _drop(self, gone: Sequence[Attachment]) -> None:
        for one in gone:
            one.attached = False
        left = {kind: tuple(one for one in many if one.attached) for kind, many in self.attached.items()}
        self.attached = {kind: many for kind, many in left.items() if many}
        self._changed()

    def _changed(self) -> None:
        for changed in list(self._watchers):
            changed()


def _check(listener: object, kinds: Sequence[object]) -> None:
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, Event)):
            raise OptionError(f"telemetry.attach: name event classes of sluiceway.telemetry, got {kind!r}")
    if not callable(listener) or iscoroutinefunction(listener):
        raise OptionError(f"telemetry.attach: a listener is a plain function (event), got {listener!r}")
