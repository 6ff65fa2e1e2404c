"""Delays grow, are capped, and are spread by chance."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluiceway import Retry
from sluiceway._decisions.backoff import RestartRule, reconnect_delay, retry_delay

DRAW = st.floats(0, 1)


def a_retry(delays: list[float], **options: Any) -> Retry:
    base, longest = sorted(delays)
    return Retry(base_delay=base, max_delay=longest, **options)


RETRIES = st.builds(
    a_retry,
    st.lists(st.floats(0, 1e308) | st.integers(0, 10**300), min_size=2, max_size=2),
    multiplier=st.floats(1, 1e308) | st.integers(1, 10**300),
    jitter=st.floats(0, 1),
)


@given(retry=RETRIES, attempt=st.integers(1, 10_000), draw=DRAW)
def test_a_retry_delay_is_finite_and_within_the_jitters_share_of_the_cap(
    retry: Retry, attempt: int, draw: float
) -> None:
    delay = retry_delay(retry, attempt, draw)
    assert math.isfinite(delay)
    assert 0 <= delay <= float(retry.longest_delay)
    whole = retry_delay(retry, attempt, 0.0)
    assert whole * (1 - retry.jitter) <= delay * (1 + 1e-9)
    assert delay <= whole


@given(retry=RETRIES, attempt=st.integers(1, 5_000), more=st.integers(0, 5_000), draw=DRAW)
def test_a_later_retry_never_waits_less(retry: Retry, attempt: int, more: int, draw: float) -> None:
    assert retry_delay(retry, attempt, draw) <= retry_delay(retry, attempt + more, draw)


@given(attempt=st.integers(1, 20), base=st.floats(0.001, 10), multiplier=st.floats(1, 3))
def test_each_delay_is_the_multiplier_times_the_last_until_the_cap(
    attempt: int, base: float, multiplier: float
) -> None:
    retry = Retry(base_delay=base, multiplier=multiplier, max_delay=1e300, jitter=0)
    ratio = retry_delay(retry, attempt + 1, 1.0) / retry_delay(retry, attempt, 1.0)
    assert math.isclose(ratio, multiplier, rel_tol=1e-9)


def test_a_small_multiplier_reaches_the_cap_too() -> None:
    retry = Retry(base_delay=1, multiplier=1.01, max_delay=60, jitter=0)
    assert retry_delay(retry, 1_000, 0.5) == 60


@pytest.mark.parametrize(("base", "longest"), [(1.0, 300), (300, 300), (3600, 3600)])
def test_unless_said_otherwise_delays_grow_to_five_minutes_and_are_never_cut_below_the_first(
    base: float, longest: float
) -> None:
    retry = Retry(base_delay=base, jitter=0)
    assert retry_delay(retry, 1, 0.5) == base
    assert retry_delay(retry, 100, 0.5) == retry.longest_delay == longest


def test_no_base_delay_means_no_delay_however_often_it_failed() -> None:
    assert retry_delay(Retry(base_delay=0, multiplier=1e300), 10_000, 0.5) == 0


@given(tries=st.integers(0, 1_000_000), more=st.integers(0, 100), draw=DRAW)
def test_reconnecting_waits_longer_and_longer_up_to_a_cap(tries: int, more: int, draw: float) -> None:
    delay = reconnect_delay(tries, draw, base=0.05, cap=5.0)
    assert 0.025 <= delay <= 5.0
    assert delay <= reconnect_delay(tries + more, draw, base=0.05, cap=5.0)


@given(
    most=st.integers(0, 5),
    seconds=st.floats(0.1, 100),
    steps=st.lists(st.floats(0, 200), max_size=30),
    draw=DRAW,
)
def test_a_pipeline_is_given_up_when_it_crashes_more_often_than_allowed_within_the_time(
    most: int, seconds: float, steps: list[float], draw: float
) -> None:
    restart = RestartRule(most, seconds)
    now, crashes = 0.0, list[float]()
    for step in steps:
        now += step
        crashes.append(now)
        recent = sum(now - at < seconds for at in crashes)
        delay = restart.crashed(now, draw)
        assert (delay is None) == (recent > most)
        assert delay is None or 0 < delay <= 5.0


def test_no_restart_is_allowed_at_zero() -> None:
    assert RestartRule(0, 60).crashed(0.0, 0.5) is None
