"""One member of a group: the thread that alone touches its consumer. It reads by demand, hands out, commits."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from ..._decisions.backoff import reconnect_delay
from ...errors import TransportError
from ...message import Message
from ...source import Start
from .joining import Joining
from .partition import Partition, is_there
from .requests import Ask, Settling, Token, answer, run_in
from .settings import Settings
from .topics import Topics
from .wire import Record, read_record

log = logging.getLogger("sluiceway.kafka")

NAP = 0.05  # seconds for which nothing but a commit's end or a record is noticed
PAUSE_AFTER = 0.1  # seconds without demand after which a partition is paused: that throws away what was fetched
AHEAD = 1_000  # records that are read of a partition before anyone asks for them
AHEAD_BYTES = 8 * 1024 * 1024  # and their bytes, by the largest body that came lately
AT_ONCE = 500  # records that are read in one go

Place = tuple[str, bool, Start]
"""The topic as our users name it, whether it is one of retries, and where a new group begins."""


class Member:
    """The event loop uses `attach`, `detach`, `ask`, `settle`, `call` and `close`; the rest belongs to the thread."""

    def __init__(
        self, settings: Settings, topics: Topics, group: str, forward: Callable[[Member, Partition, Record], None]
    ) -> None:
        self.group = group
        self.topics = topics
        self.session_timeout = settings.session_timeout
        self.partitions: dict[tuple[str, int], Partition] = {}
        self.ended = False
        self.trouble: str | None = None
        self.sources: set[Any] = set()
        self._forward = forward
        self._loop = asyncio.get_running_loop()
        self._places: dict[str, Place] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._asks: list[Ask] = []
        self._handed: list[tuple[Ask, list[Message[Any]]]] = []
        self._tells: list[Callable[[], None]] = []
        self._deliveries = count(1)
        self._joining = Joining(self)
        self._waiting_to_join: list[tuple[int, asyncio.Future[Any]]] = []
        self._tries = 0
        self._commit_again = 0.0
        self._largest = 64 * 1024  # bytes of the largest body that came lately
        self._nap = 0.001
        self._wanted_at = 0.0
        self._polled_at = 0.0
        self._keep: frozenset[int] = frozenset()
        self.consumer = Consumer({**settings.consumer(group), "error_cb": self._on_error})
        self._thread = threading.Thread(target=self._run, name=f"sluiceway-kafka {group}", daemon=True)
        self._thread.start()

    # -- for the event loop

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread, soon."""
        if self.ended:
            raise TransportError(f"the member of group {self.group!r} is closed")
        with self._wake:
            self._calls.append(function)
            self._wake.notify()

    async def attach(self, source: Any, places: dict[str, Place]) -> None:
        """Read these topics too. Their partitions are given out when this returns, or the broker is away."""
        joined: asyncio.Future[Any] = self._loop.create_future()
        self.sources.add(source)

        def subscribe() -> None:
            new = places.keys() - self._places.keys()
            self._places |= {name: places[name] for name in new}
            if not new:
                self._tells.append(answer(joined, None))
                return
            self._waiting_to_join.append((self._joining.joined, joined))
            self._subscribe()

        self.call(subscribe)
        await asyncio.wait([joined], timeout=10)

    async def detach(self, source: Any, keep: Iterable[int]) -> bool:
        """Take back what a source has in hand, but for `keep`. Returns whether anyone still needs the member."""
        kept = frozenset(keep)
        done: asyncio.Future[Any] = self._loop.create_future()

        def give_back() -> None:
            self._asks = [ask for ask in self._asks if ask.source is not source]
            for p in self.partitions.values():
                for offset, held in list(p.hand.items()):
                    if held.source is source and held.delivery not in kept:
                        p.end(Token(*p.scope, offset, held.delivery), True)
            self._tells.append(answer(done, None))

        self._keep |= kept
        self.sources.discard(source)
        try:
            self.call(give_back)
        except TransportError:
            return False
        await done
        return bool(self.sources or self._keep)

    def ask(self, ask: Ask) -> None:
        self.call(lambda: self._asks.append(ask))

    def give_up(self, ask: Ask) -> None:
        """It is not to be answered any more."""

        def forget() -> None:
            if ask in self._asks:
                self._asks.remove(ask)

        self.call(forget)

    def settle(self, settling: Settling) -> None:
        self.call(lambda: self._settle(settling))

    async def close(self) -> None:
        """Leave the group. What `detach` was told to keep counts as in the hand of a dead process. Idempotent."""
        self.ended = True
        with self._wake:
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    # -- the thread

    def _run(self) -> None:
        try:
            while not self.ended:
                self._turn()
        except BaseException as error:  # a bug: nobody may wait for ever because of it
            log.exception("the thread of group %r failed; its sources must be opened anew", self.group)
            self.has_trouble(repr(error))
        finally:
            self.ended = True
            self._leave()

    def _leave(self) -> None:
        try:
            self._do_calls()
            for p in self.partitions.values():
                p.leaving = True
                p.give_back(keep=self._keep)
            self.commit_all(list(self.partitions.values()))
            self.consumer.close()
        except Exception as error:  # it leaves in any case
            log.warning("leaving group %r: %s; its members get what was in hand", self.group, error)
        for p in list(self.partitions.values()):
            self.is_gone(p)
        self.partitions.clear()
        for ask in self._asks:
            self._tells.append(answer(ask.answer, []))
        self._tell()

    def _turn(self) -> None:
        self._do_calls()
        self._read()
        if time.monotonic() >= self._commit_again:
            self._hand_out()
            self._commit([p for p in self.partitions.values() if p.dirty])
        self._tell()

    def settle_for(self, seconds: float) -> None:
        """Take what is settled meanwhile, inside a poll."""
        self._do_calls()
        self._commit([p for p in self.partitions.values() if p.dirty])
        self._tell()
        self._sleep(seconds)

    def _do_calls(self) -> None:
        while self._calls:
            self._nap = 0.001
            self._calls.popleft()()

    def _sleep(self, seconds: float) -> None:
        with self._wake:
            if not self._calls and not self.ended:
                self._wake.wait(max(0.0, seconds))

    def _subscribe(self) -> None:
        joining = self._joining
        self.consumer.subscribe(
            sorted(self._places),
            on_assign=joining.on_assign,
            on_revoke=joining.on_revoke,
            on_lost=joining.on_lost,
        )

    # -- reading

    def _read(self) -> None:
        now = time.time()
        missing, wait = self._look(now)
        self._pause_and_resume()
        if not self._places:
            self._sleep(min(wait, NAP))
            return
        if missing:
            records = self.consumer.consume(min(missing, AT_ONCE, max(1, self._most_bytes // self._largest)), 0)
        elif time.monotonic() - self._polled_at > NAP:
            records = self._one(0)  # for what happens to the member; a record that comes along is kept
        else:
            records = []
        if not records and wait > 0 and not self._calls and not self.ended:
            if missing and not any(p.hand for p in self.partitions.values()):
                records = self._one(min(wait, NAP))
            else:
                self._sleep(min(wait, self._nap if missing else NAP))
                self._nap = min(0.02, self._nap * 1.5)
        if records:
            self._nap = 0.001
            self._came(records)

    def _one(self, seconds: float) -> list[Any]:
        record = self.consumer.poll(seconds)
        self._polled_at = time.monotonic()
        return [] if record is None else [record]

    @property
    def _most_bytes(self) -> int:
        return min((ask.max_bytes for ask in self._asks), default=1)

    def _look(self, now: float) -> tuple[int, float]:
        """How many more records are asked for, and for how long there is nothing else to do."""
        wait = NAP
        missing = 0
        for ask in self._asks:
            ready = 0
            for p in self.partitions.values():
                if p.topic in ask.topics and (due := p.next_due()) is not None:
                    wait = min(wait, due - now)
                    ready += 0 if p.retries else len(p.ready)
            missing += max(0, ask.demand - ready)
        if any(p.dirty for p in self.partitions.values()):
            wait = min(wait, self._commit_again - time.monotonic())
        return missing, wait

    def _pause_and_resume(self) -> None:
        """Only what is asked for is read. One that is paused and resumed fetches again, so it takes a moment."""
        now = time.monotonic()
        wanted = {topic for ask in self._asks for topic in ask.topics}
        if wanted:
            self._wanted_at = now
        for p in self.partitions.values():
            if p.retries or p.topic in wanted:
                pause = self._is_ahead(p) or p.blocked
            else:
                pause = bool(p.ready) and (p.paused or now - self._wanted_at > PAUSE_AFTER or self._is_ahead(p))
            if pause != p.paused and not p.leaving:
                p.paused = pause
                (self.consumer.pause if pause else self.consumer.resume)([TopicPartition(p.name, p.number)])

    def _is_ahead(self, p: Partition) -> bool:
        return len(p.ready) >= min(AHEAD, max(1, AHEAD_BYTES // self._largest))

    def _came(self, raws: Sequence[Any]) -> None:
        by_partition: dict[tuple[str, int], list[Record]] = {}
        largest = 0
        for raw in raws:
            error = raw.error()
            if error is not None:
                self._on_error(error)
                continue
            record = read_record(raw)
            largest = max(largest, len(record.body))
            by_partition.setdefault((raw.topic(), raw.partition()), []).append(record)
        self._largest = max(1, largest, self._largest // 2)
        if by_partition and self.trouble is not None:
            self.trouble = None
        for where, records in by_partition.items():
            p = self.partitions.get(where)
            if p is None:
                continue
            try:
                self._put(p, p.came(records))
            except ValueError:
                self._joining.begin_anew(p)

    def _put(self, p: Partition, records: Sequence[Record]) -> None:
        now = time.time()
        for record in records:
            elsewhere = record.envelope.group not in (None, self.group)
            if elsewhere or (p.removed is not None and not is_there(p.removed, record.offset)):
                p.finish(record.offset)
            elif p.retries:
                p.put(record, record.due if record.due > now else 0.0)
            elif record.due > now:
                self._tells.append(lambda record=record: self._forward(self, p, record))  # type: ignore[misc]
            else:
                p.put(record)

    # -- handing out and settling

    def _hand_out(self) -> None:
        now = time.time()
        for ask in list(self._asks):
            messages: list[Message[Any]] = []
            size = 0
            for p in self.partitions.values():
                if p.topic not in ask.topics or p.leaving:
                    continue
                while len(messages) < ask.demand and (due := p.next_due()) is not None and due <= now:
                    size += len(p.ready[0][2].body)
                    if messages and size > ask.max_bytes:
                        break
                    messages.append(p.hand_out(ask.source, next(self._deliveries)))
            if messages:
                self._asks.remove(ask)
                self._handed.append((ask, messages))

    def _settle(self, settling: Settling) -> None:
        touched: set[Partition] = set()
        for token, end in settling.ends:
            p = self.partitions.get((token.topic, token.partition))
            if p is not None and p.generation == token.generation and p.end(token, end):
                touched.add(p)
            else:
                settling.lost.append(token)
        settling.waits = len(touched)
        for p in touched:
            p.waiters.append(settling)
        if not touched:
            self._tells.append(answer(settling.done, settling.lost))

    def commit_all(self, partitions: Sequence[Partition]) -> None:
        """Commit what these tell now, or say why that cannot be."""
        self._commit_again = 0.0
        for _ in range(3):
            self._commit(partitions)
            if not any(p.dirty for p in partitions):
                return
            time.sleep(0.05)

    def _commit(self, partitions: Sequence[Partition]) -> None:
        news = [(p, p.commit()) for p in partitions]
        asked = [TopicPartition(p.name, p.number, w.offset, metadata=w.metadata) for p, w in news if w is not None]
        failed: set[tuple[str, int]] = set()
        if asked:
            try:
                for one in self.consumer.commit(offsets=asked, asynchronous=False) or ():
                    if one.error is not None:
                        failed.add((one.topic, one.partition))
                        self.has_trouble(f"committing {one.topic}: {one.error.str()}")
            except KafkaException as error:
                failed = {(one.topic, one.partition) for one in asked}
                self.has_trouble(f"committing offsets of group {self.group!r}: {error.args[0].str()}")
        self._tries = self._tries + 1 if failed else 0
        self._commit_again = (
            time.monotonic() + reconnect_delay(self._tries, random.random(), cap=1.0) if failed else 0.0
        )
        for p, what in news:
            if (p.name, p.number) not in failed:
                p.is_committed(what)
                self._settled(p)
        self._deliver(failed)

    def _settled(self, p: Partition) -> None:
        for settling in p.waiters:
            settling.waits -= 1
            if not settling.waits:
                self._tells.append(answer(settling.done, settling.lost))
        p.waiters.clear()

    def _deliver(self, failed: set[tuple[str, int]]) -> None:
        """Give what was handed out to those who asked, but for what is not committed."""
        handed, self._handed = self._handed, []
        for ask, messages in handed:
            given: list[Message[Any]] = []
            for message in messages:
                token = message.token
                p = self.partitions.get((token.topic, token.partition))
                if p is None or (token.topic, token.partition) in failed:
                    if p is not None:
                        p.end(token, True)
                else:
                    given.append(message)
            if given:
                self._tells.append(lambda ask=ask, given=given: self._answer(ask, given))  # type: ignore[misc]
            else:
                self._asks.append(ask)

    def _answer(self, ask: Ask, messages: list[Message[Any]]) -> None:
        """In the event loop: one that gave up meanwhile has none of it."""
        if not ask.answer.done():
            ask.answer.set_result(messages)
        elif not self.ended:
            self.settle(Settling([(message.token, True) for message in messages]))

    def _tell(self) -> None:
        if self._tells:
            tells, self._tells = self._tells, []
            run_in(self._loop, lambda: [tell() for tell in tells])

    # -- what happens to it

    def place(self, name: str) -> Place:
        return self._places[name]

    def was_given(self, partitions: int) -> None:
        log.debug("group %r was given %d partitions", self.group, partitions)
        self.trouble = None
        waiting, self._waiting_to_join = self._waiting_to_join, []
        for _, joined in waiting:
            self._tells.append(answer(joined, None))

    def tell_revoked(self, partitions: Sequence[Partition], seconds: float | None) -> None:
        scopes = frozenset(p.scope for p in partitions)
        if scopes:
            for source in list(self.sources):
                run_in(self._loop, lambda source=source: source.revoked(scopes, seconds))

    def is_gone(self, p: Partition) -> None:
        """Whoever waits for a commit of it hears that it is lost."""
        for settling in p.waiters:
            settling.lost += [t for t, _ in settling.ends if t[:3] == p.scope and t.delivery in p.unconfirmed]
        self._settled(p)

    def has_trouble(self, what: str) -> None:
        if what != self.trouble:
            log.warning("%s; it goes on by itself when that is over", what)
        self.trouble = what

    def _on_error(self, error: KafkaError) -> None:
        self.has_trouble(f"group {self.group!r}: {error.str()}")
