"""The in-memory broker: groups, routes, delays, and what is held. It takes `now` and sets no timers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from heapq import heapify, heappop, heappush
from itertools import chain, count, starmap
from operator import attrgetter

from ..._decisions.topics import best_match, check_topic
from ...errors import OptionError, PayloadTooLarge
from ...message import NO_HEADERS, Message, Outgoing, Refused, Settlement
from ...source import Backlog, Start
from ._group import MAX_ROUTES, Group
from ._keyed import KeyedQueue
from ._queue import (
    TIMESTAMP,
    TOKEN,
    TOPIC,
    Entry,
    Hold,
    Private,
    Queue,
    again,
    as_new,
    place_of,
    retried,
    suspected,
    take_each,
)

Puts = tuple[Callable[[Entry], None], ...]
Route = tuple[Puts, tuple[Queue, ...]]
EARLY = 1e-6  # seconds: a timer may fire this much before its time

_topic_of = attrgetter("topic")


class Broker:
    """All state of one in-memory broker. Each call is one transaction: nothing else runs in between."""

    def __init__(self, max_payload: int) -> None:
        self.max_payload = max_payload
        self.groups: dict[str, Group] = {}
        self._routes: dict[str, Route] = {}
        self._unclaimed: dict[tuple[str | None, str], list[Entry]] = {}  # by the one group meant, and topic
        self._delayed: list[tuple[float, int, Entry, str | None, bool]] = []  # due, tie, entry, group, is it a retry
        self._places = 0
        self._ties = count()
        self._largest = 0  # the longest body yet: tells without a look at each when bytes cannot be too many

    # -- publishing ----------------------------------------------------------------------------------------------

    def publish(self, messages: Sequence[Outgoing], now: float) -> None:
        """Add messages in order: all or, when one cannot be taken, none. Raises PayloadTooLarge or OptionError."""
        if len(messages) == 1 and self._publish_one(messages[0]):
            return
        routes = self._check(messages)
        topic: str | None = None
        puts: Puts = ()
        place = self._places
        for message in messages:
            place += 1
            if message.topic != topic:
                topic = message.topic
                puts = routes[topic][0]
            headers = message.headers
            entry = (
                topic,
                message.body,
                message.id,
                message.key,
                headers if headers is NO_HEADERS else dict(headers),
                message.timestamp,
                None,
                place,
            )
            if message.delay > 0 or message.group is not None:
                self._publish_later(entry, message, now)
            else:
                for put in puts:
                    put(entry)
        self._places = place
        for _, queues in routes.values():
            for queue in queues:
                if queue.sleepers:
                    queue.wake()

    def _publish_one(self, message: Outgoing) -> bool:
        """Add a plain message to a topic that was published to before; False for any other. A third of the time."""
        route = self._routes.get(message.topic)
        headers = message.headers
        if route is None or message.delay > 0 or message.group is not None or len(message.body) > self._largest:
            return False
        self._places += 1
        entry = (
            message.topic,
            message.body,
            message.id,
            message.key,
            headers if headers is NO_HEADERS else dict(headers),
            message.timestamp,
            None,
            self._places,
        )
        puts, queues = route
        for put in puts:
            put(entry)
        for queue in queues:
            if queue.sleepers:
                queue.wake()
        return True

    def fault_of(self, messages: Sequence[Outgoing]) -> str | None:
        """Why these messages cannot be published; None when they can."""
        try:
            self._check(messages)
        except (PayloadTooLarge, OptionError) as error:
            return str(error)
        return None

    def _check(self, messages: Sequence[Outgoing]) -> dict[str, Route]:
        largest = max([len(message.body) for message in messages], default=0)
        if largest > self._largest:
            self._raise_largest(largest, messages)
        return {topic: self._routes.get(topic) or self._route(topic) for topic in set(map(_topic_of, messages))}

    def _raise_largest(self, largest: int, messages: Sequence[Outgoing]) -> None:
        if largest > self.max_payload:
            failed = [message for message in messages if len(message.body) > self.max_payload]
            raise PayloadTooLarge(
                f"message {failed[0].id} for {failed[0].topic!r} has {len(failed[0].body):,} bytes; "
                f"max_payload of this transport is {self.max_payload:,}",
                failed,
            )
        self._largest = largest

    def _route(self, topic: str) -> Route:
        check_topic(topic, pattern=False)
        queues = tuple(queue for group in self.groups.values() if (queue := group.route(topic)) is not None)
        puts = tuple(queue.put for queue in queues) or (self._unclaimed.setdefault((None, topic), []).append,)
        if len(self._routes) > MAX_ROUTES:
            self._routes.clear()
        route = self._routes[topic] = (puts, queues)
        return route

    def _publish_later(self, entry: Entry, message: Outgoing, now: float) -> None:
        if message.group is not None:
            entry = Private(entry)
        if message.delay > 0:
            self._push_delayed(now + message.delay, entry, message.group, retry=False)
        else:
            self._arrive(entry, message.group)

    def _arrive(self, entry: Entry, only: str | None) -> None:
        """Hand a message to the group it is meant for, or to all."""
        groups = self.groups.values() if only is None else [self.groups[only]] if only in self.groups else []
        wanted = [group for group in groups if group.route(entry[TOPIC]) is not None]
        for group in wanted:
            group.put_back(entry)
        if not wanted:
            self._unclaimed.setdefault((only, entry[TOPIC]), []).append(entry)

    # -- delay ---------------------------------------------------------------------------------------------------

    @property
    def next_due(self) -> float | None:
        """When the next delayed message is due; None without one."""
        return self._delayed[0][0] if self._delayed else None

    def release_due(self, now: float) -> None:
        """Hand out what is due."""
        while self._delayed and self._delayed[0][0] <= now + EARLY:
            _, _, entry, group, retry = heappop(self._delayed)
            if retry and group is not None:
                self.groups[group].put_back(entry)
            else:
                self._arrive(entry, group)

    def shift_clock(self, seconds: float) -> None:
        """Go on with another loop, whose clock is ahead by so much."""
        self._delayed = [(due + seconds, *rest) for due, *rest in self._delayed]  # type: ignore[misc]

    def _push_delayed(self, due: float, entry: Entry, group: str | None, *, retry: bool) -> None:
        heappush(self._delayed, (due, next(self._ties), entry, group, retry))

    # -- groups --------------------------------------------------------------------------------------------------

    def register(self, name: str, topics: frozenset[str], *, ordered: bool, start: Start) -> bool:
        """Make a group know a subscription, and give it what it may have of the past. False: it knew it already."""
        group = self.groups.get(name) or Group(name)
        if group.subscriptions.get(topics, None) in (True, ordered):
            return False
        new = topics - group.queues.keys()
        past = sorted(self._past(group, new, start), key=place_of)
        self.groups[name] = group
        self._routes.clear()
        group.add(topics, ordered, (item[2] for item in self._delayed if item[4] and item[3] == name))
        group.adopt(past)
        return True

    def _past(self, group: Group, new: frozenset[str], start: Start) -> Iterator[Entry]:
        """What no group has wanted so far, and copies of what other groups have not settled."""
        if start == "latest" or not new:
            return
        since = start.timestamp() if isinstance(start, datetime) else float("-inf")

        def wanted(topic: str) -> bool:
            return group.route(topic) is None and best_match(new, topic) is not None

        for (only, topic), entries in list(self._unclaimed.items()):
            if only in (None, group.name) and wanted(topic):
                yield from (entry for entry in entries if entry[TIMESTAMP] >= since)
                entries[:] = [entry for entry in entries if entry[TIMESTAMP] < since]
                if not entries:
                    del self._unclaimed[only, topic]
        copies = {
            place_of(entry): entry
            for other in self.groups.values()
            if other is not group
            for entry in self._unsettled(other)
            if entry[TIMESTAMP] >= since and not isinstance(entry, Private)
        }
        yield from (as_new(entry) for entry in copies.values() if wanted(entry[TOPIC]))

    def _unsettled(self, group: Group) -> Iterator[Entry]:
        yield from self._at_rest(group)
        for hold in group.holds:
            yield from hold.held.values()

    def _at_rest(self, group: Group) -> Iterator[Entry]:
        for queue in group.all_queues():
            yield from queue.waiting()
            yield from queue.parked()
        yield from (entry for _, _, entry, name, retry in self._delayed if retry and name == group.name)

    # -- sources -------------------------------------------------------------------------------------------------

    def open(self, name: str, topics: frozenset[str], loop: asyncio.AbstractEventLoop) -> Hold:
        """A new member of a group that knows the subscription."""
        hold = Hold(name, topics, loop)
        hold.queues = self.groups[name].queues_of(topics)
        self.groups[name].holds.append(hold)
        return hold

    def take(self, hold: Hold, demand: int, max_bytes: int) -> list[Message[object]]:
        """Up to `demand` messages, as deliveries of this source."""
        queues = hold.queues
        if len(queues) == 1:
            limit = max_bytes if demand * self._largest > max_bytes else None
            run = queues[0].take(hold, demand, limit)
        else:
            run = take_each(queues, hold, demand, max_bytes)
        if not run:
            return []
        held = hold.held
        for entry in run:
            held[entry[TOKEN]] = entry
        return list(starmap(Message, run))

    def leftover(self, hold: Hold) -> None:
        """Wake another source when there is still something in the queues that this one was woken for."""
        for queue in hold.queues:
            if queue.sleepers and (queue.ready or queue.back):
                queue.wake()

    def ack(self, hold: Hold, messages: Sequence[Message[object]]) -> list[Refused]:
        """End deliveries as successes. Returns those that this source had lost."""
        held = hold.held
        if any(queue.keyed for queue in hold.queues):
            self._leave(hold, [held[one.token] for one in messages if one.token in held])
        refused: list[Refused] = []
        message, left = messages[0], iter(messages)
        while True:  # once more for each that is lost, so that no other costs a `try`
            try:
                for message in left:
                    del held[message.token]
                return refused
            except KeyError:
                refused.append(lost(message))

    def end(self, hold: Hold, one: Settlement, now: float) -> Refused | None:
        """End one delivery and publish its outputs, both or neither."""
        entry = hold.held.get(one.message.token)
        if entry is None:
            return lost(one.message)
        if one.outputs:
            fault = self.fault_of(one.outputs)
            if fault is not None:
                return Refused(one.message, "rejected", fault)
        del hold.held[one.message.token]
        if one.outputs:
            self.publish(one.outputs, now)
        group = self.groups[hold.group]
        if one.outcome == "park":
            self._park(group, hold, again(entry))
        elif one.outcome == "retry":
            self._later(group, hold, retried(entry, counted=one.counted), one.delay, now)
        elif one.outcome == "release":
            self._later(group, hold, again(entry), one.delay, now)
        else:
            self._leave(hold, [entry])
        return None

    def suspect(self, hold: Hold, message: Message[object]) -> bool:
        """Write down that the message is suspected. False when the source has lost the delivery."""
        entry = hold.held.get(message.token)
        if entry is None:
            return False
        entry = hold.held[message.token] = suspected(entry)
        message.suspicions = entry[-2]
        message.suspect = False
        return True

    def give_back(self, hold: Hold, *, died: bool, keep: Collection[object] = ()) -> None:
        """Take deliveries from a source, but for the tokens in `keep`. If it died they count and will be suspects."""
        entries = [again(hold.held.pop(token), deliveries=int(died)) for token in hold.held.keys() - set(keep)]
        self._give_back(self.groups[hold.group], hold, entries)

    def close(self, hold: Hold, *, died: bool) -> None:
        """The source is gone; what it held goes back. Idempotent."""
        group = self.groups[hold.group]
        if hold in group.holds:
            group.holds.remove(hold)
            self.give_back(hold, died=died)
            for queue in hold.queues:
                if isinstance(queue, KeyedQueue):
                    queue.forget(hold)
            hold.wake()

    def close_dead(self) -> None:
        """Close the sources whose loop is closed: they cannot do it any more."""
        for hold in [hold for group in self.groups.values() for hold in group.holds if hold.loop.is_closed()]:
            self.close(hold, died=True)

    def held(self, name: str) -> int:
        """How many deliveries of a group are unsettled."""
        group = self.groups.get(name)
        return sum(len(hold.held) for hold in group.holds) if group else 0

    def _give_back(self, group: Group, hold: Hold, entries: Iterable[Entry]) -> None:
        entries = list(entries)
        for entry in entries:
            group.queue_of(entry).put_back(entry)
        self._leave(hold, entries)
        for queue in hold.queues:
            if queue.sleepers:
                queue.wake()

    def _later(self, group: Group, hold: Hold, entry: Entry, delay: float, now: float) -> None:
        if delay <= 0:
            self._give_back(group, hold, [entry])
            return
        self._push_delayed(now + delay, entry, group.name, retry=True)
        queue = group.route(entry[TOPIC])
        if isinstance(queue, KeyedQueue):
            queue.delay(entry)
            queue.leave(entry)

    def _park(self, group: Group, hold: Hold, entry: Entry) -> None:
        queue = group.route(entry[TOPIC])
        if not isinstance(queue, KeyedQueue):
            for topics in [topics for topics in group.subscriptions if group.queues_of(topics) == (queue,)]:
                retries = (item[2] for item in self._delayed if item[4] and item[3] == group.name)
                group.add(topics, True, retries)
            self._routes.clear()
            queue = group.route(entry[TOPIC])
        assert isinstance(queue, KeyedQueue)
        queue.park(entry)
        queue.leave(entry)
        queue.wake()

    def _leave(self, hold: Hold, entries: Iterable[Entry]) -> None:
        group = self.groups[hold.group]
        for entry in entries:
            queue = group.route(entry[TOPIC])
            if isinstance(queue, KeyedQueue):
                queue.leave(entry)

    # -- looking -------------------------------------------------------------------------------------------------

    def backlog(self, hold: Hold, now: float) -> Backlog:
        """What waits for a source's subscription; `now` is seconds since 1970."""
        group = self.groups[hold.group]
        due = [entry for queue in hold.queues for entry in queue.waiting()]
        parked = sum(1 for queue in hold.queues for _ in queue.parked())
        later = sum(
            1 for _, _, entry, name, _ in self._delayed
            if name in (None, group.name) and group.route(entry[TOPIC]) in hold.queues
        )  # fmt: skip
        oldest = min((entry[TIMESTAMP] for entry in due), default=now)
        return Backlog(len(due) + parked + later, max(0.0, now - oldest))

    def browse(self, topic: str, after: int) -> list[Entry]:
        """What is at rest in a topic behind a place, oldest first; what a source holds is not."""
        found = {place_of(entry): entry for entry in self._resting() if entry[TOPIC] == topic}
        return [found[place] for place in sorted(found) if place > after]

    def topics_at_rest(self) -> set[str]:
        """The topics of what no source holds."""
        return {entry[TOPIC] for entry in self._resting()}

    def _resting(self) -> Iterator[Entry]:
        return chain(
            chain.from_iterable(self._at_rest(group) for group in self.groups.values()),
            chain.from_iterable(self._unclaimed.values()),
            (item[2] for item in self._delayed if not item[4]),
        )

    def remove(self, places: Collection[int]) -> None:
        """Delete what is at rest in these places, for every group."""
        for group in self.groups.values():
            for queue in group.all_queues():
                queue.drop(places)
        for entries in self._unclaimed.values():
            entries[:] = [entry for entry in entries if place_of(entry) not in places]
        self._delayed = [item for item in self._delayed if place_of(item[2]) not in places]
        heapify(self._delayed)


def lost(message: Message[object]) -> Refused:
    """What a source is told that settles what it does not hold."""
    return Refused(message, "lost", "this source does not hold the delivery any more")
