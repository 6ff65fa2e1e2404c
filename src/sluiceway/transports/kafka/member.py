"""One member of a group: the thread that alone touches its consumer. It reads by demand, hands out, commits."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError

from ...errors import TransportError
from ...message import Message
from ...source import Start
from .books import Books
from .joining import Joining
from .partition import Partition
from .reading import Reader
from .requests import Ask, Settling, Token, answer, run_in
from .settings import Settings
from .topics import Topics
from .wire import Record

log = logging.getLogger("sluiceway.kafka")

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
        self.ended = False
        self.trouble: str | None = None
        self.sources: set[Any] = set()
        self._forward = forward
        self._loop = asyncio.get_running_loop()
        self._places: dict[str, Place] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._waiting_to_join: list[asyncio.Future[Any]] = []
        self._keep: frozenset[int] = frozenset()
        self.consumer = Consumer({**settings.consumer(group), "error_cb": self.has_news})
        self.books = Books(group, self.consumer, self.has_trouble, self._late)
        self._reader = Reader(self, self.consumer, self.books)
        self._joining = Joining(self)
        self._thread = threading.Thread(target=self._run, name=f"sluiceway-kafka {group}", daemon=True)
        self._thread.start()

    # -- for the event loop

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread, soon."""
        with self._wake:
            if self.ended:
                raise TransportError(f"the member of group {self.group!r} is closed")
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
                self.books.tells.append(answer(joined, None))
                return
            self._waiting_to_join.append(joined)
            self._subscribe()

        self.call(subscribe)
        await asyncio.wait([joined], timeout=10)

    async def detach(self, source: Any, keep: Iterable[int]) -> bool:
        """Take back what a source has in hand, but for `keep`. Returns whether anyone still needs the member."""
        kept = frozenset(keep)
        done: asyncio.Future[Any] = self._loop.create_future()

        def give_back() -> None:
            self.books.asks = [ask for ask in self.books.asks if ask.source is not source]
            for p in self.books.partitions.values():
                for offset, held in list(p.hand.items()):
                    if held.source is source and held.delivery not in kept:
                        p.end(Token(*p.scope, offset, held.delivery), True)
            self.books.tells.append(answer(done, None))

        self._keep |= kept
        self.sources.discard(source)
        try:
            self.call(give_back)
        except TransportError:
            return False
        await done
        return bool(self.sources or self._keep)

    def ask(self, ask: Ask) -> None:
        self.call(lambda: self.books.asks.append(ask))

    def give_up(self, ask: Ask) -> None:
        """It is not to be answered any more."""

        def forget() -> None:
            if ask in self.books.asks:
                self.books.asks.remove(ask)

        self.call(forget)

    def settle(self, settling: Settling) -> None:
        self.call(lambda: self.books.settle(settling))

    async def close(self) -> None:
        """Leave the group. What `detach` was told to keep counts as in the hand of a dead process. Idempotent."""
        with self._wake:
            self.ended = True
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
            with self._wake:
                self.ended = True
            self._leave()

    def _leave(self) -> None:
        try:
            self._do_calls()
            for p in self.books.partitions.values():
                p.leaving = True
                p.give_back(keep=self._keep)
            self.books.commit_all(list(self.books.partitions.values()))
            self.consumer.close()
        except Exception as error:  # it leaves in any case
            log.warning("leaving group %r: %s; its members get what was in hand", self.group, error)
        for p in list(self.books.partitions.values()):
            self.books.is_gone(p)
        self.books.partitions.clear()
        for ask in self.books.asks:
            self.books.tells.append(answer(ask.answer, []))
        self._tell()

    def _turn(self) -> None:
        self._do_calls()
        if self._places:
            self._reader.read()
            self._joining.look_around()
        else:
            self.sleep(1.0)
        books = self.books
        if time.monotonic() >= books.commit_again:
            books.hand_out()
            books.commit(books.dirty)
        self._tell()

    def settle_for(self, seconds: float) -> None:
        """Take what is settled meanwhile, inside a poll."""
        self._do_calls()
        self.books.commit(self.books.dirty)
        self._tell()
        self.sleep(seconds)

    def _do_calls(self) -> None:
        while self._calls:
            self._reader.be_quick()
            self._calls.popleft()()

    def is_called(self) -> bool:
        return bool(self._calls) or self.ended

    def sleep(self, seconds: float) -> None:
        with self._wake:
            if not self.is_called():
                self._wake.wait(max(0.0, seconds))

    def _subscribe(self) -> None:
        joining = self._joining
        self.consumer.subscribe(
            sorted(self._places),
            on_assign=joining.on_assign,
            on_revoke=joining.on_revoke,
            on_lost=joining.on_lost,
        )

    # -- what happens to it

    def _tell(self) -> None:
        if self.books.tells:
            tells, self.books.tells = self.books.tells, []
            run_in(self._loop, lambda: [tell() for tell in tells])

    def place(self, name: str) -> Place:
        return self._places[name]

    def was_given(self, partitions: int) -> None:
        log.debug("group %r was given %d partitions", self.group, partitions)
        self.trouble = None
        waiting, self._waiting_to_join = self._waiting_to_join, []
        for joined in waiting:
            self.books.tells.append(answer(joined, None))

    def tell_revoked(self, partitions: Sequence[Partition], seconds: float | None) -> None:
        scopes = frozenset(p.scope for p in partitions)
        if scopes:
            for source in list(self.sources):
                run_in(self._loop, lambda source=source: source.revoked(scopes, seconds))

    def has_trouble(self, what: str) -> None:
        if what != self.trouble:
            log.warning("%s; it goes on by itself when that is over", what)
        self.trouble = what

    def has_news(self, error: KafkaError | None) -> None:
        """Of the client: an error, or that records come."""
        if error is not None:
            self.has_trouble(f"group {self.group!r}: {error.str()}")
        else:
            self.trouble = None

    def begin_anew(self, p: Partition) -> None:
        self._joining.begin_anew(p)

    def forward(self, p: Partition, record: Record) -> None:
        """In the event loop, what is not due moves to the retries."""
        self.books.tells.append(lambda: self._forward(self, p, record))

    def _late(self, messages: list[Message[Any]]) -> None:
        """In the event loop: nobody waits for these any more."""
        if not self.ended:
            self.settle(Settling([(message.token, True) for message in messages]))
