"""Topics and patterns, beside a model that tries every way to read a pattern."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluiceway import OptionError
from sluiceway._decisions.topics import (
    best_match,
    check_topic,
    dead_letter_topic,
    is_dead_letter_topic,
    is_pattern,
    matches,
)

WORD = st.sampled_from(["a", "b", "dead", "x-1"])
TOPIC = st.lists(WORD, min_size=1, max_size=5).map(".".join)
PATTERN = st.lists(WORD | st.sampled_from(["*", "#"]), min_size=1, max_size=5).map(".".join)


def as_regex(pattern: str) -> str:
    """The pattern over words that each end with a dot."""
    parts = {"*": r"[^.]+\.", "#": r"(?:[^.]+\.)*"}
    return "".join(parts.get(word, re.escape(word) + r"\.") for word in pattern.split("."))


@given(pattern=PATTERN, topic=TOPIC)
def test_a_pattern_matches_what_its_regular_expression_matches_but_never_a_dead_letter_topic(
    pattern: str, topic: str
) -> None:
    if pattern == topic:
        expected = True
    elif not is_pattern(pattern) or topic.endswith(".dead") or topic == "dead":
        expected = False
    else:
        expected = re.fullmatch(as_regex(pattern), topic + ".") is not None
    assert matches(pattern, topic) == expected


@given(patterns=st.lists(PATTERN, max_size=6), topic=TOPIC)
def test_of_a_group_one_subscription_gets_a_message_and_the_exact_topic_goes_first(
    patterns: list[str], topic: str
) -> None:
    found = best_match(patterns, topic)
    candidates = [pattern for pattern in patterns if matches(pattern, topic)]
    if not candidates:
        assert found is None
    elif topic in patterns:
        assert found == topic
    else:
        longest = max(map(len, candidates))
        assert found == min(one for one in candidates if len(one) == longest)
    assert found == best_match(reversed(patterns), topic)


@pytest.mark.parametrize(
    ("pattern", "topic", "matched"),
    [
        ("#", "a", True),
        ("#", "a.b.c", True),
        ("*", "a", True),
        ("*", "a.b", False),
        ("a.#", "a", True),
        ("a.#", "a.b.c", True),
        ("#.c", "a.b.c", True),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.c", False),
        ("a.#.c", "a.c", True),
        ("#", "orders.default.dead", False),
        ("orders.*.dead", "orders.default.dead", False),
        ("orders.default.dead", "orders.default.dead", True),
        ("A", "a", False),
    ],
)
def test_patterns_by_example(pattern: str, topic: str, matched: bool) -> None:
    assert matches(pattern, topic) is matched


def test_a_pattern_of_many_hashes_is_matched_at_once() -> None:
    assert not matches(".".join(["#", "a"] * 20), ".".join(["a"] * 60 + ["b"]))


@given(topic=TOPIC, group=TOPIC)
def test_a_dead_letter_topic_is_a_topic_and_is_known_as_one(topic: str, group: str) -> None:
    dead = dead_letter_topic(topic, group)
    assert check_topic(dead, pattern=False) == dead
    assert is_dead_letter_topic(dead)
    assert not any(matches(pattern, dead) for pattern in ("#", "*.#", "#.dead", f"{topic}.#"))


@given(topic=PATTERN)
def test_what_can_be_subscribed_to_is_read_back_as_it_is(topic: str) -> None:
    assert check_topic(topic, pattern=True) == topic
    if is_pattern(topic):
        with pytest.raises(OptionError, match="is a pattern; a message is published to one topic"):
            check_topic(topic, pattern=False)


@pytest.mark.parametrize(
    ("topic", "text"),
    [
        ("", "topic must be a non-empty string, got ''"),
        (None, "topic must be a non-empty string, got None"),
        (b"orders", "topic must be a non-empty string, got b'orders'"),
        ("a..b", "topic 'a..b' has the word ''; words are letters, digits and any of _-:/@+=~, joined by dots"),
        (".a", "topic '.a' has the word ''"),
        ("a.", "topic 'a.' has the word ''"),
        ("a b", "topic 'a b' has the word 'a b'"),
        ("a\n", "has the word 'a\\n'"),
        ("a.b*", "has the word 'b*'"),
        ("größe", "has the word 'größe'"),
    ],
)
def test_a_topic_that_cannot_be_says_which_word_is_wrong_and_what_is_allowed(topic: object, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_topic(topic, pattern=True)
    assert text in str(caught.value)


@given(text=st.text())
def test_whatever_the_text_it_is_a_topic_or_an_option_error(text: str) -> None:
    try:
        said = check_topic(text, pattern=False)
    except OptionError as error:
        said = str(error)
        text = repr(text)
    assert text in said
