"""How many messages a worker process has in hand follows how long they take."""

from __future__ import annotations

import pytest

from sluiceway._decisions.ahead import AHEAD, MOST, Ahead


def after(*seconds: float) -> int:
    ahead = Ahead()
    for one in seconds:
        ahead.saw(one)
    return ahead.limit


def test_before_anything_is_known_it_is_one() -> None:
    assert Ahead().limit == 1


@pytest.mark.parametrize(("seconds", "limit"), [(0.0, 1 + MOST), (1e-9, 1 + MOST), (0.001, 21), (0.015, 2)])
def test_fast_ones_get_what_is_handled_in_a_moment_and_never_more_than_the_most(seconds: float, limit: int) -> None:
    assert after(seconds) == limit


@pytest.mark.parametrize("seconds", [AHEAD * 1.01, 0.1, 60.0])
def test_slow_ones_get_nothing_ahead(seconds: float) -> None:
    assert after(seconds) == 1


def test_it_follows_when_the_pace_changes() -> None:
    assert after(*[0.001] * 10, *[1.0] * 1) == 1
    assert after(1.0, *[0.001] * 60) >= 18
