"""Reading: messages of the frames that came, without those that are not for this source, or not yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..._decisions.suspicion import is_suspect
from ...message import Message, Settlement
from .connection import Connection
from .consumers import Consumer, belongs
from .hand import Hand
from .headers import Delivery, left, read_delivery, read_headers
from .notes import note_subject, read_notes
from .renewer import Token
from .streams import topic_of
from .wire import Frame


class Reader:
    """Makes the messages of one source, and puts them in its hand."""

    def __init__(self, connection: Connection, group: str, hand: Hand) -> None:
        self._connection = connection
        self._group = group
        self._hand = hand
        self._by_path: dict[str, Consumer] = {}
        self._siblings: dict[str, dict[str, Consumer]] = {}
        self._noted_to = 0  # up to here messages may have a note though they come for the first time
        self._plain = b""  # how the ack subject of a first delivery begins, where nothing else has to be looked at
        self._topics: dict[bytes, str] = {}

    def know(self, consumers: Sequence[Consumer], siblings: dict[str, dict[str, Consumer]]) -> None:
        """From now on these are the source's consumers. `siblings`: where it has patterns, all of the group's, by
        stream."""
        self._siblings = siblings
        self._by_path = {consumer.path: consumer for consumer in consumers}
        self._noted_to = max([consumer.noted for consumer in consumers], default=0)
        simple = len(consumers) == 1 and not (siblings or consumers[0].since or self._noted_to)
        self._plain = f"$JS.ACK.{consumers[0].path}.1.".encode() if simple else b"\0"

    async def read(self, arrived: Sequence[tuple[float, list[Frame]]]) -> list[Message[Any]]:
        """Messages of what came. What is not for us or not due is settled here. When that raises, the same may be read
        again."""
        messages: list[Message[Any]] = []
        again: list[tuple[Message[Any], Delivery, float]] = []  # with the seconds that it must wait
        skipped: list[Token] = []
        group, held, now = self._group, self._hand.held, time.time()
        fresh = self._hand.leases.fresh()
        for came, frames in arrived:
            if came < fresh:
                continue  # nobody asked for so long that others have them
            for subject, reply, block, body in frames:
                envelope, due, delay, stranger = read_headers(block)
                topic = self._topics.get(subject) or self._name(subject)
                token = (reply, came)
                if reply.startswith(self._plain) and envelope.id and envelope.timestamp is not None and due <= now:
                    delivery, name, timestamp = None, envelope.id, envelope.timestamp
                else:
                    delivery = read_delivery(reply)
                    name = envelope.id or stranger or f"{delivery.stream}-{delivery.seq}"
                    timestamp = delivery.stored if envelope.timestamp is None else envelope.timestamp
                if (envelope.group is not None and envelope.group != group) or (
                    delivery is not None and not self._wants(topic, timestamp, delivery)
                ):
                    skipped.append(token)
                    continue
                message: Message[Any] = Message(
                    topic, body, name, envelope.key, envelope.headers, timestamp, None, token, 1, envelope.failures,
                    envelope.suspicions, error=envelope.error,
                )  # fmt: skip
                held[token] = message
                messages.append(message)
                if delivery is not None and (delivery.count > 1 or due > now or delivery.seq <= self._noted_to):
                    again.append((message, delivery, left(due, delay, now)))
        if skipped:
            await self._connection.ask([(reply.decode(), b"", b"+ACK") for reply, _ in skipped])
        if again:
            late = await self._look_up(again)
            messages = [message for message in messages if message not in late]
        if self._hand.order is not None:
            messages, early = self._hand.order.sort(messages)
            await self._hand.settle((), early)
        return messages

    def _name(self, subject: bytes) -> str:
        if len(self._topics) >= 10_000:
            self._topics.clear()
        topic = self._topics[subject] = topic_of(subject.decode())
        return topic

    def _wants(self, topic: str, timestamp: float, delivery: Delivery) -> bool:
        consumer = self._by_path.get(f"{delivery.stream}.{delivery.consumer}")
        if consumer is None or timestamp < consumer.since:
            return consumer is None
        siblings = self._siblings.get(consumer.stream)
        return siblings is None or belongs(consumer, siblings, topic, delivery.seq, delivery.stored)

    async def _look_up(self, again: Sequence[tuple[Message[Any], Delivery, float]]) -> set[Message[Any]]:
        """Read the notes of what came again, and hand back what is not due; returns those."""
        late: list[Settlement] = []
        now = time.time()
        order = self._hand.order
        subjects = [note_subject(f"{one.stream}.{one.consumer}", one.seq) for _, one, _ in again]
        notes = await read_notes(self._connection, subjects)
        for (message, delivery, wait), note in zip(again, notes, strict=True):
            if note is not None:
                self._hand.noted.add(message.token)
                message.failures, message.suspicions = note.failures, note.suspicions
                if note.due:
                    wait = note.left(now)
            message.deliveries = max(1, delivery.count - (note.released if note is not None else 0))
            message.suspect = is_suspect(message.deliveries, message.failures, message.suspicions)
            if wait > 0:
                if order is not None and note is not None:
                    order.expect(message, wait)
                late.append(Settlement(message, "release", delay=wait))
        await self._hand.settle((), late)
        return {one.message for one in late}
