"""What is done to the queue, in SQL: synchronous, on one connection, inside a transaction that the caller opened."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import apsw

from ..._decisions.suspicion import is_suspect, suspicions_now
from ..._decisions.topics import check_topic, is_dead_letter_topic, is_pattern
from ...errors import OptionError
from ...message import NO_HEADERS, Message, Outgoing, Refused, Settlement, Stored
from ...source import Backlog
from .inlet import Inlet
from .routing import Routing
from .rows import STORED, decode_headers, encode_headers, stored, text, untext
from .schema import BACK, CLAIMED, FRESH, PARKED, RETRYING, SCHEDULED

_ROWS = 50  # rows per INSERT: one statement for many rows costs two thirds of one for each
_INSERT = "INSERT INTO queue(queue_id, topic, id, key, headers, timestamp, body) VALUES "
_INSERT_ONE = _INSERT + "(?, ?, ?, ?, ?, ?, ?)"
_INSERT_MANY = _INSERT + ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * _ROWS)
_INSERT_SPECIAL = (
    "INSERT INTO queue(queue_id, topic, id, key, headers, timestamp, body, state, due_at, direct)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_MANY = 100_000  # messages that are not counted at every asking
_RUNS = 64  # claims after which the settled ones are forgotten

# Who may settle a row that his token names: claimed one by one it says so; a fresh one is his for as long as he is an
# owner, since what ends that, a settle or a takeover, leaves no row fresh.
_OURS = f"(state = {FRESH} OR state = {CLAIMED} AND owner = ?2)"


class Mismatch(Exception):
    """A bulk statement met fewer rows than it named: roll back and do it again precisely, to say which."""


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
        state, due_at = (SCHEDULED, time.time() + message.delay) if message.delay > 0 else (FRESH, None)
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
        """Claim up to `demand` messages that are ready for `owner`, in order."""
        self.execute(inlet.promote, (time.time(),))
        self.execute(inlet.unpark)
        if inlet.only_fresh is not None and self.execute(inlet.any_back).fetchone() is None:
            return self._claim_fresh(inlet, owner, demand)
        return self._claim_any(inlet, owner, demand)

    def _claim_fresh(self, inlet: Inlet, owner: int, demand: int) -> list[Message[Any]]:
        """The way of nearly all messages: a run of fresh rows of one queue."""
        messages: list[Message[Any]] = []
        add = messages.append
        size, seq = 0, 0
        cursor = self.execute(inlet.only_fresh, (demand,))
        for seq, topic, body, id_, key, headers, timestamp in cursor:
            add(
                Message(
                    topic,
                    body,
                    id_ if id_.__class__ is str else untext(id_),
                    key if key is None or key.__class__ is str else untext(key),
                    NO_HEADERS if headers is None else decode_headers(headers),
                    timestamp,
                    owner,
                    (seq, owner),
                )
            )
            size += len(body)
            if size >= inlet.max_bytes:
                break
        cursor.close(True)
        if messages:
            self._claim_run(inlet, owner, inlet.queue_ids[0], messages[0].token[0], seq)
        return messages

    def _claim_any(self, inlet: Inlet, owner: int, demand: int) -> list[Message[Any]]:
        """Fresh rows and such as came back, of all queues, in order."""
        messages: list[Message[Any]] = []
        runs: dict[int, tuple[int, int]] = {}
        singles = array("q")
        size = 0
        cursor = self.execute(inlet.select, inlet.parameters(demand, owner))
        for queue_id, state, deliveries, failures, suspicions, seq, topic, body, id_, key, headers, timestamp in cursor:
            key = None if key is None else untext(key)
            deliveries += 1
            suspect = is_suspect(deliveries, failures, suspicions)
            messages.append(
                Message(
                    topic, body, untext(id_), key, decode_headers(headers), timestamp, owner, (seq, owner),
                    deliveries, failures, suspicions, suspect,
                )
            )  # fmt: skip
            if state == FRESH and not inlet.ordered:
                runs[queue_id] = (runs.get(queue_id, (seq, 0))[0], seq)
            else:
                singles.append(seq)
            size += len(body)
            if size >= inlet.max_bytes:
                break
        cursor.close(True)
        for queue_id, (first, last) in runs.items():
            self._claim_run(inlet, owner, queue_id, first, last)
        if singles:
            sql = f"UPDATE queue SET state = {CLAIMED}, owner = ? WHERE seq IN carray(?)"
            self.execute(sql, (owner, apsw.carray(singles)))
        return messages

    def _claim_run(self, inlet: Inlet, owner: int, queue_id: int, first: int, last: int) -> None:
        """Fresh rows are claimed by moving the head over them; who took the run before as well just makes it longer."""
        (head,) = self.execute("SELECT head FROM queues WHERE id = ?", (queue_id,)).fetchone()
        self.execute("UPDATE queues SET head = ? WHERE id = ?", (last, queue_id))
        self.execute(
            "UPDATE claims SET last = ? WHERE owner = ? AND queue_id = ? AND last = ?", (last, owner, queue_id, head)
        )
        if self.db.changes() == 0:
            self.execute("INSERT INTO claims VALUES (?, ?, ?, ?)", (owner, queue_id, first, last))
            inlet.runs += 1
            if inlet.runs % _RUNS == 0:
                self._forget_runs(owner)

    def _forget_runs(self, owner: int) -> None:
        """Forget the runs of which every row is settled."""
        self.execute(
            "DELETE FROM claims WHERE owner = ? AND NOT EXISTS (SELECT 1 FROM queue q WHERE"
            f" q.queue_id = claims.queue_id AND q.state = {FRESH} AND q.seq BETWEEN claims.first AND claims.last)",
            (owner,),
        )

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
            if owner not in self.routing.owners:
                if not self.precise:
                    raise Mismatch
                continue
            self._touch_followers(owner)
            seqs = [token[0] for token in tokens if token[1] == owner]
            first, last = min(seqs), max(seqs)
            if last - first + 1 == len(seqs):  # a run without gaps, as most are, is found in one go
                sql = f"DELETE FROM queue WHERE seq BETWEEN ?1 AND ?3 AND {_OURS}"
                bindings: tuple[Any, ...] = (first, owner, last)
            else:
                sql = f"DELETE FROM queue WHERE seq IN carray(?1) AND {_OURS}"
                bindings = (apsw.carray(array("q", seqs)), owner)
            if self.precise:
                rows = self.execute(f"{sql} RETURNING seq", bindings).fetchall()
                done.update((seq, owner) for (seq,) in rows)
            else:
                self.execute(sql, bindings)
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
        owner = self.routing.owners.get(token[1])
        if owner is None:
            return False
        self._touch_followers(owner.id)
        match settlement.outcome:
            case "ack" | "dead_letter":
                self.execute(f"DELETE FROM queue WHERE seq = ?1 AND {_OURS}", token)
                return self.db.changes() == 1
            case "park" if owner.ordered and settlement.message.key is not None:
                return self._put_back(token, f"state = {PARKED}")
            case "park":
                return self._put_back(token, f"state = {BACK}")
            case "release":
                return self._come_again(token, "", settlement.delay)
            case "retry":
                failures = "failures + 1" if settlement.counted else "failures"
                # Its handler came to an end, so whatever died with it in hand before, it was not this message's doing.
                counts = f"deliveries = {failures}, failures = {failures}, suspicions = 0, "
                return self._come_again(token, counts, settlement.delay)

    def _come_again(self, token: tuple[int, int], counts: str, delay: float) -> bool:
        if delay <= 0:
            return self._put_back(token, f"{counts}state = {BACK}")
        return self._put_back(token, f"{counts}state = {RETRYING}, due_at = ?3", time.time() + delay)

    def _put_back(self, token: tuple[int, int], change: str, *bindings: Any) -> bool:
        row = self.execute(
            f"UPDATE queue SET owner = NULL, {change} WHERE seq = ?1 AND {_OURS} RETURNING queue_id, topic",
            (*token, *bindings),
        ).fetchone()
        if row is None:
            return False
        queue_id, topic = row
        right = self.routing.right_queue(queue_id, topic)
        if right != queue_id:
            self.execute("UPDATE queue SET queue_id = ? WHERE seq = ?", (right, token[0]))
        self.touched.add(right)
        return True

    def suspect(self, token: tuple[int, int]) -> int | None:
        """Suspect the message of every death that had it in hand; returns how many suspicions there are now, None when
        the delivery is not the consumer's any more."""
        if token[1] not in self.routing.owners:
            return None
        row = self.execute(
            f"SELECT deliveries + 1, failures, suspicions FROM queue WHERE seq = ?1 AND {_OURS}", token
        ).fetchone()
        if row is None:
            return None
        suspicions, failures = suspicions_now(*row), row[1]
        self.execute(
            "UPDATE queue SET suspicions = ?2, deliveries = ?3 WHERE seq = ?1",
            (token[0], suspicions, failures + suspicions),
        )
        return suspicions

    # -- looking

    def browse(self, topic: str, after: int, limit: int) -> list[Stored]:
        """A page of what is at rest in `topic`, by seq. Unassigned messages have an index, others are searched for."""
        sql = f"SELECT {STORED} FROM queue WHERE queue_id = 0 AND topic = ?1 AND seq > ?2"
        if self.routing.is_wanted(topic):
            sql += f" UNION ALL SELECT {STORED} FROM queue WHERE +queue_id <> 0 AND topic = ?1 AND seq > ?2"
        return [stored(*row) for row in self.execute(f"{sql} ORDER BY seq LIMIT ?3", (topic, after, limit)).fetchall()]

    def dead_letter_topics(self) -> list[str]:
        """Those of unassigned messages, which have an index, and those that a group reads."""
        unassigned = "SELECT DISTINCT topic FROM queue WHERE queue_id = 0"
        read = "SELECT pattern FROM queues"
        found = {topic for (topic,) in self.execute(f"{unassigned} UNION {read}")}
        return sorted(topic for topic in found if is_dead_letter_topic(topic) and not is_pattern(topic))

    def remove(self, seqs: Iterable[int]) -> None:
        """Delete rows, except what a consumer has in hand."""
        in_hand = f"state = {CLAIMED} OR state = {FRESH} AND seq <= (SELECT head FROM queues WHERE id = queue.queue_id)"
        self.execute(
            f"DELETE FROM queue WHERE seq IN carray(?) AND ({in_hand}) IS NOT TRUE", (apsw.carray(array("q", seqs)),)
        )

    def backlog(self, inlet: Inlet) -> Backlog:
        """What waits, also for its time, and for how long the first that is due has.

        A million take a tenth of a second to count, in which nobody is served; so a large answer is given again for
        twenty times as long as it took.
        """
        started = time.monotonic()
        if inlet.last_backlog is not None and started < inlet.last_backlog[1]:
            return inlet.last_backlog[0]
        backlog = self._count(inlet, time.time())
        took = time.monotonic() - started
        inlet.last_backlog = (backlog, started + 20 * took) if backlog.messages > _MANY else None
        return backlog

    def _count(self, inlet: Inlet, now: float) -> Backlog:
        waiting, since = 0, now
        for source, order in inlet.backlog:
            (count,) = self.execute(f"SELECT count(*) {source}").fetchone()
            if count:
                waiting += count
                first = f"SELECT max(timestamp, ifnull(due_at, timestamp)) {source} ORDER BY {order} LIMIT 1"
                since = min(since, self.execute(first).fetchone()[0])
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
            _columns(output)
        except (OptionError, TypeError, ValueError) as error:
            return f"its output to {output.topic!r} cannot be stored: {error}"
        if type(output.body) is not bytes or not math.isfinite(output.timestamp):
            return f"its output to {output.topic!r} cannot be stored: body and timestamp must be bytes and a number"
    return None
