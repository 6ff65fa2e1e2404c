"""Subjects of NATS: filters in which `*` is one word and a last `>` one word or more."""

from __future__ import annotations


def filters_of(pattern: str) -> list[str]:
    """The filters that let through all topics which a pattern matches, and perhaps others. No subject passes two."""
    before, hash_, after = pattern.partition("#")
    if not hash_:
        return [pattern]
    more = f"{before}>"
    return [before[:-1], more] if before and not after.strip(".#") else [more]


def covers(wide: str, narrow: str) -> bool:
    """Whether all that passes the filter `narrow` passes `wide`."""
    words, others = wide.split("."), narrow.split(".")
    if words[-1] == ">":
        head = words[:-1]
        return len(others) > len(head) and all(map(_covers, head, others))
    return len(words) == len(others) and ">" not in others and all(map(_covers, words, others))


def _covers(word: str, other: str) -> bool:
    return word == other or (word == "*" and other != ">")
