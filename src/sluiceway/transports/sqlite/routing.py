"""Which messages go where: the groups' queues, what fills a new one, and the owners who receive from them."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import apsw
from msgspec import Struct

from ..._decisions.topics import best_match, check_topic, matches
from . import liveness
from .schema import BACK, CLAIMED, FRESH, SCHEDULED, UNASSIGNED

_MAX_ROUTES = 10_000  # topics whose route is kept


class Owner(Struct, frozen=True):
    """A source that lives, or whose death nobody has noticed yet."""

    id: int
    live: str
    bell: str
    queue_ids: frozenset[int]
    ordered: bool


class Routing:
    """Queues and owners, as the database has them. `touched` gathers the queues in which something new may be received.

    A queue belongs to a group and one of its patterns. An *implied* one was made by a message for a group that has not
    subscribed yet; it gets nothing but such messages, and goes up in the first subscription that matches.
    """

    def __init__(self, db: apsw.Connection, touched: set[int]) -> None:
        self.owners: dict[int, Owner] = {}
        self._db = db
        self._execute: Callable[..., Any] = db.execute
        self._touched = touched
        self._version = -1
        self._queues: dict[str, dict[str, int]] = {}
        self._groups: dict[int, str] = {}
        self._implied: dict[tuple[str, str], int] = {}
        self._routes: dict[str, tuple[int, ...]] = {}

    def refresh(self) -> None:
        """Read queues and owners again when they changed. First in every transaction."""
        (version,) = self._execute("SELECT version FROM routing").fetchone()
        if version != self._version:
            self._queues, self._groups, self._implied, self._routes = {}, {}, {}, {}
            for queue_id, group, pattern, implied in self._execute("SELECT id, grp, pattern, implied FROM queues"):
                if implied:
                    self._implied[group, pattern] = queue_id
                else:
                    self._queues.setdefault(group, {})[pattern] = queue_id
                    self._groups[queue_id] = group
            self.owners = {
                row[0]: Owner(row[0], row[1], row[2], frozenset(json.loads(row[3])), bool(row[4]))
                for row in self._execute("SELECT id, live, bell, queue_ids, ordered FROM owners")
            }
            self._version = version

    def forget(self) -> None:
        """After a rollback: what was read may never have been committed."""
        self._version = -1

    def _changed(self) -> None:
        self._execute("UPDATE routing SET version = version + 1")
        self.refresh()

    # -- routes

    def of(self, topic: str) -> tuple[int, ...]:
        """The queues that get a message of `topic`: one per group that wants it, else that of unassigned messages.

        Raises OptionError for a topic that cannot be.
        """
        route = self._routes.get(topic)
        if route is None:
            check_topic(topic, pattern=False)
            found = ((queues, best_match(queues, topic)) for queues in self._queues.values())
            route = tuple(queues[pattern] for queues, pattern in found if pattern is not None) or (UNASSIGNED,)
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            self._routes[topic] = route
        return route

    def of_group(self, group: str, topic: str) -> int:
        """The queue that gets a message of `topic` for `group` alone; made when the group has none."""
        queues = self._queues.get(group, {})
        pattern = best_match(queues, topic)
        if pattern is not None:
            return queues[pattern]
        if (group, topic) not in self._implied:
            check_topic(topic, pattern=False)
            self._execute("INSERT INTO queues(grp, pattern, implied) VALUES (?, ?, 1)", (group, topic))
            self._changed()
        return self._implied[group, topic]

    def right_queue(self, queue_id: int, topic: str) -> int:
        """Where a message of `topic` that comes back to `queue_id` belongs: its group may have a closer match."""
        queues = self._queues[self._groups[queue_id]]
        if len(queues) == 1:
            return queue_id
        pattern = best_match(queues, topic)
        return queue_id if pattern is None else queues[pattern]

    def is_wanted(self, topic: str) -> bool:
        """Whether messages of `topic` can be in any queue but that of unassigned messages."""
        return any(topic == implied for _, implied in self._implied) or any(
            best_match(queues, topic) is not None for queues in self._queues.values()
        )

    # -- queues

    def missing(self, group: str, topics: Iterable[str]) -> list[str]:
        """Those of `topics` that the group has not subscribed to so far."""
        known = self._queues.get(group, {})
        return [topic for topic in dict.fromkeys(topics) if topic not in known]

    def open(self, group: str, topics: Sequence[str], since: float | None) -> list[int]:
        """The ids of the group's queues for `topics`; new ones are filled with what is stored since `since`.

        `since`: seconds since 1970, -inf for all, None for nothing. What the group has under a pattern that fits less
        well moves to the new queue. So does what nobody wanted so far; of what only other groups have it gets a copy.
        """
        for topic in self.missing(group, topics):
            self._open(group, topic, since)
        return [self._queues[group][topic] for topic in dict.fromkeys(topics)]

    def _open(self, group: str, pattern: str, since: float | None) -> None:
        before = self._queues.get(group, {})
        self._execute(
            "INSERT INTO queues(grp, pattern, implied) VALUES (?, ?, 0) ON CONFLICT DO UPDATE SET implied = 0",
            (group, pattern),
        )
        self._changed()
        queue_id = self._queues[group][pattern]
        self._absorb_implied(group, pattern, queue_id)
        self._absorb_worse(self._queues[group], pattern)
        if since is not None:
            self._adopt(queue_id, pattern, since)
            self._copy_from_others(queue_id, pattern, before, since)
        self._touched.add(queue_id)

    def _absorb_implied(self, group: str, pattern: str, queue_id: int) -> None:
        for (owner, topic), implied in list(self._implied.items()):
            if owner == group and matches(pattern, topic):
                self._execute("UPDATE queue SET queue_id = ? WHERE queue_id = ?", (queue_id, implied))
                self._execute("DELETE FROM queues WHERE id = ?", (implied,))
                self._changed()

    def _absorb_worse(self, queues: dict[str, int], pattern: str) -> None:
        """What is claimed stays where it is, and goes to the right queue if it comes back."""
        for other, queue_id in queues.items():
            if other != pattern:
                for topic in self._topics("queue_id = ?", queue_id):
                    if best_match(queues, topic) == pattern:
                        self._execute(
                            "UPDATE queue SET queue_id = ?1 WHERE queue_id = ?2 AND topic = ?3"
                            " AND state <> 2 AND (state <> 0 OR seq > (SELECT head FROM queues WHERE id = ?2))",
                            (queues[pattern], queue_id, topic),
                        )

    def _adopt(self, queue_id: int, pattern: str, since: float) -> None:
        for topic in self._topics("queue_id = 0"):
            if matches(pattern, topic):
                self._execute(
                    "UPDATE queue SET queue_id = ? WHERE queue_id = 0 AND topic = ? AND timestamp >= ?",
                    (queue_id, topic, since),
                )

    def _copy_from_others(self, queue_id: int, pattern: str, before: dict[str, int], since: float) -> None:
        """Topics that the group has had under another pattern are left out: it has seen their messages."""
        now = time.time()
        waits = f"state = {SCHEDULED} AND due_at > {now}"
        for topic in self._topics("queue_id NOT IN (0, ?) AND NOT direct", queue_id):
            if matches(pattern, topic) and best_match(before, topic) is None:
                self._execute(
                    "INSERT INTO queue(queue_id, state, due_at, topic, id, key, headers, timestamp, body)"
                    f" SELECT ?1, iif({waits}, {SCHEDULED}, {FRESH}), iif({waits}, due_at, NULL), topic, id, key,"
                    " headers, timestamp, body FROM queue WHERE seq IN (SELECT min(seq) FROM queue WHERE topic = ?2"
                    " AND queue_id NOT IN (0, ?1) AND NOT direct AND timestamp >= ?3 GROUP BY id) ORDER BY seq",
                    (queue_id, topic, since),
                )

    def _topics(self, where: str, *bindings: Any) -> list[str]:
        rows = self._execute(f"SELECT DISTINCT topic FROM queue WHERE {where}", bindings).fetchall()
        return [topic for (topic,) in rows]

    # -- owners

    def bells(self, queue_ids: set[int]) -> set[str]:
        """The bells of all who receive from one of the queues."""
        return {owner.bell for owner in self.owners.values() if not owner.queue_ids.isdisjoint(queue_ids)}

    def add_owner(self, queue_ids: Sequence[int], *, ordered: bool, lease_until: float, live: str, bell: str) -> int:
        """A new owner; its id was never used before."""
        self._execute(
            "INSERT INTO owners(pid, boot_id, lease_until, live, bell, queue_ids, ordered)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (os.getpid(), liveness.boot_id(), lease_until, live, bell, json.dumps(queue_ids), int(ordered)),
        )
        owner: int = self._db.last_insert_rowid()
        self._changed()
        return owner

    def extend_lease(self, owner: int, until: float) -> None:
        """Set the lease to end at `until`, unless it ends later already."""
        self._execute("UPDATE owners SET lease_until = max(lease_until, ?) WHERE id = ?", (until, owner))

    def lapsed(self) -> list[int]:
        """Owners that hold messages and whose lease has ended, or whose machine has been started anew since."""
        rows = self._execute(
            "SELECT id FROM owners o WHERE (lease_until < ? OR boot_id <> ?) AND ("
            f"EXISTS (SELECT 1 FROM queue WHERE owner = o.id AND state = {CLAIMED})"
            " OR EXISTS (SELECT 1 FROM claims c JOIN queue q ON q.queue_id = c.queue_id"
            f" AND q.seq BETWEEN c.first AND c.last AND q.state = {FRESH} WHERE c.owner = o.id))",
            (liveness.now(), liveness.boot_id()),
        ).fetchall()
        return [owner for (owner,) in rows]

    def keep(self, owner: int, seqs: Sequence[int]) -> None:
        """Hand back all that `owner` holds but `seqs`, uncounted. It stays the owner of those until its lease ends."""
        if owner in self.owners:
            heir = f"UPDATE queue SET state = {CLAIMED}, owner = NULL WHERE seq IN carray(?1)"
            ours = f"(state = {FRESH} OR state = {CLAIMED} AND owner = ?2)"
            self._execute(f"{heir} AND {ours}", (apsw.carray(array("q", seqs)), owner))
            self._hand_back(owner, counted=False)
            self._execute(f"UPDATE queue SET owner = ? WHERE state = {CLAIMED} AND owner IS NULL", (owner,))

    def drop_owner(self, owner: int, *, counted: bool) -> None:
        """Hand back all that `owner` holds and forget it; its tokens are void from then on. Idempotent.

        `counted`: the hand-over counts as a delivery, as it must when a process died with the message in hand.
        """
        if owner in self.owners:
            self._hand_back(owner, counted=counted)
            self._execute("DELETE FROM owners WHERE id = ?", (owner,))
            self._changed()

    def _hand_back(self, owner: int, *, counted: bool) -> None:
        back = f"UPDATE queue SET state = {BACK}, owner = NULL, deliveries = deliveries + {int(counted)}"
        self._execute(f"{back} WHERE owner = ? AND state = {CLAIMED}", (owner,))
        runs = self._execute("SELECT queue_id, first, last FROM claims WHERE owner = ?", (owner,)).fetchall()
        for run in runs:
            self._execute(f"{back} WHERE queue_id = ? AND state = {FRESH} AND seq BETWEEN ? AND ?", run)
        self._execute("DELETE FROM claims WHERE owner = ?", (owner,))
        for queue_id in self.owners[owner].queue_ids:
            self._put_right(queue_id)

    def _put_right(self, queue_id: int) -> None:
        self._touched.add(queue_id)
        if len(self._queues[self._groups[queue_id]]) > 1:
            for topic in self._topics(f"queue_id = ? AND state = {BACK}", queue_id):
                right = self.right_queue(queue_id, topic)
                if right != queue_id:
                    self._touched.add(right)
                    self._execute(
                        f"UPDATE queue SET queue_id = ? WHERE queue_id = ? AND state = {BACK} AND topic = ?",
                        (right, queue_id, topic),
                    )
