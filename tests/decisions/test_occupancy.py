"""Where the time goes: areas under counts tell the mean times, whatever the arrivals and however long handlers take."""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluiceway._decisions.occupancy import Level, Occupancy, TimeSpent


class Station:
    """A queue before `processors` that take `service` seconds each, told to an occupancy as a pipeline tells it.

    Messages are settled `settling` seconds after their handler, all that have gathered in one call; or, with a `batch`
    size, after they have gathered in a batch whose handler takes `settling` seconds.
    """

    def __init__(self, processors: int, service: float, settling: float, batch: int | None = None) -> None:
        self.occupancy = Occupancy(0.0, processors=processors, forget=math.inf)
        self.processors = processors
        self.service = service
        self.settling = settling
        self.batch = batch
        self.now = 0.0
        self.sums = dict.fromkeys(TimeSpent.__struct_fields__, 0.0)
        self.done = 0
        self._queue: deque[float] = deque()  # when each was received
        self._gathered: list[float] = []  # when each was handled
        self._busy = 0
        self._held = 0
        self._sending = False
        self._asked = 0.0
        self._events: list[tuple[float, int, str, int]] = []
        self._numbers = count()
        if batch is not None:
            self.occupancy.unstarted = lambda: len(self._queue)

    def run(self, arrivals: list[tuple[float, int]]) -> TimeSpent:
        """Feed `arrivals`, each some seconds after the one before and of some messages; returns what it tells then."""
        self.occupancy.asked(0.0)
        at = 0.0
        for seconds, size in arrivals:
            at += seconds
            self._at(at, "received", size)
        while self._events or self._gathered:
            if not self._events:
                self._emit()  # what is left forms no full batch
            then, _, what, size = heappop(self._events)
            self._pass_to(then)
            getattr(self, what)(size)
        self.occupancy.received(self.now, 0, 0)  # the last receive has waited till now
        spent = self.occupancy.spent(self.now + 1)
        assert spent is not None
        return spent

    def _at(self, time: float, what: str, size: int = 0) -> None:
        heappush(self._events, (time, next(self._numbers), what, size))

    def _pass_to(self, then: float) -> None:
        self.sums["waiting"] += (then - self.now) * (self.processors - self._busy)  # a receive always waits
        self.sums["unstarted"] += (then - self.now) * len(self._queue)
        self.now = then

    def received(self, size: int) -> None:
        self._held += size
        self.occupancy.received(self.now, size, self._held)
        self._queue.extend([self.now] * size)
        self.occupancy.queued(self.now, len(self._queue))
        self._start()
        self.occupancy.asked(self.now)

    def _start(self) -> None:
        while self._queue and self._busy < self.processors:
            self._queue.popleft()
            self._busy += 1
            self._note()
            self.sums["running"] += self.service
            self._at(self.now + self.service, "handled")

    def _note(self) -> None:
        self.occupancy.processing(self.now, self._busy, self.processors - self._busy)

    def handled(self, _: int) -> None:
        self._busy -= 1
        self._note()
        self._start()
        self._gathered.append(self.now)
        if self.batch is not None:
            if len(self._gathered) >= self.batch:
                self._emit()
        elif not self._sending:
            self._send()

    def _emit(self) -> None:
        self._level(self.occupancy.batched, len(self._gathered))
        self.sums["forming"] += sum(self.now - since for since in self._gathered)
        self.sums["batched"] += self.settling * len(self._gathered)
        self._at(self.now + self.settling, "batch_ended", len(self._gathered))
        self._gathered = []

    def _level(self, level: Level, change: int) -> None:
        level.step(self.now, level.count + change)

    def batch_ended(self, size: int) -> None:
        self._level(self.occupancy.batched, -size)
        self._finish(size)

    def _send(self) -> None:
        self._sending = True
        self._level(self.occupancy.unsettled, len(self._gathered))
        self.sums["unsettled"] += sum(self.now - since + self.settling for since in self._gathered)
        self._at(self.now + self.settling, "settled", len(self._gathered))
        self._gathered = []

    def settled(self, size: int) -> None:
        self._sending = False
        self.occupancy.unsettled.drift(self.now, size + len(self._gathered))
        self.occupancy.unsettled.step(self.now, 0)
        self._finish(size)
        if self._gathered:
            self._send()

    def _finish(self, size: int) -> None:
        self.done += size
        self._held -= size
        self.occupancy.finished(self.now, size, self._held)


