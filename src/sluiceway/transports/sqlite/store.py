"""What is done to the queue, in SQL: synchronous, on one connection, inside a transaction that the caller opened."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import apsw

from ..._decisions.suspicion import is_suspect
from ..._decisions.topics import check_topic
from ...errors import OptionError
from ...message import NO_HEADERS, Message, Outgoing, Refused, Settlement, Stored
from ...source import Backlog
from .routing import Routing
from .rows import STORED, decode_headers, encode_headers, stored, text, untext
from .schema import CLAIMED, READY, RETRYING, SCHEDULED

_ROWS = 50  # rows per INSERT: one statement for many rows costs two thirds of one for each
_INSERT = "INSERT INTO queue(queue_id, topic, id, key, headers, timestamp, body) VALUES "
_INSERT_ONE = _INSERT + "(?, ?, ?, ?, ?, ?, ?)"
_INSERT_MANY = _INSERT + ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * _ROWS)
_INSERT_SPECIAL = (
    "INSERT INTO queue(queue_id, topic, id, key, headers, timestamp, body, state, due_at, direct)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_PROMOTED = 2_000  # waiting rows made ready by one claim, so that a million due at once is no endless transaction

_UNBLOCKED = (
    " AND (key IS NULL OR NOT ("
    "EXISTS (SELECT 1 FROM queue e WHERE {e} AND e.state = 1 AND e.seq < q.seq)"
    " OR EXISTS (SELECT 1 FROM queue e WHERE {e} AND e.state = 2 AND e.owner < ?2 AND e.seq < q.seq)"
    " OR EXISTS (SELECT 1 FROM queue e WHERE {e} AND e.state = 2 AND e.owner > ?2 AND e.seq < q.seq)))"
).format(e="e.queue_id = q.queue_id AND e.key = q.key AND e.state > 0")
"""No earlier message of the key waits for a retry or is with another owner (?2): three seeks in the index `held`. A
message that was published with a delay holds nobody up: its turn comes when it is due."""


class Mismatch(Exception):
    """A bulk statement met fewer rows than it named: roll back and do it again precisely, to say which."""


class Inlet:
    """What the I/O thread knows of one source: where it reads and as whom, and the SQL for it."""

    def __init__(self, queue_ids: Sequence[int], *, ordered: bool, max_bytes: int) -> None:
        self.queue_ids = tuple(queue_ids)
        self.ordered = ordered
        self.max_bytes = max_bytes
        self.owner = 0
        self.lease_until = 0.0  # the machine's steady clock
        self.lapsed_since: float | None = None
        self.select = self._select(
            "topic, body, id, key, headers, timestamp, seq, deliveries + 1, failures, suspicions"
        )
        self.peek = self._select("seq")
        ids = ", ".join(map(str, self.queue_ids))
        self.promote = (
            f"UPDATE queue SET state = {READY} WHERE seq IN (SELECT seq FROM queue"
            f" WHERE queue_id IN ({ids}) AND state & 1 AND due_at <= ? LIMIT {_PROMOTED})"
        )
        self.next_due = " UNION ALL ".join(
            f"SELECT min(due_at) FROM queue WHERE queue_id = {one} AND state & 1" for one in self.queue_ids
        )

    def _select(self, columns: str) -> str:
        """Ready rows of all queues in order of seq. The parts are merged, so that none of them is read to its end."""
        only = _UNBLOCKED if self.ordered else ""
        parts = (
            f"SELECT {columns} FROM queue q WHERE queue_id = {one} AND state = {READY}{only}" for one in self.queue_ids
        )
        return " UNION ALL ".join(parts) + " ORDER BY seq LIMIT ?1"

    def parameters(self, limit: int, owner: int) -> tuple[int, ...]:
        """For `select` and `peek`."""
        return (limit, owner) if self.ordered else (limit,)


class Store:
    """The operations on one connection. `touched` gathers the queues in which something new may be received."""

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        self.execute: Callable[..., Any] = db.execute
        self.touched: set[int] = set()
        self.routing = Routing(db, self.touched)
        self.precise = False  # say which rows of a bulk statement were lost, at the price of speed

    def forget(self) -> None:
        """After a rollback."""
        self.routing.forget()
        self.touched.clear()

    # -- publishing

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """Add the messages, each once per group that wants it, in order. Raises OptionError for a bad topic."""
        route = self.routing.of
        rows: list[tuple[Any, ...]] = []
        for message in messages:
            if message.delay > 0 or message.group is not None:
                self._insert(rows)
                rows = []
                self._publish_special(message)
            else:
                columns = _columns(message)
                for queue_id in route(message.topic):
                    rows.append((queue_id, *columns))
        self._insert(rows)

    def _publish_special(self, message: Outgoing) -> None:
        group = message.group
        targets = self.routing.of(message.topic) if group is None else (self.routing.of_group(group, message.topic),)
        state, due_at = (SCHEDULED, time.time() + message.delay) if message.delay > 0 else (READY, None)
        columns = _columns(message)
        for queue_id in targets:
            self.execute(_INSERT_SPECIAL, (queue_id, *columns, state, due_at, int(group is not None)))
            self.touched.add(queue_id)

    def _insert(self, rows: list[tuple[Any, ...]]) -> None:
        whole = len(rows) - len(rows) % _ROWS
        for start in range(0, whole, _ROWS):
            self.execute(_INSERT_MANY, tuple(chain.from_iterable(rows[start : start + _ROWS])))
        for row in rows[whole:]:
            self.execute(_INSERT_ONE, row)
        self.touched.update({row[0] for row in rows})

    # -- receiving

    def has_ready(self, inlet: Inlet) -> bool:
        """Whether a claim would find something now. Needs no transaction."""
        due = self.due_at(inlet)
        if due is not None and due <= time.time():
            return True
        return self.execute(inlet.peek, inlet.parameters(1, inlet.owner)).fetchone() is not None

    def due_at(self, inlet: Inlet) -> float | None:
        """When the next waiting message of the inlet is due, on the wall clock."""
        return min((due for (due,) in self.execute(inlet.next_due).fetchall() if due is not None), default=None)

    def claim(self, inlet: Inlet, owner: int, demand: int) -> list[Message[Any]]:
        """Claim up to `demand` ready messages for `owner`, in order."""
        self.execute(inlet.promote, (time.time(),))
        messages: list[Message[Any]] = []
        seqs = array("q")
        size = 0
        cursor = self.execute(inlet.select, inlet.parameters(demand, owner))
        for topic, body, id_, key, headers, timestamp, seq, deliveries, failures, suspicions in cursor:
            messages.append(
                Message(
                    topic,
                    body,
                    id_ if id_.__class__ is str else untext(id_),
                    key if key is None or key.__class__ is str else untext(key),
                    NO_HEADERS if headers is None else decode_headers(headers),
                    timestamp,
                    owner,
                    (seq, owner),
                    deliveries,
                    failures,
                    suspicions,
                    deliveries > 1 and is_suspect(deliveries, failures, suspicions),
                )
            )
            seqs.append(seq)
            size += len(body)
            if size >= inlet.max_bytes:
                break
        cursor.close(True)
        if messages:
            self.execute(
                f"UPDATE queue SET state = {CLAIMED}, owner = ?, deliveries = deliveries + 1 WHERE seq IN carray(?)",
                (owner, apsw.carray(seqs)),
            )
        return messages

    # -- settling

    def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement], max_payload: int) -> list[Refused]:
        """End deliveries; returns those that are not their consumer's any more, or whose outputs cannot be stored."""
        refused = self._ack(acks) if acks else []
        for settlement in others:
            refusal = _refusal(settlement.outputs, max_payload) if settlement.outputs else None
            if refusal is not None:
                refused.append(Refused(settlement.message, "rejected", refusal))
            elif not self._settle(settlement):
                refused.append(Refused(settlement.message, "lost"))
            elif settlement.outputs:
                self.publish(settlement.outputs)
        return refused

    def _ack(self, messages: Sequence[Message[Any]]) -> list[Refused]:
        tokens = [message.token for message in messages]
        done: set[tuple[int, int]] = set()
        for owner in {token[1] for token in tokens}:
            self._touch_followers(owner)
            seqs = array("q", [token[0] for token in tokens if token[1] == owner])
            sql = "DELETE FROM queue WHERE seq IN carray(?) AND owner = ?"
            if self.precise:
                rows = self.execute(f"{sql} RETURNING seq", (apsw.carray(seqs), owner)).fetchall()
                done.update((seq, owner) for (seq,) in rows)
            else:
                self.execute(sql, (apsw.carray(seqs), owner))
                if self.db.changes() != len(seqs):
                    raise Mismatch
        if not self.precise:
            return []
        return [Refused(message, "lost") for message in messages if message.token not in done]

    def _touch_followers(self, owner: int) -> None:
        """With order_by, a settled message may let a later one of its key go to another owner."""
        row = self.routing.owners.get(owner)
        if row is not None and row.ordered:
            self.touched.update(row.queue_ids)

    def _settle(self, settlement: Settlement) -> bool:
        token = settlement.message.token
        self._touch_followers(token[1])
        match settlement.outcome:
            case "ack" | "dead_letter":
                self.execute("DELETE FROM queue WHERE seq = ? AND owner = ?", token)
                return self.db.changes() == 1
            case "release" | "park":
                return self._put_back(f"state = {READY}, deliveries = deliveries - 1", token)
            case "retry":
                counts = "failures = failures + 1" if settlement.counted else "deliveries = deliveries - 1"
                if settlement.delay <= 0:
                    return self._put_back(f"state = {READY}, {counts}", token)
                due_at = time.time() + settlement.delay
                return self._put_back(f"state = {RETRYING}, due_at = ?3, {counts}", (*token, due_at))

    def _put_back(self, change: str, bindings: tuple[Any, ...]) -> bool:
        row = self.execute(
            f"UPDATE queue SET owner = NULL, {change} WHERE seq = ?1 AND owner = ?2 RETURNING queue_id", bindings
        ).fetchone()
        if row is None:
            return False
        self.touched.add(row[0])
        return True

    def suspect(self, token: tuple[int, int]) -> int | None:
        """Add one suspicion; returns how many there are now, None when the delivery is not the consumer's any more."""
        row = self.execute(
            "UPDATE queue SET suspicions = suspicions + 1 WHERE seq = ? AND owner = ? RETURNING suspicions", token
        ).fetchone()
        return None if row is None else row[0]

    # -- looking

    def browse(self, topic: str, after: int, limit: int) -> list[Stored]:
        """A page of what is at rest in `topic`, by seq. Unassigned messages have an index, others are searched for."""
        sql = f"SELECT {STORED} FROM queue WHERE queue_id = 0 AND topic = ?1 AND seq > ?2"
        if self.routing.is_wanted(topic):
            sql += f" UNION ALL SELECT {STORED} FROM queue WHERE +queue_id <> 0 AND topic = ?1 AND seq > ?2"
        return [stored(*row) for row in self.execute(f"{sql} ORDER BY seq LIMIT ?3", (topic, after, limit)).fetchall()]

    def remove(self, seqs: Iterable[int]) -> None:
        """Delete rows, except what a consumer has in hand."""
        self.execute(
            "DELETE FROM queue WHERE seq IN carray(?)"
            f" AND NOT (state = {CLAIMED} AND owner IN (SELECT id FROM owners))",
            (apsw.carray(array("q", seqs)),),
        )

    def backlog(self, inlet: Inlet) -> Backlog:
        """What waits and is due, and for how long the first of it has."""
        now = time.time()
        waiting, since = 0, now
        for queue_id in inlet.queue_ids:
            for where, first in ((f"state = {READY}", "seq"), (f"state & 1 AND due_at <= {now}", "due_at")):
                source = f"FROM queue WHERE queue_id = {queue_id} AND {where}"
                (count,) = self.execute(f"SELECT count(*) {source}").fetchone()
                if count:
                    waiting += count
                    columns = "max(timestamp, ifnull(due_at, timestamp))"
                    (one,) = self.execute(f"SELECT {columns} {source} ORDER BY {first} LIMIT 1").fetchone()
                    since = min(since, one)
        return Backlog(waiting, max(0.0, now - since))


def _columns(message: Outgoing) -> tuple[Any, ...]:
    """topic, id, key, headers, timestamp, body"""
    id_, key, headers = message.id, message.key, message.headers
    return (
        message.topic,
        id_ if id_.isascii() else text(id_),
        key if key is None or key.isascii() else text(key),
        encode_headers(headers) if headers else None,
        message.timestamp,
        message.body,
    )


def _refusal(outputs: Sequence[Outgoing], max_payload: int) -> str | None:
    """Why the outputs of a settlement cannot be stored; None when they can."""
    for output in outputs:
        if len(output.body) > max_payload:
            return f"its output to {output.topic!r} has {len(output.body)} bytes and the limit is {max_payload}"
        try:
            check_topic(output.topic, pattern=False)
        except OptionError as error:
            return f"its output cannot be published: {error}"
    return None
