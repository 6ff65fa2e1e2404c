"""A delivery is suspect when it was handed over more often than what is written down explains."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sluiceway._decisions.suspicion import died_alone, group_size, is_suspect, next_suspects, runs_alone
from sluiceway.message import Message

STEPS = st.lists(st.sampled_from(["failed", "released", "suspected and died"]), max_size=20)


@given(steps=STEPS)
def test_a_message_whose_every_hand_over_is_written_down_is_not_suspect(steps: list[str]) -> None:
    deliveries, failures, suspicions = 1, 0, 0
    for step in steps:
        failures += step == "failed"
        suspicions += step == "suspected and died"
        deliveries += step != "released"  # a release is taken off again
        assert not is_suspect(deliveries, failures, suspicions)


@given(steps=STEPS, deaths=st.integers(1, 5))
def test_each_death_that_is_not_written_down_makes_it_suspect(steps: list[str], deaths: int) -> None:
    failures, suspicions = steps.count("failed"), steps.count("suspected and died")
    assert is_suspect(1 + failures + suspicions + deaths, failures, suspicions)


SUSPECTS = st.lists(
    st.builds(
        lambda deaths, failures, suspicions: Message[Any](
            "t", b"", "1", deliveries=1 + failures + suspicions + deaths, failures=failures, suspicions=suspicions
        ),
        st.integers(1, 3),
        st.integers(0, 2),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=30,
)


@given(suspects=SUSPECTS, group=st.integers(2, 10))
def test_suspects_of_one_death_run_in_groups_and_those_of_more_run_alone(
    suspects: list[Message[Any]], group: int
) -> None:
    chosen = next_suspects(suspects, group=group, ordered=False)
    assert 1 <= len(chosen) <= group
    together = [one for one in suspects if not runs_alone(one)]
    if together:
        assert chosen == together[:group]
    else:
        (one,) = chosen
        assert (one.suspicions, one.deliveries) == min((other.suspicions, other.deliveries) for other in suspects)


@given(suspects=SUSPECTS)
def test_every_suspect_has_its_turn(suspects: list[Message[Any]]) -> None:
    left, turns = list(suspects), 0
    while left:
        chosen = next_suspects(left, group=4, ordered=False)
        left = [one for one in left if one not in chosen]
        turns += 1
    assert turns <= len(suspects)


def test_a_group_is_about_the_root_of_the_window() -> None:
    assert [group_size(window) for window in (1, 20, 1_000)] == [2, 4, 31]


def test_only_a_message_whose_suspicion_was_written_before_it_ran_died_alone() -> None:
    def suspect(deliveries: int, suspicions: int, *, suspect: bool = True) -> Message[Any]:
        return Message("t", b"", "1", deliveries=deliveries, suspicions=suspicions, suspect=suspect)

    assert not died_alone(suspect(3, 0))
    assert not died_alone(suspect(3, 2, suspect=False))
    assert died_alone(suspect(4, 2))
