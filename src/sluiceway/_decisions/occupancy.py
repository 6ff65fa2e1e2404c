"""Where the time goes: how long messages wait and run, without a clock per message.

By Little's law the mean time in a state is the mean number of messages in it divided by the rate at which they pass. So
it is enough to keep, for each state, the area under its count over time, and to count what has finished.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp

from msgspec import Struct

FORGET = 5.0  # seconds: what happened so long ago weighs 1/e of what happens now
FOLD = 0.25  # seconds that weigh alike; what is told is so much behind


class TimeSpent(Struct, frozen=True, kw_only=True):
    """Where the time goes: seconds per message, averaged over the last seconds.

    The time of a message from receive to settle is the sum of these: `unstarted` it waited for a processor, `running`
    it was in the handler, `forming` it waited in a batch for the batch handler, `batched` it was in that, and
    `unsettled` its settlement was on its way to the broker.

    `waiting` is not the message's time but the processors': how long they stood idle for it while a receive waited for
    the broker. It is to be compared with `running`: where `waiting` is larger, more messages could be handled; where it
    is 0, the processors never ran dry.
    """

    unstarted: float
    running: float
    forming: float
    batched: float
    unsettled: float
    waiting: float


class Level:
    """A count over time, and the area under it since it was last taken: the sum of what each message spent there."""

    __slots__ = ("_area", "_at", "count")

    def __init__(self, now: float) -> None:
        self.count = 0
        self._area = 0.0
        self._at = now

    def step(self, now: float, count: int) -> None:
        """The count is `count` from now on; until now it was what it was."""
        self._area += self.count * (now - self._at)
        self._at = now
        self.count = count

    def drift(self, now: float, count: int) -> None:
        """The count has come to `count` evenly since it was last told."""
        self._area += (self.count + count) / 2 * (now - self._at)
        self._at = now
        self.count = count

    def take(self, now: float) -> float:
        """The area until now, which is forgotten."""
        self.step(now, self.count)
        area, self._area = self._area, 0.0
        return area


class Occupancy:
    """How many messages of one pipeline were in which state, and how many passed.

    It is told of whatever the pipeline learns anyway: that a receive was asked or returned, that a settle call began or
    returned, that a processor begins or ends a run, that a batch handler does. Which of the messages within a run wait
    and which are in a batch already, nobody says; where there are batchers, `unstarted` is asked at these moments.
    `processors`: how many there are. `forget`: in so many seconds the weight of what happened falls to 1/e.
    """

    def __init__(self, now: float, *, processors: int, forget: float = FORGET) -> None:
        self.unstarted: Callable[[], int] | None = None  # how many messages wait for a processor, where it is asked
        self.held = Level(now)
        self.running = Level(now)  # processors within a run
        self.batched = Level(now)
        self.unsettled = Level(now)
        self._unstarted = Level(now)
        self._waiting = Level(now)  # processors that are idle while a receive waits
        self._levels = (self.held, self.running, self.batched, self.unsettled, self._unstarted, self._waiting)
        self._idle = processors
        self._asking = False
        self._received = 0
        self._finished = 0
        self._forget = forget
        self._since = now
        self._spent = [0.0] * len(self._levels)
        self._passed = (0.0, 0.0, 0.0)  # messages received, messages finished, seconds

    def asked(self, now: float) -> None:
        """A receive begins to wait."""
        self._asking = True
        self._waiting.step(now, self._idle)

    def received(self, now: float, count: int, held: int) -> None:
        """A receive returned `count` messages; `held` are held with them."""
        self._asking = False
        self._waiting.step(now, 0)
        self.held.step(now, held)
        if self.unstarted is not None:
            self._unstarted.drift(now, self.unstarted())
        self._received += count
        if now - self._since >= FOLD:
            self._fold(now)

    def queued(self, now: float, ready: int) -> None:
        """`ready` messages that may start were queued; those for which a processor is idle start at once."""
        if self.unstarted is not None:
            self._unstarted.step(now, self.unstarted() - min(ready, self._idle))

    def processing(self, now: float, running: int, idle: int) -> None:
        """So many processors are within a run from now on, and so many have nothing to do."""
        self.running.step(now, running)
        self._idle = idle
        if self._asking:
            self._waiting.step(now, idle)
        if self.unstarted is not None:
            self._unstarted.drift(now, self.unstarted())

    def finished(self, now: float, count: int, held: int) -> None:
        """`count` deliveries have ended; `held` are left."""
        self.held.step(now, held)
        self._finished += count
        if now - self._since >= FOLD:
            self._fold(now)

    def rates(self, now: float) -> tuple[float, float]:
        """Messages per second received and finished, over the last seconds."""
        if now - self._since >= FOLD:
            self._fold(now)
        received, finished, seconds = self._passed
        return (received / seconds, finished / seconds) if seconds > 0 else (0.0, 0.0)

    def spent(self, now: float) -> TimeSpent | None:
        """Where the time went, over the last seconds; None before the first message has finished."""
        if now - self._since >= FOLD:
            self._fold(now)
        held, running, batched, unsettled, unstarted, waiting = self._spent
        count = self._passed[1]
        if count <= 0:
            return None
        # What is not told exactly takes no more than the exact areas leave, so that all add up to the time held.
        left = max(0.0, held - running - batched)
        unsettled = min(unsettled, left)
        left -= unsettled
        unstarted = left if self.unstarted is None else min(unstarted, left)
        return TimeSpent(
            unstarted=unstarted / count,
            running=running / count,
            forming=(left - unstarted) / count,
            batched=batched / count,
            unsettled=unsettled / count,
            waiting=waiting / count,
        )

    def _fold(self, now: float) -> None:
        """Let what was count less, and add what has been since."""
        seconds = now - self._since
        keep = exp(-seconds / self._forget)
        self._spent = [keep * area + level.take(now) for area, level in zip(self._spent, self._levels, strict=True)]
        received, finished, elapsed = self._passed
        self._passed = (keep * received + self._received, keep * finished + self._finished, keep * elapsed + seconds)
        self._received = self._finished = 0
        self._since = now
