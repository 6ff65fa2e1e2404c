"""Topics are words joined by dots; in a pattern `*` is one word and `#` any number of words, also none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from ..errors import OptionError

DEAD = "dead"
_WORD = re.compile(r"[A-Za-z0-9_\-:/@+=~]+")


def is_pattern(topic: str) -> bool:
    """Whether `topic` can match more than itself."""
    return any(word in ("*", "#") for word in topic.split("."))


def is_dead_letter_topic(topic: str) -> bool:
    """Whether the last word of `topic` is `dead`; patterns never match such a topic."""
    return topic.rpartition(".")[2] == DEAD


def dead_letter_topic(topic: str, group: str) -> str:
    """The default dead-letter topic of a group."""
    return f"{topic}.{group}.{DEAD}"


def check_topic(topic: object, *, pattern: bool) -> str:
    """Return `topic`, or raise OptionError that says what is wrong with it."""
    if not isinstance(topic, str) or not topic:
        raise OptionError(f"topic must be a non-empty string, got {topic!r}")
    for word in topic.split("."):
        if word in ("*", "#"):
            if not pattern:
                raise OptionError(f"topic {topic!r} is a pattern; a message is published to one topic")
        elif not _WORD.fullmatch(word):
            raise OptionError(
                f"topic {topic!r} has the word {word!r}; words are letters, digits and any of _-:/@+=~, joined by dots"
            )
    return topic


@lru_cache(maxsize=10_000)
def matches(pattern: str, topic: str) -> bool:
    """Whether a message of `topic` belongs to a subscription of `pattern`."""
    if pattern == topic:
        return True
    if not is_pattern(pattern) or is_dead_letter_topic(topic):
        return False
    return _match(tuple(pattern.split(".")), tuple(topic.split(".")))


def _match(pattern: tuple[str, ...], topic: tuple[str, ...]) -> bool:
    if not pattern:
        return not topic
    head, rest = pattern[0], pattern[1:]
    if head == "#":
        return any(_match(rest, topic[skip:]) for skip in range(len(topic) + 1))
    return bool(topic) and head in ("*", topic[0]) and _match(rest, topic[1:])


def best_match(patterns: Iterable[str], topic: str) -> str | None:
    """The one subscription of a group that gets a message of `topic`: the exact topic, else the longest pattern that
    matches, else (of equals) the alphabetically first; None when none does."""
    found = [pattern for pattern in patterns if matches(pattern, topic)]
    return min(found, key=lambda pattern: (pattern != topic, -len(pattern), pattern), default=None)
