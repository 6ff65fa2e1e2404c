"""Where a source reads, as whom, and the SQL for it."""

from __future__ import annotations

from collections.abc import Sequence

from ...source import Backlog
from .rows import STORED
from .schema import BACK, CLAIMED, FRESH, PARKED, RETRYING

_PROMOTED = 2_000  # waiting rows made ready by one claim, so that a million due at once is no endless transaction


def _earlier(condition: str) -> str:
    """Whether there is an earlier message of the key of row q with `condition`: one seek in the index `held`."""
    row = "e.queue_id = q.queue_id AND e.key = q.key AND e.state > 0 AND e.seq < q.seq"
    return f"EXISTS (SELECT 1 FROM queue e WHERE {row} AND {condition})"


_BLOCKED = " OR ".join(
    _earlier(condition)
    for condition in (
        f"e.state = {RETRYING}",
        f"e.state = {PARKED}",
        f"e.state = {CLAIMED} AND e.owner < ?2",
        f"e.state = {CLAIMED} AND e.owner > ?2",
    )
)
"""What the owner ?2 has in hand of the key blocks nothing: a source keeps its own messages in order. A message that was
published with a delay blocks nothing either: its turn comes when it is due."""

_MUST_STAY = " OR ".join(_earlier(f"e.state = {state}") for state in (RETRYING, CLAIMED))
"""A parked message waits for all that is earlier, in whoever's hand."""


class Inlet:
    """What the I/O thread knows of one source. A source reads one queue for each of its topics."""

    def __init__(self, queue_ids: Sequence[int], *, ordered: bool, max_bytes: int) -> None:
        self.queue_ids = tuple(queue_ids)
        self.ordered = ordered
        self.max_bytes = max_bytes
        self.owner = 0
        self.lease_until = 0.0  # the machine's steady clock
        self.runs = 0
        self.last_backlog: tuple[Backlog, float] | None = None  # and until when it will do: monotonic clock
        ids = ", ".join(map(str, self.queue_ids))
        self.select = self._select(f"queue_id, state, deliveries, failures, suspicions, {STORED}")
        self.peek = self._select(
            "seq", *(f"{_parked(one)} AND NOT ({_MUST_STAY})" if ordered else _parked(one) for one in self.queue_ids)
        )
        self.any_back = f"SELECT 1 FROM queue WHERE queue_id IN ({ids}) AND state = {BACK} LIMIT 1"
        self.only_fresh: str | None = None
        if len(self.queue_ids) == 1 and not ordered:
            self.only_fresh = f"SELECT {STORED} FROM queue WHERE {_fresh(self.queue_ids[0])} ORDER BY seq LIMIT ?"
        self.promote = (
            f"UPDATE queue SET state = {BACK} WHERE seq IN (SELECT seq FROM queue"
            f" WHERE queue_id IN ({ids}) AND state & 1 AND due_at <= ? LIMIT {_PROMOTED})"
        )
        self.unpark = f"UPDATE queue AS q SET state = {BACK} WHERE queue_id IN ({ids}) AND state = {PARKED}"
        if ordered:
            self.unpark += f" AND NOT ({_MUST_STAY})"
        self.next_due = " UNION ALL ".join(
            f"SELECT min(due_at) FROM queue WHERE queue_id = {one} AND state & 1" for one in self.queue_ids
        )
        self.backlog = [
            (f"FROM queue WHERE {where}", order)
            for one in self.queue_ids
            for where, order in (
                (_fresh(one), "seq"),
                (_back(one), "seq"),
                (_parked(one), "seq"),
                (f"queue_id = {one} AND state & 1", "due_at"),
            )
        ]

    def _select(self, columns: str, *more: str) -> str:
        """What is ready in all queues, in order of seq. The parts are merged, so that none is read to its end."""
        only = f" AND (key IS NULL OR NOT ({_BLOCKED}))" if self.ordered else ""
        ready = [f"{where}{only}" for one in self.queue_ids for where in (_fresh(one), _back(one))]
        parts = (f"SELECT {columns} FROM queue q WHERE {where}" for where in (*ready, *more))
        return " UNION ALL ".join(parts) + " ORDER BY seq LIMIT ?1"

    def parameters(self, limit: int, owner: int) -> tuple[int, ...]:
        """For `select` and `peek`."""
        return (limit, owner) if self.ordered else (limit,)


def _fresh(queue_id: int) -> str:
    head = f"(SELECT head FROM queues WHERE id = {queue_id})"
    return f"queue_id = {queue_id} AND state = {FRESH} AND seq > {head}"


def _back(queue_id: int) -> str:
    return f"queue_id = {queue_id} AND state = {BACK}"


def _parked(queue_id: int) -> str:
    return f"queue_id = {queue_id} AND state = {PARKED}"
