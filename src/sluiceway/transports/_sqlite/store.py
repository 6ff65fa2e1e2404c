"""What is done to the queue, in SQL: synchronous, on one connection, inside a transaction that the caller opened."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import apsw
import msgspec
from msgspec import Struct

from ..._decisions.suspicion import is_suspect
from ..._decisions.topics import best_match, check_topic, matches
from ...errors import OptionError
from ...message import NO_HEADERS, Message, Outgoing, Refused, Settlement, Stored
from ...source import Backlog
from . import liveness
from .schema import CLAIMED, READY, RETRYING, SCHEDULED, UNASSIGNED

_ROWS = 50  # rows per INSERT: one statement for many rows costs two thirds of one each
_INSERT = "INSERT INTO queue(queue_id, topic, id, key, headers, timestamp, body) VALUES "
_INSERT_ONE = _INSERT + "(?, ?, ?, ?, ?, ?, ?)"
_INSERT_MANY = _INSERT + ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * _ROWS)
_INSERT_FULL = (
    "INSERT INTO queue(queue_id, topic, id, key, headers, timestamp, body, state, due_at, direct)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_PROMOTED = 2_000  # waiting rows made ready by one claim, so that a million due at once is no endless transaction

_CLAIM_COLUMNS = "topic, body, id, key, headers, timestamp, seq, deliveries + 1, failures, suspicions"
_UNBLOCKED = (
    " AND (key IS NULL OR NOT ("
    "EXISTS (SELECT 1 FROM queue e WHERE {e} AND e.state = 1 AND e.seq < q.seq)"
    " OR EXISTS (SELECT 1 FROM queue e WHERE {e} AND e.state = 2 AND e.owner < ?2 AND e.seq < q.seq)"
    " OR EXISTS (SELECT 1 FROM queue e WHERE {e} AND e.state = 2 AND e.owner > ?2 AND e.seq < q.seq)))"
).format(e="e.queue_id = q.queue_id AND e.key = q.key AND e.state > 0")


class Mismatch(Exception):
    """A bulk statement met fewer rows than it named: roll back and do it again row by row, to say which."""


class Inlet:
    """What the I/O thread knows of one source: where it reads, and as whom."""

    def __init__(self, queue_ids: Sequence[int], *, ordered: bool, lease: float, max_bytes: int) -> None:
        self.queue_ids = tuple(queue_ids)
        self.ordered = ordered
        self.lease = lease
        self.max_bytes = max_bytes
        self.owner = 0
        self.lease_until = 0.0
        self.lapsed_since: float | None = None
        ids = ", ".join(map(str, self.queue_ids))
        self.select = self._select(_CLAIM_COLUMNS)
        self.peek = self._select("seq")
        self.promote = (
            f"UPDATE queue SET state = {READY} WHERE seq IN (SELECT seq FROM queue"
            f" WHERE queue_id IN ({ids}) AND state & 1 AND due_at <= ?1 LIMIT {_PROMOTED})"
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


class Owner(Struct, frozen=True):
    """One row of owners: a source that lives, or whose death nobody has noticed yet."""

    id: int
    live: str
    bell: str
    boot_id: str
    queue_ids: tuple[int, ...]
    ordered: bool


class Store:
    """The operations on one connection. `touched` gathers the queues in which something new may be received."""

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        self.execute: Callable[..., apsw.Cursor] = db.execute
        self.touched: set[int] = set()
        self.precise = False  # say which rows of a bulk statement were lost, at the price of speed
        self.owners: dict[int, Owner] = {}
        self._version = -1
        self._queues: dict[str, dict[str, int]] = {}
        self._routes: dict[str, tuple[int, ...]] = {}

    # -- routing

    def refresh(self) -> None:
        """Read queues and owners again when they changed. First in every transaction."""
        (version,) = self.execute("SELECT version FROM routing").fetchone()
        if version != self._version:
            self._queues = {}
            for queue_id, group, pattern in self.execute("SELECT id, grp, pattern FROM queues").fetchall():
                self._queues.setdefault(group, {})[pattern] = queue_id
            rows = self.execute("SELECT id, live, bell, boot_id, queue_ids, ordered FROM owners").fetchall()
            self.owners = {
                row[0]: Owner(*row[:4], queue_ids=tuple(json.loads(row[4])), ordered=bool(row[5])) for row in rows
            }
            self._routes = {}
            self._version = version

    def forget(self) -> None:
        """After a rollback: what was read of routing may never have been committed."""
        self._version = -1
        self.touched.clear()

    def bells(self) -> set[str]:
        """The bells of all who may want to know of what was touched."""
        touched = self.touched
        return {owner.bell for owner in self.owners.values() if not touched.isdisjoint(owner.queue_ids)}

    def _changed(self) -> None:
        self.execute("UPDATE routing SET version = version + 1")
        self.refresh()

    def _route(self, topic: str) -> tuple[int, ...]:
        route = self._routes.get(topic)
        if route is None:
            check_topic(topic, pattern=False)
            found = ((queues, best_match(queues, topic)) for queues in self._queues.values())
            route = tuple(queues[pattern] for queues, pattern in found if pattern is not None) or (UNASSIGNED,)
            if len(self._routes) >= 10_000:
                self._routes.clear()
            self._routes[topic] = route
        return route

    def _route_in_group(self, group: str, topic: str) -> int:
        pattern = best_match(self._queues.get(group, ()), topic)
        if pattern is not None:
            return self._queues[group][pattern]
        check_topic(topic, pattern=False)
        self.execute("INSERT INTO queues(grp, pattern, implied) VALUES (?, ?, 1)", (group, topic))
        self._changed()
        return self._queues[group][topic]

    # -- queues

    def missing(self, group: str, topics: Iterable[str]) -> list[str]:
        """The topics and patterns of `topics` for which the group has no queue of its own."""
        known = {pattern for (pattern,) in self.execute("SELECT pattern FROM queues WHERE grp = ? AND NOT implied", (group,))}
        return [topic for topic in topics if topic not in known]

    def open_queues(self, group: str, topics: Sequence[str], since: float | None) -> list[int]:
        """The ids of the group's queues for `topics`; new ones are filled with what is stored since `since`.

        `since`: seconds since 1970; 0 is everything, None nothing. What the group has under a pattern that fits less
        well moves to the new queue. What nobody wanted so far moves there as well; of what only other groups have it
        gets a copy.
        """
        for topic in self.missing(group, topics):
            self._open_queue(group, topic, since)
        return [self._queues[group][topic] for topic in topics]

    def _open_queue(self, group: str, pattern: str, since: float | None) -> None:
        before = dict(self._queues.get(group, {}))
        self.execute(
            "INSERT INTO queues(grp, pattern, implied) VALUES (?, ?, 0) ON CONFLICT DO UPDATE SET implied = 0",
            (group, pattern),
        )
        self._changed()
        own = self._queues[group]
        queue_id = own[pattern]
        self._drop_implied(group, pattern, queue_id)
        if pattern not in before:
            self._take_over_topics(own, before, queue_id, pattern)
        if since is not None:
            self._fill(queue_id, pattern, before, since)
        self.touched.add(queue_id)

    def _drop_implied(self, group: str, pattern: str, queue_id: int) -> None:
        """Queues that a message to the group made, before it subscribed, would hide their topic from a pattern."""
        for other, topic in self.execute("SELECT id, pattern FROM queues WHERE grp = ? AND implied", (group,)).fetchall():
            if matches(pattern, topic):
                self.execute("UPDATE queue SET queue_id = ? WHERE queue_id = ?", (queue_id, other))
                self.execute("DELETE FROM queues WHERE id = ?", (other,))
                self._changed()

    def _take_over_topics(self, own: dict[str, int], before: dict[str, int], queue_id: int, pattern: str) -> None:
        others = [other for topic, other in before.items() if topic in own]
        for other in others:
            for topic in self._topics("queue_id = ?", other):
                if best_match(own, topic) == pattern:
                    self.execute(
                        f"UPDATE queue SET queue_id = ? WHERE queue_id = ? AND topic = ? AND state <> {CLAIMED}",
                        (queue_id, other, topic),
                    )

    def _fill(self, queue_id: int, pattern: str, before: dict[str, int], since: float) -> None:
        for topic in self._topics("queue_id = 0"):
            if matches(pattern, topic):
                self.execute(
                    "UPDATE queue SET queue_id = ?1 WHERE queue_id = 0 AND topic = ?2 AND timestamp >= ?3",
                    (queue_id, topic, since),
                )
        for topic in self._topics("queue_id <> 0 AND queue_id <> ? AND NOT direct", queue_id):
            if matches(pattern, topic) and best_match(before, topic) is None:
                self._copy(queue_id, topic, since)

    def _topics(self, where: str, *bindings: Any) -> list[str]:
        return [topic for (topic,) in self.execute(f"SELECT DISTINCT topic FROM queue WHERE {where}", bindings).fetchall()]

    def _copy(self, queue_id: int, topic: str, since: float) -> None:
        waits = f"state & 1 AND failures = 0 AND due_at > {time.time()}"
        self.execute(
            "INSERT INTO queue(queue_id, state, due_at, topic, id, key, headers, timestamp, body)"
            f" SELECT ?1, iif({waits}, {SCHEDULED}, {READY}), iif({waits}, due_at, NULL), topic, id, key, headers,"
            " timestamp, body FROM queue WHERE seq IN (SELECT min(seq) FROM queue WHERE topic = ?2"
            " AND queue_id NOT IN (0, ?1) AND NOT direct AND timestamp >= ?3 GROUP BY id) ORDER BY seq",
            (queue_id, topic, since),
        )

    # -- publishing

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """Add the messages, each once per group that wants it, in order."""
        plain: list[tuple[Any, ...]] = []
        for message in messages:
            if message.delay > 0 or message.group is not None:
                self._insert(plain)
                plain = []
                self._publish_special(message)
                continue
            topic = message.topic
            headers = message.headers
            rest = (
                topic,
                message.id if message.id.isascii() else text(message.id),
                message.key if message.key is None or message.key.isascii() else text(message.key),
                encode_headers(headers) if headers else None,
                message.timestamp,
                message.body,
            )
            for queue_id in self._routes.get(topic) or self._route(topic):
                plain.append((queue_id, *rest))
        self._insert(plain)

    def _publish_special(self, message: Outgoing) -> None:
        group = message.group
        targets = self._route(message.topic) if group is None else (self._route_in_group(group, message.topic),)
        waits = message.delay > 0
        headers = encode_headers(message.headers) if message.headers else None
        key = None if message.key is None else text(message.key)
        rest = (message.topic, text(message.id), key, headers, message.timestamp, message.body)
        state, due_at = (SCHEDULED, time.time() + message.delay) if waits else (READY, None)
        for queue_id in targets:
            self.execute(_INSERT_FULL, (queue_id, *rest, state, due_at, int(group is not None)))
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
        """Whether a claim would find something now. Also outside a transaction."""
        due = self.due_at(inlet)
        if due is not None and due <= time.time():
            return True
        return self.execute(inlet.peek, (1, inlet.owner) if inlet.ordered else (1,)).fetchone() is not None

    def due_at(self, inlet: Inlet) -> float | None:
        """When the next waiting message of the inlet is due, on the wall clock."""
        return min((due for (due,) in self.execute(inlet.next_due).fetchall() if due is not None), default=None)

    def claim(self, inlet: Inlet, owner: int, demand: int) -> list[Message[Any]]:
        """Claim up to `demand` ready messages for `owner`, in order."""
        self.execute(inlet.promote, (time.time(),))
        messages: list[Message[Any]] = []
        seqs = array("q")
        size = 0
        cursor = self.execute(inlet.select, (demand, owner) if inlet.ordered else (demand,))
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
                f"UPDATE queue SET state = {CLAIMED}, owner = ?1, deliveries = deliveries + 1 WHERE seq IN carray(?2)",
                (owner, apsw.carray(seqs)),
            )
        return messages

    # -- settling

    def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement], max_payload: int) -> list[Refused]:
        """End deliveries; returns those that are not the consumer's any more, and those whose outputs cannot be stored."""
        refused = self._ack(acks) if acks else []
        for settlement in others:
            refusal = self._refusal(settlement.outputs, max_payload) if settlement.outputs else None
            if refusal is not None:
                refused.append(Refused(settlement.message, "rejected", refusal))
            elif not self._settle(settlement):
                refused.append(Refused(settlement.message, "lost"))
            elif settlement.outputs:
                self.publish(settlement.outputs)
        return refused

    def _ack(self, messages: Sequence[Message[Any]]) -> list[Refused]:
        by_owner: dict[int, list[int]] = {}
        for message in messages:
            seq, owner = message.token
            try:
                by_owner[owner].append(seq)
            except KeyError:
                by_owner[owner] = [seq]
        done: set[tuple[int, int]] = set()
        for owner, seqs in by_owner.items():
            self._touch_followers(owner)
            sql = "DELETE FROM queue WHERE seq IN carray(?1) AND owner = ?2"
            if self.precise:
                sql += " RETURNING seq"
                done.update((seq, owner) for (seq,) in self.execute(sql, (apsw.carray(array("q", seqs)), owner)).fetchall())
                continue
            self.execute(sql, (apsw.carray(array("q", seqs)), owner))
            if self.db.changes() != len(seqs):
                raise Mismatch
        return [Refused(message, "lost") for message in messages if message.token not in done] if self.precise else []

    def _touch_followers(self, owner: int) -> None:
        """With order_by a settled message may let a later one of its key go to another owner."""
        row = self.owners.get(owner)
        if row is not None and row.ordered:
            self.touched.update(row.queue_ids)

    def _refusal(self, outputs: Sequence[Outgoing], max_payload: int) -> str | None:
        for output in outputs:
            if len(output.body) > max_payload:
                return f"its output to {output.topic!r} has {len(output.body)} bytes; at most {max_payload} are allowed"
            try:
                check_topic(output.topic, pattern=False)
            except OptionError as error:
                return f"its output cannot be published: {error}"
        return None

    def _settle(self, settlement: Settlement) -> bool:
        token = settlement.message.token
        self._touch_followers(token[1])
        match settlement.outcome:
            case "ack" | "dead_letter":
                return self._one("DELETE FROM queue WHERE seq = ?1 AND owner = ?2", token)
            case "release" | "park":
                return self._back(f"state = {READY}, deliveries = deliveries - 1", token)
            case "retry":
                counts = "failures = failures + 1" if settlement.counted else "deliveries = deliveries - 1"
                if settlement.delay <= 0:
                    return self._back(f"state = {READY}, {counts}", token)
                due_at = time.time() + settlement.delay
                return self._back(f"state = {RETRYING}, {counts}, due_at = ?3", (*token, due_at))

    def _back(self, change: str, bindings: tuple[Any, ...]) -> bool:
        row = self.execute(
            f"UPDATE queue SET owner = NULL, {change} WHERE seq = ?1 AND owner = ?2 RETURNING queue_id", bindings
        ).fetchone()
        if row is None:
            return False
        self.touched.add(row[0])
        return True

    def _one(self, sql: str, bindings: tuple[Any, ...]) -> bool:
        self.execute(sql, bindings)
        return self.db.changes() == 1

    def suspect(self, token: tuple[int, int]) -> int | None:
        """Add one suspicion; returns how many there are now, None when the delivery is not the consumer's any more."""
        row = self.execute(
            "UPDATE queue SET suspicions = suspicions + 1 WHERE seq = ? AND owner = ? RETURNING suspicions", token
        ).fetchone()
        return None if row is None else row[0]

    # -- owners

    def add_owner(self, inlet: Inlet, pid: int, live: str, bell: str) -> int:
        """A new owner for the inlet, with a full lease."""
        self.execute(
            "INSERT INTO owners(pid, boot_id, lease_until, live, bell, queue_ids, ordered) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (pid, liveness.boot_id(), liveness.now() + inlet.lease, live, bell, json.dumps(inlet.queue_ids), int(inlet.ordered)),
        )
        owner: int = self.db.last_insert_rowid()
        self._changed()
        return owner

    def extend_lease(self, owner: int, until: float) -> None:
        self.execute("UPDATE owners SET lease_until = max(lease_until, ?) WHERE id = ?", (until, owner))

    def lapsed(self, now: float) -> list[int]:
        """Owners that hold messages and whose lease ended, or whose machine has been started anew since."""
        return [
            owner
            for (owner,) in self.execute(
                "SELECT id FROM owners WHERE (lease_until < ?1 OR boot_id <> ?2)"
                f" AND EXISTS (SELECT 1 FROM queue WHERE owner = owners.id AND state = {CLAIMED})",
                (now, liveness.boot_id()),
            ).fetchall()
        ]

    def drop_owner(self, owner: int, *, counted: bool) -> None:
        """Make all that `owner` holds ready again and forget it; its tokens are void from then on.

        `counted`: the hand-over counts as a delivery, as it must when a process died with the message in hand.
        """
        self.execute(
            f"UPDATE queue SET state = {READY}, owner = NULL, deliveries = deliveries - ?2"
            f" WHERE owner = ?1 AND state = {CLAIMED}",
            (owner, 0 if counted else 1),
        )
        row = self.owners.get(owner)
        if row is not None:
            self.touched.update(row.queue_ids)
        self.execute("DELETE FROM owners WHERE id = ?", (owner,))
        self._changed()

    def drop_orphans(self) -> None:
        """Make ready what owners hold that have no row; nobody should be able to cause that."""
        self.execute(
            f"UPDATE queue SET state = {READY}, owner = NULL WHERE state = {CLAIMED} AND owner NOT IN (SELECT id FROM owners)"
        )

    # -- looking

    def browse(self, topic: str, after: int, limit: int) -> list[Stored]:
        """A page of what is at rest in `topic`, by seq. Unassigned messages have an index, others are looked for."""
        columns = "seq, topic, body, id, key, headers, timestamp"
        sql = f"SELECT {columns} FROM queue WHERE queue_id = 0 AND topic = ?1 AND seq > ?2"
        if any(matches(pattern, topic) for queues in self._queues.values() for pattern in queues):
            sql = f"{sql} UNION ALL SELECT {columns} FROM queue WHERE +queue_id <> 0 AND topic = ?1 AND seq > ?2"
        return [_stored(*row) for row in self.execute(f"{sql} ORDER BY seq LIMIT ?3", (topic, after, limit)).fetchall()]

    def remove(self, seqs: Iterable[int]) -> None:
        """Delete rows, except what a consumer has in hand."""
        self.execute(
            f"DELETE FROM queue WHERE seq IN carray(?) AND NOT (state = {CLAIMED} AND owner IN (SELECT id FROM owners))",
            (apsw.carray(array("q", seqs)),),
        )

    def backlog(self, inlet: Inlet) -> Backlog:
        """What waits and is due, and for how long the first of it has."""
        now = time.time()
        count, oldest = 0, now
        for queue_id in inlet.queue_ids:
            for where in (f"state = {READY}", f"state & 1 AND due_at <= {now}"):
                source = f"FROM queue WHERE queue_id = {queue_id} AND {where}"
                (waiting,) = self.execute(f"SELECT count(*) {source}").fetchone()
                if waiting:
                    count += waiting
                    (since,) = self.execute(
                        f"SELECT max(timestamp, ifnull(due_at, timestamp)) {source}"
                        f" ORDER BY {'seq' if where[6] == '=' else 'due_at'} LIMIT 1"
                    ).fetchone()
                    oldest = min(oldest, since)
        return Backlog(count, max(0.0, now - oldest))


def _stored(seq: int, topic: str, body: bytes, id_: Any, key: Any, headers: str | None, timestamp: float) -> Stored:
    return Stored(
        str(seq), topic, body, untext(id_), None if key is None else untext(key),
        NO_HEADERS if headers is None else decode_headers(headers), timestamp,
    )  # fmt: skip


def text(value: str) -> str | bytes:
    """What SQLite can store of `value`: bytes when it is no valid Unicode (`surrogateescape` keeps foreign bytes)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogateescape")
    return value


def untext(value: str | bytes) -> str:
    """What `text` was given."""
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def encode_headers(headers: Any) -> str:
    """Headers as JSON. json escapes what is no valid Unicode, which msgspec refuses."""
    try:
        return msgspec.json.encode(dict(headers)).decode()
    except UnicodeEncodeError:
        return json.dumps(dict(headers))


_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


def decode_headers(headers: str) -> dict[str, str]:
    """What `encode_headers` was given."""
    try:
        return _decode_headers(headers)
    except msgspec.DecodeError:
        decoded: dict[str, str] = json.loads(headers)
        return decoded