seconds = st.integers(0, 40).map(lambda tenths: tenths / 10)
some_arrivals = st.lists(st.tuples(seconds, st.integers(1, 20)), min_size=1, max_size=30)


@given(some_arrivals, st.integers(1, 5), seconds)
def test_the_times_told_are_the_mean_times_of_the_messages(
    arrivals: list[tuple[float, int]], processors: int, service: float
) -> None:
    station = Station(processors, service, settling=0.0)
    told = station.run(arrivals)
    for name, total in station.sums.items():
        assert getattr(told, name) == pytest.approx(total / station.done, abs=1e-6), name


@given(some_arrivals, st.integers(1, 5), seconds, seconds)
def test_the_times_of_a_message_add_up_to_what_it_took(
    arrivals: list[tuple[float, int]], processors: int, service: float, settling: float
) -> None:
    station = Station(processors, service, settling)
    told = station.run(arrivals)
    exact = sum(station.sums[name] for name in ("unstarted", "running", "unsettled"))
    assert told.unstarted + told.running + told.unsettled == pytest.approx(exact / station.done, abs=1e-6)
    assert told.running == pytest.approx(station.sums["running"] / station.done, abs=1e-6)
    assert told.waiting == pytest.approx(station.sums["waiting"] / station.done, abs=1e-6)


@given(some_arrivals, st.integers(1, 5), seconds, st.integers(1, 10), seconds)
def test_with_batches_it_tells_the_wait_for_a_processor_from_the_wait_for_a_batch(
    arrivals: list[tuple[float, int]], processors: int, service: float, batch: int, settling: float
) -> None:
    station = Station(processors, service, settling, batch)
    told = station.run(arrivals)
    for name, total in station.sums.items():
        assert getattr(told, name) == pytest.approx(total / station.done, abs=1e-6), name


def test_what_finished_while_a_settle_was_on_its_way_waited_for_half_of_it() -> None:
    station = Station(processors=1, service=0.1, settling=1.0)
    told = station.run([(0.0, 101)])  # a call each second, of the ten handled meanwhile
    assert station.sums["unsettled"] / station.done == pytest.approx(1.5, abs=0.1)
    assert told.unsettled == pytest.approx(1.5, abs=0.1)


def test_messages_that_find_a_processor_idle_do_not_wait() -> None:
    occupancy = Occupancy(0.0, processors=3)
    queue = 0
    occupancy.unstarted = lambda: queue
    occupancy.received(0.0, 5, 5)
    queue = 5
    occupancy.queued(0.0, 5)
    queue = 2  # the processors have taken theirs a moment later, which nobody was told
    occupancy.processing(10.0, 3, 0)
    occupancy.finished(10.0, 5, 0)
    spent = occupancy.spent(10.0)
    assert spent is not None
    assert spent.unstarted == pytest.approx(2 * 10 / 5)


def test_nothing_is_told_before_the_first_message_has_finished() -> None:
    occupancy = Occupancy(5.0, processors=3)
    assert (occupancy.spent(5.0), occupancy.rates(5.0)) == (None, (0.0, 0.0))
    occupancy.asked(6.0)
    occupancy.received(7.0, 2, 2)
    assert occupancy.spent(8.0) is None


def test_what_was_long_ago_counts_no_more() -> None:
    occupancy = Occupancy(0.0, processors=1)
    now = 0.0
    for handler_seconds in [10.0] * 30 + [0.1] * 300:
        occupancy.received(now, 1, 1)
        occupancy.processing(now, 1, 0)
        now += handler_seconds
        occupancy.processing(now, 0, 1)
        occupancy.finished(now, 1, 0)
    spent = occupancy.spent(now)
    assert spent is not None
    assert spent.running == pytest.approx(0.1, rel=0.2)
    assert occupancy.rates(now)[1] == pytest.approx(10, rel=0.2)
    assert occupancy.rates(now + 60) == pytest.approx((0, 0), abs=0.01)


def test_a_level_is_the_area_under_its_count() -> None:
    level = Level(10.0)
    level.step(11.0, 4)
    level.step(13.0, 1)  # 8
    level.drift(15.0, 5)  # 6
    assert level.take(16.0) == pytest.approx(19)
    assert level.take(16.0) == 0
