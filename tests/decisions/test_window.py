"""The window follows the measured rate, within its bounds."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluiceway._decisions.window import MEASURE_AFTER, Window

STEP = st.floats(0, 1e6)
OBSERVATIONS = st.lists(st.tuples(STEP, st.integers(0, 10_000_000), st.booleans(), st.integers(0, 10_000_000)))


def make(floor: int = 10, ceiling: int = 1_000, horizon: float = 0.25, max_bytes: int = 64 << 20) -> Window:
    return Window(floor=floor, ceiling=ceiling, horizon=horizon, max_bytes=max_bytes)


@given(
    floor=st.integers(1, 5_000),
    ceiling=st.integers(1, 5_000),
    horizon=st.floats(1e-9, 1e9),
    max_bytes=st.integers(1, 1 << 40),
    seen=OBSERVATIONS,
)
def test_the_size_stays_between_one_and_the_ceiling_whatever_is_observed(
    floor: int, ceiling: int, horizon: float, max_bytes: int, seen: list[tuple[float, int, bool, int]]
) -> None:
    window = make(floor, ceiling, horizon, max_bytes)
    now, finished = 0.0, 0
    for step, done, starved, body in seen:
        now, finished = now + step, finished + done
        window.saw_body(body)
        window.observe(now, finished, starved=starved)
        assert 1 <= window.size <= max(floor, ceiling)
        assert window.size == 1 or window.size * body <= max_bytes


@given(size=st.integers(1, 5_000), seen=OBSERVATIONS)
def test_a_pinned_window_never_moves(size: int, seen: list[tuple[float, int, bool, int]]) -> None:
    window = make(size, size, max_bytes=1 << 60)
    now, finished = 0.0, 0
    for step, done, starved, body in seen:
        now, finished = now + step, finished + done
        window.saw_body(body)
        window.observe(now, finished, starved=starved)
        assert window.size == size


@given(seen=OBSERVATIONS)
def test_starved_processors_never_shrink_it(seen: list[tuple[float, int, bool, int]]) -> None:
    window = make()
    now, finished = 0.0, 0
    for step, done, starved, _ in seen:
        before = window.size
        now, finished = now + step, finished + done
        window.observe(now, finished, starved=starved)
        assert window.size >= before or not starved
        assert window.size <= 2 * before or not starved


@given(rate=st.floats(1, 1e6), horizon=st.floats(0.01, 10), step=st.floats(MEASURE_AFTER, 5))
def test_busy_processors_bring_it_to_what_they_finish_within_the_horizon(
    rate: float, horizon: float, step: float
) -> None:
    window = make(floor=10, ceiling=1_000, horizon=horizon)
    for turn in range(30):
        window.observe(turn * step, int(turn * step * rate), starved=False)
    wanted = max(10, min(1_000, rate * horizon))
    assert window.size == pytest.approx(wanted, rel=0.01, abs=2 + horizon / step)


@given(rate=st.floats(4_000, 1e6))
def test_starved_processors_reach_the_ceiling_when_they_are_fast_enough_for_it(rate: float) -> None:
    window = make()
    now, finished = 0.0, 0
    for _ in range(20):
        window.observe(now, finished, starved=True)
        finished += window.size
        now += window.size / rate
    assert window.size == 1_000


def test_an_observation_too_short_to_be_believed_changes_nothing() -> None:
    window = make()
    window.observe(0.0, 0, starved=False)
    window.observe(MEASURE_AFTER / 2, 1_000_000, starved=False)
    assert window.size == 10


def test_a_clock_that_stands_still_or_ticks_by_next_to_nothing_does_no_harm() -> None:
    window = make()
    window.observe(0.0, 0, starved=True)
    window.observe(0.0, 100, starved=True)
    assert window.size == 10
    window.observe(5e-324, 200, starved=True)
    assert window.size == 20


def test_time_without_messages_is_not_taken_for_slow_work() -> None:
    window = make()
    for turn in range(20):
        window.observe(turn * 0.1, turn * 400, starved=False)
    assert window.size == 1_000
    window.observe(3_600.0, 19 * 400, starved=True)  # one slow handler ran on while nothing came
    window.observe(3_600.5, 19 * 400 + 2_000, starved=False)
    assert window.size == 1_000


def test_large_bodies_shrink_it_and_are_forgotten_by_and_by() -> None:
    window = make(floor=100, ceiling=100, max_bytes=1_000)
    window.saw_body(100)
    sizes = [window.size]
    for _ in range(60):
        window.saw_body(1)
        sizes.append(window.size)
    assert sizes[0] == 10
    assert sizes[-1] == 100
    assert all(earlier <= later for earlier, later in pairwise(sizes))


def test_one_message_is_taken_even_when_its_body_is_over_the_bytes_allowed() -> None:
    window = make(max_bytes=1)
    window.saw_body(1_000_000)
    assert window.size == 1


def test_a_floor_above_the_ceiling_is_the_ceiling() -> None:
    assert make(floor=50, ceiling=10).size == 50
