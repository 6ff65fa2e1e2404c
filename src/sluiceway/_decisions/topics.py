"""Topics are words joined by dots; in a pattern `*` is one word and `#` any number of words, also none."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from ..message import check_topic

__all__ = ["best_match", "check_topic", "dead_letter_topic", "is_dead_letter_topic", "is_pattern", "matches"]

DEAD = "dead"


def is_pattern(topic: str) -> bool:
    """Whether `topic` can match more than itself."""
    return any(word in ("*", "#") for word in topic.split("."))


def is_dead_letter_topic(topic: str) -> bool:
    """Whether the last word of `topic` is `dead`; patterns never match such a topic."""
    return topic.rpartition(".")[2] == DEAD


def dead_letter_topic(topic: str, group: str) -> str:
    """The default dead-letter topic of a group."""
    return f"{topic}.{group}.{DEAD}"


@lru_cache(maxsize=10_000)
def matches(pattern: str, topic: str) -> bool:
    """Whether a message of `topic` belongs to a subscription of `pattern`."""
    if pattern == topic:
        return True
    if not is_pattern(pattern) or is_dead_letter_topic(topic):
        return False
    words = topic.split(".")
    ends = {0}  # how many words of the topic the pattern's words so far can have taken
    for word in pattern.split("."):
        if word == "#":
            ends = set(range(min(ends), len(words) + 1))
        else:
            ends = {end + 1 for end in ends if end < len(words) and word in ("*", words[end])}
        if not ends:
            return False
    return len(words) in ends


def best_match(patterns: Iterable[str], topic: str) -> str | None:
    """The one subscription of a group that gets a message of `topic`: the exact topic, else the longest pattern that
    matches, else (of equals) the alphabetically first; None when none does."""
    found = [pattern for pattern in patterns if matches(pattern, topic)]
    return min(found, key=lambda pattern: (pattern != topic, -len(pattern), pattern), default=None)
