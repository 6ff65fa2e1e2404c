"""A group of the in-memory broker: its subscriptions and the queues they share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain

from ..._decisions.topics import best_match
from ._keyed import KeyedQueue
from ._queue import TOKEN, TOPIC, Entry, Hold, Queue, place_of

MAX_ROUTES = 100_000  # topics whose route is remembered


class Group:
    """One group: its subscriptions, the queues they share, and who holds what.

    Patterns that occur in the same subscriptions share one queue, so a source nearly always has one, and its messages
    stay in order over all its topics. A subscription stays known when its sources are gone: its messages wait for it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.subscriptions: dict[frozenset[str], bool] = {}  # topics, and whether they are handed out in order of keys
        self.queues: dict[str, Queue] = {}  # by pattern
        self.holds: list[Hold] = []
        self._routes: dict[str, Queue | None] = {}

    def route(self, topic: str) -> Queue | None:
        """The queue for messages of `topic`; None when no subscription wants them."""
        try:
            return self._routes[topic]
        except KeyError:
            pattern = best_match(self.queues, topic)
            if len(self._routes) > MAX_ROUTES:
                self._routes.clear()
            queue = self._routes[topic] = None if pattern is None else self.queues[pattern]
            return queue

    def all_queues(self) -> set[Queue]:
        return set(self.queues.values())

    def add(self, topics: frozenset[str], ordered: bool, delayed: Iterable[Entry]) -> None:
        """Add a subscription, or put it in order, and lay the queues out anew. `delayed`: retries of this group."""
        self.subscriptions[topics] = ordered or self.subscriptions.get(topics, False)
        old = self.all_queues()
        self._lay_out()
        for hold in self.holds:
            hold.queues = self.queues_of(hold.topics)
            for entry in hold.held.values():
                queue = self.queue_of(entry)
                if isinstance(queue, KeyedQueue):
                    queue.hold(entry, hold)
        for entry in delayed:
            queue = self.queue_of(entry)
            if isinstance(queue, KeyedQueue):
                queue.delay(entry)
        self._move(old)

    def queues_of(self, topics: frozenset[str]) -> tuple[Queue, ...]:
        return tuple({id(self.queues[topic]): self.queues[topic] for topic in topics}.values())

    def put_back(self, entry: Entry) -> None:
        """Let a message wait in its place, and wake who may take it."""
        queue = self.queue_of(entry)
        queue.put_back(entry)
        if queue.sleepers:
            queue.wake()

    def adopt(self, entries: Iterable[Entry]) -> None:
        """Let messages wait in their places. They are in order; those never handed over go where that costs least."""
        for entry in entries:
            queue = self.queue_of(entry)
            token = entry[TOKEN]
            fresh = type(token) is int and (not queue.ready or queue.ready[-1][TOKEN] < token)
            (queue.put if fresh else queue.put_back)(entry)
        for hold in self.holds:
            hold.wake()

    def queue_of(self, entry: Entry) -> Queue:
        queue = self.route(entry[TOPIC])
        assert queue is not None  # subscriptions only grow, so what was routed once has a queue
        return queue

    def _lay_out(self) -> None:
        """Make the queues: one for all patterns that occur in the same subscriptions."""
        made: dict[tuple[bool, ...], Queue] = {}
        self.queues = {}
        self._routes.clear()
        for pattern in chain.from_iterable(self.subscriptions):
            used = tuple(pattern in topics for topics in self.subscriptions)
            ordered = any(order for topics, order in self.subscriptions.items() if pattern in topics)
            if used not in made:
                made[used] = KeyedQueue() if ordered else Queue()
            self.queues[pattern] = made[used]

    def _move(self, old: Collection[Queue]) -> None:
        """Put what waited in the old queues into the new ones, and wake all who waited there."""
        for entry in chain.from_iterable(queue.parked() for queue in old):
            queue = self.queue_of(entry)
            (queue.park if isinstance(queue, KeyedQueue) else queue.put_back)(entry)
        self.adopt(sorted(chain.from_iterable(queue.waiting() for queue in old), key=place_of))
