"""What a source has in hand, and how it ends: acks, naks, outputs, and the notes that explain the next hand-over."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ..._decisions.suspicion import suspicions_now
from ...errors import PayloadTooLarge, TransportError
from ...message import Message, Refused, Settlement
from .answers import Unanswered, status
from .connection import Connection, Request
from .consumers import Consumer, Consumers
from .headers import Delivery, Note, path_of, read_delivery
from .notes import note_subject
from .order import Order
from .publishing import Publisher
from .renewer import Leases, Token
from .streams import NOTES

log = logging.getLogger("sluiceway.nats")

SOON = 5.0  # seconds to wait for a connection before a call gives up


class Hand:
    """What one source holds: received, and not settled. `noted`: those of it that have a note. `delayed`: how many went
    back for a while since the consumers were last looked at. `on_gone` is called when acks find no consumer."""

    def __init__(
        self, connection: Connection, publisher: Publisher, leases: Leases, on_gone: Callable[[], None]
    ) -> None:
        self.leases = leases
        self.held: dict[Token, Message[Any]] = {}
        self.noted: set[Token] = set()
        self.delayed = 0
        self.order: Order | None = None
        self.consumers: Sequence[Consumer] = ()
        self._connection = connection
        self._publisher = publisher
        self._made = Consumers(connection)
        self._on_gone = on_gone

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries. When it returns, the server has them: the last ack of a consumer is confirmed, and with it
        those before. Raises TransportError when the connection broke; the same may be settled again then.
        """
        if not acks and not others:
            return ()
        await self._connection.ready(SOON)
        refused: list[Refused] = []
        ended = [message.token for message in self._ours(acks, refused)]
        naks: list[tuple[Token, bytes]] = []
        if others:
            kept = {id(one) for one in self._ours([other.message for other in others], refused)}
            others = [other for other in others if id(other.message) in kept]
            others = await self._publish_outputs(others, refused)
            ended += [one.message.token for one in others if one.outcome in ("ack", "dead_letter")]
            back = [one for one in others if one.outcome not in ("ack", "dead_letter")]
            naks = await self._write_notes(back, refused)
        gone = await self._end(ended, naks)
        if gone:
            messages = [*acks, *[other.message for other in others]]
            messages = [message for message in messages if path_of(message.token[0]) in gone]
            refused += [Refused(message, "lost", "its consumer was deleted") for message in messages]
        return refused

    def _ours(self, messages: Sequence[Message[Any]], refused: list[Refused]) -> list[Message[Any]]:
        held, fresh = self.held, self.leases.fresh()
        lost = [
            one for one in messages if one.token not in held or (one.token[1] < fresh and self.leases.lost(one.token))
        ]
        if not lost:
            return list(messages)
        for message in lost:
            self.lose(message.token)
            refused.append(Refused(message, "lost", "its lease is over"))
        return [message for message in messages if message not in lost]

    async def _publish_outputs(self, others: Sequence[Settlement], refused: list[Refused]) -> list[Settlement]:
        """Those whose outputs the streams have confirmed."""
        requests: list[Request] = []
        spans: list[tuple[Settlement, int, int]] = []
        for other in others:
            first = len(requests)
            try:
                requests += self._publisher.requests(other.outputs, other.message.token[0].decode())
                spans.append((other, first, len(requests)))
            except PayloadTooLarge as error:
                refused.append(Refused(other.message, "rejected", str(error)))
        why = await self._publisher.send(requests) if requests else []
        done = []
        for other, first, last in spans:
            text = next(filter(None, why[first:last]), None)
            if text is None:
                done.append(other)
            else:
                refused.append(Refused(other.message, "rejected", text))
        return done

    async def _write_notes(self, back: Sequence[Settlement], refused: list[Refused]) -> list[tuple[Token, bytes]]:
        """Write down what explains the next hand-over; returns the naks."""
        now = time.time()
        naks: list[tuple[int, Token, bytes]] = []
        notes: list[Request] = []
        for one in back:
            message, delivery = one.message, read_delivery(one.message.token[0])
            delay = one.delay
            if one.outcome == "park" and self.order is not None and message.key is not None:
                delay = self.order.patience(message.token)
            elif delay > 0 and one.outcome == "retry":
                consumer = next((other for other in self.consumers if other.name == delivery.consumer), None)
                limit = self._connection.settings.max_delayed
                if consumer is not None and consumer.held + self.delayed >= limit:
                    text = f"{limit} messages of {consumer.name!r} are held or delayed already (max_delayed)"
                    refused.append(Refused(message, "rejected", text))
                    continue
                self.delayed += 1
            if one.outcome == "retry":
                failures, suspicions = message.failures + one.counted, 0
                released = delivery.count - failures
            else:
                failures, suspicions = message.failures, message.suspicions
                released = delivery.count - message.deliveries + 1
            note = Note(failures, suspicions, released)
            if delay > 0 and one.outcome != "park":
                note.due, note.delay = now + delay, delay
            notes.append(self._note(message, delivery, note))
            body = b'-NAK {"delay": %d}' % int(delay * 1e9) if delay > 0 else b"-NAK"
            naks.append((delivery.seq, message.token, body))
            if self.order is not None:
                self.order.goes(one, delay)
        await self._confirm_notes(notes)
        return [(token, body) for _, token, body in sorted(naks)]  # they come again in the order of the naks

    def _note(self, message: Message[Any], delivery: Delivery, note: Note) -> Request:
        if self.order is not None and message.key is not None:
            note.key = message.key.encode("utf-8", "surrogateescape")
        return (_note_subject(delivery), b"", msgspec.json.encode(note))

    async def _confirm_notes(self, notes: Sequence[Request]) -> None:
        if notes:
            why = next(filter(None, await self._publisher.send(notes)), None)
            if why is not None:
                raise TransportError(f"cannot write notes of what goes back: {why}")

    async def _end(self, ended: Sequence[Token], naks: Sequence[tuple[Token, bytes]]) -> set[bytes]:
        """Ack and nak; returns the paths of consumers that are gone."""
        last: dict[bytes, bytes] = {}
        if len(self.consumers) == 1 and ended:
            last[b""] = ended[-1][0]
        else:
            for reply, _ in ended:
                last[path_of(reply)] = reply
        confirmed = set(last.values())
        before = b"".join([b"PUB %b 0\r\n\r\n" % reply for reply, _ in ended if reply not in confirmed])
        requests = [(reply.decode(), b"", b"+ACK") for reply in confirmed]
        requests += [(token[0].decode(), b"", body) for token, body in naks]
        answers = await self._connection.ask(requests, before=before)
        unheard = [request[0].encode() for request, answer in zip(requests, answers, strict=True) if status(answer)]
        gone = await self._look_for({path_of(reply): reply for reply in unheard})
        held = self.held
        for token in ended:
            held.pop(token, None)
        if self.noted:
            await self._drop_notes([token for token in ended if token in self.noted])
        for token, _ in naks:
            self.forget(token)
        if self.order is not None:
            self.order.ended(ended)
        return gone

    async def _look_for(self, unheard: Mapping[bytes, bytes]) -> set[bytes]:
        """Which of the paths where nobody took an ack lead to a consumer that was deleted. Raises TransportError when
        one is there, or the server does not say: it goes, comes, or has another leader."""
        gone: set[bytes] = set()
        for path, reply in unheard.items():
            delivery = read_delivery(reply)
            if await self._made.find(delivery.stream, delivery.consumer) is not None:
                raise TransportError(f"NATS takes no acks for {delivery.consumer!r} just now")
            gone.add(path)
        if gone:
            self._on_gone()
        return gone

    async def _drop_notes(self, tokens: Sequence[Token]) -> None:
        requests = []
        for token in tokens:
            self.noted.discard(token)
            body = json.dumps({"filter": _note_subject(read_delivery(token[0]))}).encode()
            requests.append((f"$JS.API.STREAM.PURGE.{NOTES}", b"", body))
        try:
            await self._connection.ask(requests)
        except Unanswered as error:
            log.debug("%d notes stay for now: %s", len(tokens), error)

    def lose(self, token: Token) -> None:
        """Its lease is over: it comes again, to us or to others."""
        self.forget(token)
        if self.order is not None:
            self.order.lost(token)

    def forget(self, token: Token) -> None:
        self.held.pop(token, None)
        self.noted.discard(token)

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected. False: its lease is over. Raises TransportError."""
        if not self._ours([message], []):
            return False
        suspicions = suspicions_now(message.deliveries, message.failures, message.suspicions)
        delivery = read_delivery(message.token[0])
        deliveries = 1 + message.failures + suspicions
        note = Note(message.failures, suspicions, delivery.count - deliveries)
        await self._confirm_notes([self._note(message, delivery, note)])
        self.noted.add(message.token)
        message.suspicions, message.deliveries, message.suspect = suspicions, deliveries, False
        return True


def _note_subject(delivery: Delivery) -> str:
    return note_subject(f"{delivery.stream}.{delivery.consumer}", delivery.seq)
