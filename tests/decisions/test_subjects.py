"""What passes the subject filters of NATS."""

from __future__ import annotations

import pytest

from sluiceway._decisions.subjects import covers, filters_of
from sluiceway._decisions.topics import matches

TOPICS = ["a", "b", "a.b", "a.b.c", "z", "a.z", "a.b.z", "a.b.c.z", "x.y.c"]


@pytest.mark.parametrize("pattern", ["a", "a.*", "*", "#", "a.#", "#.z", "a.#.z", "*.*.c", "*.#", "a.*.#"])
def test_the_filters_of_a_pattern_leave_out_no_message_of_it(pattern: str) -> None:
    for topic in TOPICS:
        if matches(pattern, topic):
            assert any(covers(one, topic) for one in filters_of(pattern)), (pattern, topic)


@pytest.mark.parametrize("pattern", ["a.#", "#.z", "a.#.z", "a.*.#"])
def test_no_topic_passes_two_filters_of_a_pattern(pattern: str) -> None:
    for topic in TOPICS:
        assert sum(covers(one, topic) for one in filters_of(pattern)) <= 1


@pytest.mark.parametrize(
    ("wide", "narrow", "is_so"),
    [("a.>", "a.b", True), ("a.>", "a", False), ("a.*", "a.>", False), ("a.>", "a.>", True), ("a.>", "a.*.c", True),
     ("*", "a", True), ("a", "*", False), (">", "a.>", True), ("*.b", "a.*", False)],
)  # fmt: skip
def test_a_filter_covers_another(wide: str, narrow: str, is_so: bool) -> None:
    assert covers(wide, narrow) is is_so
