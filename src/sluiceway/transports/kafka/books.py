"""The books of a member: who asks, what is handed out, what is settled, and what is committed of that."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from ..._decisions.backoff import reconnect_delay
from ...message import Message
from .partition import Partition
from .requests import Ask, Settling, answer


class Books:
    """Of the member's thread alone. `tells` are calls that its event loop is to make."""

    def __init__(
        self,
        group: str,
        consumer: Consumer,
        has_trouble: Callable[[str], None],
        late: Callable[[list[Message[Any]]], None],
    ) -> None:
        self.partitions: dict[tuple[str, int], Partition] = {}
        self.asks: list[Ask] = []
        self.tells: list[Callable[[], None]] = []
        self.commit_again = 0.0
        self._group = group
        self._consumer = consumer
        self._has_trouble = has_trouble
        self._late = late
        self._handed: list[tuple[Ask, list[Message[Any]]]] = []
        self._deliveries = count(1)
        self._tries = 0

    @property
    def dirty(self) -> list[Partition]:
        """The partitions of which there is something to commit."""
        return [p for p in self.partitions.values() if p.dirty]

    @property
    def in_hand(self) -> bool:
        return any(p.hand for p in self.partitions.values())

    def hand_out(self) -> None:
        now = time.time()
        for ask in list(self.asks):
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
                self.asks.remove(ask)
                self._handed.append((ask, messages))

    def settle(self, settling: Settling) -> None:
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
            self.tells.append(answer(settling.done, settling.lost))

    def commit_all(self, partitions: Sequence[Partition]) -> None:
        """Commit what these tell now, or say why that cannot be."""
        self.commit_again = 0.0
        for _ in range(3):
            self.commit(partitions)
            if not any(p.dirty for p in partitions):
                return
            time.sleep(0.05)

    def commit(self, partitions: Sequence[Partition]) -> None:
        news = [(p, p.commit()) for p in partitions]
        asked = [TopicPartition(p.name, p.number, w.offset, metadata=w.metadata) for p, w in news if w is not None]
        failed: set[tuple[str, int]] = set()
        if asked:
            try:
                for one in self._consumer.commit(offsets=asked, asynchronous=False) or ():
                    if one.error is not None:
                        failed.add((one.topic, one.partition))
                        self._has_trouble(f"committing {one.topic}: {one.error.str()}")
            except KafkaException as error:
                failed = {(one.topic, one.partition) for one in asked}
                self._has_trouble(f"committing offsets of group {self._group!r}: {error.args[0].str()}")
        self._tries = self._tries + 1 if failed else 0
        self.commit_again = time.monotonic() + reconnect_delay(self._tries, random.random(), cap=1.0) if failed else 0.0
        for p, what in news:
            if (p.name, p.number) not in failed:
                p.is_committed(what)
                self._settled(p)
        self._deliver(failed)

    def _settled(self, p: Partition) -> None:
        for settling in p.waiters:
            settling.waits -= 1
            if not settling.waits:
                self.tells.append(answer(settling.done, settling.lost))
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
                self.tells.append(lambda ask=ask, given=given: self._answer(ask, given))  # type: ignore[misc]
            else:
                self.asks.append(ask)

    def _answer(self, ask: Ask, messages: list[Message[Any]]) -> None:
        """In the event loop: one that gave up meanwhile has none of it."""
        if not ask.answer.done():
            ask.answer.set_result(messages)
        else:
            self._late(messages)

    def is_gone(self, p: Partition) -> None:
        """Whoever waits for a commit of it hears that it is lost."""
        for settling in p.waiters:
            settling.lost += [t for t, _ in settling.ends if t[:3] == p.scope and t.delivery in p.unconfirmed]
        self._settled(p)
