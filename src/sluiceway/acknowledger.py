"""The contract of an acknowledger: what is told of every settle, before and after the broker has it.

    class Audit(Acknowledger):
        async def after_settle(self, acks, others, refused):
            await ledger.write(one.id for one in acks)

An acknowledger watches; it cannot keep a settle from the broker. What a consumer's handlers decide is the broker's
first: an acknowledger that raises is logged, and neither the settle nor the other acknowledgers hear of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

from .message import Message, Refused, Settlement


class Acknowledger:
    """What is told of a consumer's settles: override one or both; each may be a plain `def` or an `async def`.

    There is one call of each per settle: `acks` are plain successes; `others` are retries, dead letters, releases,
    parked messages, and successes that publish something (their outcome is "ack"). One of the two lists is empty. The
    settle waits for `before_settle`, and no slot of the window is free before `after_settle` has returned: be quick.
    They run in the pipeline's loop, in the order in which they were declared; acks and others may overlap.
    """

    def before_settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Awaitable[None] | None:
        """These deliveries are about to end so. Called once, also when the broker has to be asked again and again.

        Nothing is certain yet: if the process dies now, the broker hands them out again.
        """
        return None

    def after_settle(
        self, acks: Sequence[Message[Any]], others: Sequence[Settlement], refused: Sequence[Refused]
    ) -> Awaitable[None] | None:
        """The broker has taken these, but for those in `refused`: another consumer has them (`lost`), or it would not
        take what belongs to them (`rejected`; they are tried again, in a further settle)."""
        return None
