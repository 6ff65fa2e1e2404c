"""The circuit breaker: closed, open, half-open with one probe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluiceway._decisions.breaker import Breaker
from sluiceway.retry import Retry


def make(failures: int = 3, within: float = 10.0, jitter: float = 0.0) -> Breaker:
    return Breaker(failures, within, Retry(base_delay=30.0, max_delay=100.0, jitter=jitter))


def opened(now: float = 0.0) -> Breaker:
    breaker = make(failures=1)
    assert breaker.failed(now, 0.0)
    return breaker


def test_closed_it_lets_everything_pass() -> None:
    breaker = make()
    assert breaker.state(0.0) == "closed"
    assert breaker.allow(0.0, 1000) == 1000
    assert breaker.starts(0.0, "m1") == "pass"
    assert breaker.opens_at(0.0) is None


def test_enough_failures_within_the_time_open_it() -> None:
    breaker = make()
    assert [breaker.failed(now, 0.0) for now in (0.0, 5.0, 10.0)] == [False, False, True]
    assert breaker.state(10.0) == "open"
    assert breaker.allow(10.0, 1000) == 0
    assert breaker.starts(10.0, "m1") == "back"
    assert breaker.opens_at(10.0) == 40.0


def test_failures_further_apart_do_not() -> None:
    breaker = make()
    assert not any(breaker.failed(now, 0.0) for now in (0.0, 5.0, 10.1, 15.2, 20.3))


def test_failures_of_what_had_started_before_do_not_keep_it_open_longer() -> None:
    breaker = opened()
    assert not breaker.failed(20.0, 0.0)
    assert breaker.opens_at(20.0) == 30.0


def test_half_open_one_message_is_asked_for_and_one_is_the_probe() -> None:
    breaker = opened()
    assert breaker.allow(30.0, 1000) == 1
    assert breaker.state(30.0) == "half-open"
    assert [breaker.starts(31.0, "m1") for _ in range(3)] == ["probe", "back", "back"]
    assert breaker.allow(1000.0, 1000) == 0
    assert breaker.opens_at(31.0) is None


def test_a_probe_that_succeeds_closes_it_and_the_past_is_forgotten() -> None:
    breaker = opened()
    breaker.starts(30.0, "m1")
    breaker.close()
    assert breaker.allow(30.0, 1000) == 1000
    breaker.failed(31.0, 0.0)
    assert breaker.opens_at(31.0) == 61.0  # as long as the first time


def test_a_probe_that_fails_opens_it_for_longer_each_time_up_to_the_cap() -> None:
    breaker, now, seconds = opened(), 0.0, []
    for _ in range(4):
        now = breaker.opens_at(now) or now
        assert breaker.starts(now, f"m{now}") == "probe"
        seconds.append(breaker.probe_failed(now, 0.0, f"m{now}")[0])
    assert seconds == [60.0, 100.0, 100.0, 100.0]


def test_of_three_failed_probes_of_one_message_the_last_counts_against_it() -> None:
    breaker = opened()
    assert [probe for probe in range(1, 8) if breaker.probe_failed(0.0, 0.0, "m1")[1]] == [3, 6]


def test_a_message_that_failed_as_the_probe_gives_way_once_each_time_it_is_half_open() -> None:
    breaker = opened()
    assert breaker.starts(30.0, "m1") == "probe"
    breaker.probe_failed(30.0, 0.0, "m1")
    assert breaker.allow(90.0, 10) == 1
    breaker.took(90.0)
    assert breaker.allow(90.0, 10) == 0
    assert breaker.starts(90.0, "m1") == "gives way"
    assert breaker.allow(90.0, 10) == 1  # another is asked for at once
    assert breaker.starts(90.0, "m2") == "probe"
    breaker.probe_failed(90.0, 0.0, "m2")
    assert [breaker.starts(190.0, one) for one in ("m1", "m2", "m1")] == ["gives way", "gives way", "probe"]


def test_it_gives_way_no_longer_than_the_breaker_was_open() -> None:
    breaker = Breaker(1, 10.0, Retry(base_delay=0.4, jitter=0.0))
    breaker.failed(0.0, 0.0)
    assert breaker.way == 0.4
    assert opened().way == 1.0


def test_failed_probes_are_counted_by_message_until_one_succeeds() -> None:
    breaker = opened()
    probes = ["m1", "m2", "m1", "m3", "m2", "m1", "m2"]
    assert [breaker.probe_failed(0.0, 0.0, probe)[1] for probe in probes] == [False] * 5 + [True, True]
    assert not any(breaker.probe_failed(0.0, 0.0, "m4")[1] for _ in range(2))
    breaker.close()
    assert not any(breaker.probe_failed(0.0, 0.0, "m4")[1] for _ in range(2))


def test_a_part_of_the_time_is_drawn_at_random() -> None:
    breaker = make(failures=1, jitter=0.2)
    breaker.failed(0.0, 1.0)
    assert breaker.opens_at(0.0) == pytest.approx(24.0)


def test_after_a_probe_that_says_nothing_the_next_message_is_the_probe() -> None:
    breaker = opened()
    breaker.starts(30.0, "m1")
    breaker.probe_unknown(35.0)
    assert breaker.state(35.0) == "half-open"
    assert breaker.allow(35.0, 1000) == 1
    assert breaker.starts(35.0, "m1") == "probe"


def test_a_message_that_was_received_for_the_probe_and_never_starts_makes_room_for_another() -> None:
    breaker = opened()
    assert breaker.allow(30.0, 10) == 1
    breaker.took(30.0)
    assert breaker.allow(31.0, 10) == 0
    assert breaker.opens_at(31.0) == 60.0
    assert breaker.allow(60.0, 10) == 1


class Action:
    """What may happen, in any order."""

    ALL = ("allow", "took", "starts", "failed", "closed", "probe failed", "probe unknown")


@given(st.lists(st.tuples(st.floats(0, 40), st.sampled_from(Action.ALL), st.floats(0, 1)), max_size=60))
def test_whatever_happens_there_is_one_probe_at_most_and_a_way_out(
    steps: list[tuple[float, str, float]],
) -> None:
    breaker, now, probing = make(failures=2, jitter=0.2), 0.0, False
    for step, action, draw in steps:
        now += step
        match action:
            case "allow":
                allowed = breaker.allow(now, 7)
                assert allowed == {"closed": 7, "open": 0}.get(breaker.state(now), allowed)
                assert allowed in (0, 1, 7)
            case "took":
                breaker.took(now)
            case "starts":
                started = breaker.starts(now, "m1")
                assert not (started == "probe" and probing)
                probing = probing or started == "probe"
            case "failed":
                breaker.failed(now, draw)
            case _ if not probing:
                pass
            case "closed":
                breaker.close()
                probing = False
            case "probe failed":
                assert 24.0 <= breaker.probe_failed(now, draw, "m1")[0] <= 100.0
                probing = False
            case "probe unknown":
                breaker.probe_unknown(now)
                probing = False
        at = breaker.opens_at(now)
        if breaker.allow(now, 7) == 0:
            assert probing or (at is not None and now < at <= now + 100.0)
            assert probing or breaker.allow(at or now, 7) >= 1
