"""A delivery is suspect when it was handed over more often than what is written down explains."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sluiceway._decisions.suspicion import is_suspect

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
