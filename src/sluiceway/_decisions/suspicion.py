"""Which deliveries may have killed the process that held them."""

from __future__ import annotations


def is_suspect(deliveries: int, failures: int, suspicions: int) -> bool:
    """Whether a delivery was handed over more often than what is written down explains.

    Every earlier hand-over ended in a counted failure, in a suspicion written before it ran alone, or in a release
    (which a transport takes off `deliveries`). One more means that a process died with the message in hand.
    """
    return deliveries > 1 + failures + suspicions
