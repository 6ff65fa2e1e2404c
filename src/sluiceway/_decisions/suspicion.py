"""Which deliveries may have killed the process that held them, and how to find the one that did."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

from ..message import Message

STEADY = 10.0  # seconds for which a process has to live before a message that one died alone with may run in it


def is_suspect(deliveries: int, failures: int, suspicions: int) -> bool:
    """Whether a delivery was handed over more often than what is written down explains.

    Every earlier hand-over ended in a counted failure, in a suspicion written before it ran alone, or in a release
    (which a transport takes off `deliveries`). One more means that a process died with the message in hand.
    """
    return deliveries > 1 + failures + suspicions


def suspicions_now(deliveries: int, failures: int, suspicions: int) -> int:
    """The suspicions to write down before a suspect runs alone.

    One for every death that is not explained yet, but two at most: the one that took the window and the one that took
    its group. More than those were kills from outside, while it waited; a message must have run alone at least twice
    before those could count against it.
    """
    return suspicions + min(2, deliveries - 1 - failures - suspicions)


def group_size(window: int) -> int:
    """How many suspects of a first death run together: about the root of the window, which costs the fewest turns."""
    return max(2, isqrt(window))


def runs_alone(message: Message[Any]) -> bool:
    """Whether more than one death points at a suspect, so that it may only run alone."""
    return message.suspicions > 0 or message.deliveries > message.attempt + 1


def died_alone(message: Message[Any]) -> bool:
    """Whether a process died while this message ran alone: that was written down, and no handler came to an end since.

    It may have been the message, or a kill from outside at just that moment. Where processes are killed again and again
    soon after their start, a second run at once would be hit again; so it has to wait until a process lives steadily.
    """
    return message.suspect and message.suspicions > 0


def next_suspects(suspects: Sequence[Message[Any]], *, group: int, ordered: bool) -> list[Message[Any]]:
    """The suspects to run now, of those that arrived, in their order, at most `group`.

    The others go back meanwhile, so that a further death does not point at them.

    One death points at a whole window, nearly all of it innocent, so those run together, a group at a time: if the
    process dies again, it was one of the group, and each of those runs alone from then on. That takes about twice the
    root of the window in turns, where each alone takes the window. Those at whom the least points go first, so that the
    one that does kill has nobody left behind it. With `ordered` none passes an earlier one of its key.
    """
    together: list[Message[Any]] = []
    alone: list[Message[Any]] = []
    keys: set[str] = set()
    for message in suspects:
        if ordered and message.key is not None and message.key in keys:
            continue
        if not runs_alone(message):
            together.append(message)
            continue
        alone.append(message)
        if message.key is not None:
            keys.add(message.key)
    return together[:group] or [min(alone, key=lambda message: (message.suspicions, message.deliveries))]
