"""`order_by`: what came too early waits at the server, behind an earlier message of its key that is away.

The place of a message is its number in its stream. What waits was sent back for a while, and is called before its time
by sending it back once more, at once. Where other processes take what this one waits for, their acks delete its note;
and when one does not come in time, nothing waits for it any more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from ..._decisions.away import Away
from ...errors import TransportError
from ...message import Message, Settlement
from .connection import Connection
from .consumers import Consumer
from .headers import place_of
from .notes import note_subject, numbers, read_notes
from .renewer import Token

log = logging.getLogger("sluiceway.nats")

PARKED = 30.0  # seconds after which what waits comes by itself
MOST = 10_000  # parked messages, beyond which only what comes back is asked for
LATE = 1.5  # seconds that what is due may take until its note is looked at


class Order:
    """What one source knows of its keys, in each stream. It asks the server nothing but what became of what does not
    come."""

    def __init__(self, connection: Connection, lease: float) -> None:
        self._connection = connection
        self._lease = lease
        self._consumers: Sequence[Consumer] = ()
        self._away: Away[Token] = Away()
        self._early: set[Token] = set()  # came too early: they wait for what is away, and not for what is in hand

    def sort(self, messages: list[Message[Any]]) -> tuple[list[Message[Any]], list[Settlement]]:
        """Those that may be handed out, in their order, and parks for those that came too early."""
        placed = sorted((place_of(message.token[0]), number) for number, message in enumerate(messages))
        out: list[Message[Any]] = []
        early: list[Settlement] = []
        for (stream, seq), number in placed:
            message = messages[number]
            if message.key is None or self._away.comes((stream, message.key), seq, message.token):
                out.append(message)
            else:
                self._early.add(message.token)
                early.append(Settlement(message, "park", counted=False))
        self._call()
        return out, early

    def expect(self, message: Message[Any], seconds: float) -> None:
        """It is not due yet, and is being sent back."""
        if message.key is not None:
            stream, seq = place_of(message.token[0])
            self._away.expect((stream, message.key), seq, time.monotonic() + seconds)

    def patience(self, token: Token) -> float:
        """Seconds for which to park a message: until what it waits for is due, and longer than we need to call it."""
        now = time.monotonic()
        return self._away.next_due(token, now + PARKED - 1.0) + 1.0 - now

    def goes(self, settlement: Settlement, delay: float) -> None:
        """It is about to be sent back."""
        token, due = settlement.message.token, time.monotonic() + delay
        if settlement.outcome == "park":
            self._away.parks(token, due, behind_held=token not in self._early)
        else:
            self._away.goes(token, due)
        self._early.discard(token)

    def ended(self, tokens: Sequence[Token]) -> None:
        """These are settled, and others may have been sent back: call what waited for them."""
        for token in tokens:
            self._away.ends(token)
        self._call()

    def lost(self, token: Token) -> None:
        self._away.goes(token, time.monotonic() + 1.0)

    def know(self, consumers: Sequence[Consumer]) -> None:
        """From now on these are the source's consumers. New ones hand all out again, in order."""
        before, self._consumers = self._consumers, consumers
        if {one.created for one in before} - {one.created for one in consumers}:
            self._away.clear()

    def demand(self, demand: int) -> int:
        """How many to ask for: where very many wait, only those that come back, which the server hands out first."""
        if self._away.parked < MOST:
            return demand
        return min(demand, self._away.coming(time.monotonic()))

    @property
    def known(self) -> int:
        """How many messages are away."""
        return self._away.parked + self._away.coming(math.inf)

    def _call(self) -> None:
        if not self._connection.up.is_set():
            return  # later: what is called now is not heard
        called = self._away.calls(time.monotonic())
        if called:
            self._connection.write(b"".join([b"PUB %b 4\r\n-NAK\r\n" % reply for reply, _ in called]))

    def release(self) -> None:
        """Call all that wait: this source ends."""
        tokens = self._away.all_parked()
        self._connection.write(b"".join([b"PUB %b 4\r\n-NAK\r\n" % reply for reply, _ in tokens]))
        self._away.clear()

    async def watch(self) -> None:
        """Look again and again, for as long as the source is open."""
        while True:
            await asyncio.sleep(LATE)
            try:
                await self._look()
            except TransportError as error:
                log.debug("looking at what does not come: %s", error)

    async def _look(self) -> None:
        """See what became of what does not come: without a note it is settled, and also where all up to it is, when an
        ack of ours arrived that we took for lost; and a lease later it is not waited for any more, whoever has it."""
        now = time.monotonic()
        late: list[Any] = self._away.overdue(now - LATE)
        if late:
            places = [
                (place, consumer)
                for place in late
                for consumer in self._consumers
                if consumer.stream == place[0][0] and consumer.floor < place[1]
            ]
            notes = await read_notes(
                self._connection, [note_subject(consumer.path, place[1]) for place, consumer in places]
            )
            noted = {place for (place, _), note in zip(places, notes, strict=True) if note is not None}
            over = set(self._away.overdue(now - max(self._lease, PARKED) - LATE))
            for lane, seq in {*late} - (noted - over):
                self._away.forgets(lane, seq)
        self._call()

    async def recall(self) -> int:
        """Read what is away from the notes that others left; returns how many notes there are."""
        count, now, wall = 0, time.monotonic(), time.time()
        for consumer in self._consumers:
            seqs = [seq for seq in await numbers(self._connection, consumer.path) if seq > consumer.floor]
            notes = await read_notes(self._connection, [note_subject(consumer.path, seq) for seq in seqs])
            count += len(seqs)
            for seq, note in zip(seqs, notes, strict=True):
                if note is not None and note.key is not None:
                    key = note.key.decode("utf-8", "surrogateescape")
                    self._away.expect((consumer.stream, key), seq, now + note.left(wall))
        return count
