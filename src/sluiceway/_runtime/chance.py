"""A random number, from `random`, which is loaded at the first one: it takes 9 ms, and only failures need it."""

from __future__ import annotations


def draw() -> float:
    """A number between 0 and 1."""
    import random

    return random.random()
