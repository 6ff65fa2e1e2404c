"""The rate limit: never more than so many in any so many seconds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sluiceway._decisions.rate import GRAIN, Limit, Rate

LIMITS = st.builds(Limit, st.integers(1, 20), st.sampled_from([0.05, 1.0, 10.0, 3600.0]))
# Steps as shares of the interval, and how much of what is free is taken then.
STEPS = st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(0, 1.5), st.floats(0, 0.01)), st.integers(0, 20)))


def most_in_any(taken: list[tuple[float, int]], seconds: float) -> int:
    """The most that were taken in any half-open interval of so many seconds."""
    return max(
        (sum(count for at, count in taken if at <= end < at + seconds) for end, _ in taken),
        default=0,
    )


@given(limit=LIMITS, steps=STEPS)
def test_no_interval_ever_sees_more_than_the_limit(limit: Limit, steps: list[tuple[float, int]]) -> None:
    rate, now, taken = Rate(limit), 0.0, []
    for step, wanted in steps:
        now += step * limit.seconds
        count = min(wanted, rate.free(now))
        if count:
            rate.take(now, count)
            taken.append((now, count))
        assert most_in_any(taken, limit.seconds) <= limit.messages


@given(limit=LIMITS, burst=st.integers(1, 20), steps=STEPS)
def test_a_burst_is_never_more_and_the_limit_holds_with_it(
    limit: Limit, burst: int, steps: list[tuple[float, int]]
) -> None:
    burst = min(burst, limit.messages)
    rate, now, taken = Rate(Limit(limit.messages, limit.seconds, burst)), 0.0, []
    for step, wanted in steps:
        now += step * limit.seconds
        count = min(wanted, rate.free(now))
        assert count <= burst
        if count:
            rate.take(now, count)
            taken.append((now, count))
    assert most_in_any(taken, limit.seconds) <= limit.messages
    assert most_in_any(taken, limit.seconds * burst / limit.messages) <= burst


@given(limit=LIMITS, steps=STEPS)
def test_it_opens_when_it_says_and_not_before(limit: Limit, steps: list[tuple[float, int]]) -> None:
    rate, now = Rate(limit), 0.0
    for step, wanted in steps:
        now += step * limit.seconds
        if count := min(wanted, rate.free(now)):
            rate.take(now, count)
        at = rate.opens_at(now)
        assert (at <= now) == (rate.free(now) > 0)
        more, free = rate.grows_at(now), rate.free(now)
        assert (more is None) == (free == limit.messages)
        if more is not None:
            now = more
            assert rate.free(now) > free


@given(limit=LIMITS)
def test_all_that_is_allowed_comes_through_within_a_hundredth(limit: Limit) -> None:
    rate, now, count = Rate(limit), 0.0, 0
    while now <= 10.5 * limit.seconds:
        at = rate.opens_at(now)
        if at <= now:
            rate.take(now, 1)
            count += 1
        now = max(at, now) if at > now else now + limit.seconds / 1000
    assert count >= int(10.5 / (1 + 2 / GRAIN)) * limit.messages


def test_around_the_end_of_an_interval_not_twice_the_limit_passes() -> None:
    rate = Rate(Limit(100, 60.0))
    rate.take(0.0, 1)
    rate.take(59.0, 99)
    assert rate.free(60.0) == 1
    rate.take(60.0, 1)
    assert rate.free(61.0) == 0
    assert rate.free(119.0) == 99


def test_a_burst_of_one_spreads_messages_evenly() -> None:
    rate, now, times = Rate(Limit(60, 60.0, 1)), 0.0, []
    for _ in range(5):
        now = rate.opens_at(now)
        rate.take(now, rate.free(now))
        times.append(now)
    assert times == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_what_it_remembers_is_bounded_whatever_the_limit() -> None:
    rate = Rate(Limit(1_000_000, 1.0))
    for turn in range(20_000):
        rate.take(turn / 20_000, 1)
    assert len(rate._window._taken) <= GRAIN + 1
    assert rate.free(1.0) >= 1_000_000 - 20_000


def test_a_change_at_once_counts_what_was_taken() -> None:
    rate = Rate(Limit(1, 5.0))
    rate.take(0.0, 1)
    rate.change(1.0, Limit(3, 5.0), at_once=True)
    assert rate.free(1.0) == 2
    assert rate.free(5.0) == 3


def test_a_limit_that_shrinks_waits_until_enough_has_left() -> None:
    rate = Rate(Limit(10, 10.0))
    rate.take(0.0, 4)
    rate.take(5.0, 6)
    rate.change(6.0, Limit(6, 10.0), at_once=True)
    assert rate.free(9.9) == 0
    assert rate.opens_at(6.0) == 15.0
    assert rate.free(10.0) == 0
    assert rate.free(15.0) == 6


def test_a_change_at_the_next_interval_waits_until_what_was_taken_has_left() -> None:
    rate = Rate(Limit(1, 5.0))
    rate.take(0.0, 1)
    rate.change(1.0, Limit(3, 10.0), at_once=False)
    assert rate.limit(4.9) == Limit(1, 5.0)
    assert rate.free(4.9) == 0
    assert rate.opens_at(1.0) == 5.0
    assert rate.limit(5.0) == Limit(3, 10.0)
    assert rate.free(5.0) == 3


def test_a_change_at_the_next_interval_is_at_once_when_nothing_was_taken() -> None:
    rate = Rate(Limit(1, 5.0))
    rate.change(1.0, Limit(3, 5.0), at_once=False)
    assert rate.free(1.0) == 3


def test_the_last_change_counts() -> None:
    rate = Rate(Limit(1, 5.0))
    rate.take(0.0, 1)
    rate.change(1.0, Limit(3, 5.0), at_once=False)
    rate.change(2.0, Limit(2, 5.0), at_once=True)
    assert rate.limit(5.0).messages == 2


def test_a_shorter_interval_opens_earlier() -> None:
    rate = Rate(Limit(1, 3600.0))
    rate.take(0.0, 1)
    assert rate.opens_at(1.0) == 3600.0
    rate.change(1.0, Limit(1, 10.0), at_once=True)
    assert rate.opens_at(1.0) == 10.0


def test_more_taken_than_allowed_counts_all_the_same() -> None:
    rate = Rate(Limit(2, 10.0))
    rate.take(0.0, 5)
    assert rate.free(9.9) == 0
    assert rate.opens_at(0.0) == 10.0


def test_cleared_it_has_forgotten_everything() -> None:
    rate = Rate(Limit(2, 10.0, 1))
    rate.take(0.0, 1)
    rate.clear()
    assert rate.free(0.0) == 1
    assert rate.resets_at(0.0) == 0.0
