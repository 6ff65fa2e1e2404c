"""The source: one subscription, over a consumer per topic and stream."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, Literal

import msgspec

from ..._decisions.backoff import reconnect_delay
from ..._decisions.suspicion import is_suspect, suspicions_now
from ..._decisions.topics import is_pattern
from ...errors import PayloadTooLarge, TransportError
from ...message import Message, Refused, Settlement
from ...source import Backlog, Renewer, SourceStatus, Start, Subscription
from .connection import ApiError, Connection, Request, Unanswered, read_answer, status
from .headers import Delivery, Note, read_delivery, read_headers
from .publishing import Publisher
from .pulls import Pulls
from .renewer import Leases, NATSRenewer, Token, share
from .streams import NOTE, NOTES, Consumer, Streams, belongs, topic_of
from .wire import Frame

log = logging.getLogger("sluiceway.nats")

POLL = 5.0  # seconds between looks at the consumers; what a deleted one repeats was acked since the last look
SOON = 5.0  # seconds to wait for a connection before a call gives up

_numbers = count(1)


class NATSSource:
    """One subscription. A delivery is ours for the lease, from when it came or was renewed; after that its settle is
    refused as lost, and is not sent."""

    returns_failed = True  # what a newer version sent

    def __init__(
        self, connection: Connection, streams: Streams, publisher: Publisher, subscription: Subscription
    ) -> None:
        self.closed = False
        self.subscription = subscription
        self._connection = connection
        self._streams = streams
        self._publisher = publisher
        self._consumers: list[Consumer] = []
        self._by_path: dict[str, Consumer] = {}
        self._noted_to = 0  # up to here messages may have a note though they come for the first time
        self._plain = b""  # how the ack subject of a first delivery begins, where nothing else has to be looked at
        self._topics: dict[bytes, str] = {}
        self._siblings: dict[str, dict[str, Consumer]] = {}  # by stream
        self._patterns = any(map(is_pattern, subscription.topics))
        self._start: Start = subscription.start
        self._window = subscription.window
        self._stopped = False
        self._since = time.time()
        self._trouble: str | None = None
        self._held: dict[Token, Message[Any]] = {}
        self._noted: set[Token] = set()  # of those, the ones that have a note
        self._left: list[Message[Any]] = []  # came, and no receive has returned them yet
        self._delayed = 0  # handed back for a while, since the last look
        self._pulls = Pulls(connection, next(_numbers))
        self._pulls.stopped = lambda: self._stopped or not self._window or not connection.up.is_set()
        self._poller: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Make the consumers. Once, before anything else."""
        await self.resume(first=True)
        lease = min([consumer.lease for consumer in self._consumers], default=self._connection.settings.lease)
        self.lease: float | None = lease
        self._leases = Leases(lease)
        share(self._leases)
        self.renewer: Callable[[], Renewer] | None = partial(
            NATSRenewer, self._connection.settings, lease, self._leases.id
        )
        self._connection.listeners.add(self._on_change)
        self._poller = asyncio.create_task(self._poll())

    async def resume(self, *, first: bool = False) -> None:
        """Look where the topics are, and make the consumers that are missing; one that was seen before goes on behind
        the last message up to which all were settled then."""
        floors = {consumer.path: consumer.floor + 1 for consumer in self._consumers}
        found: list[Consumer] = []
        group = self.subscription.group
        for topic in dict.fromkeys(self.subscription.topics):
            for stream, subject in await self._streams.places(topic, create=True):
                start: Start | int = self._start if first else "earliest"
                for old in self._consumers:
                    if (old.stream, old.topic) == (stream, topic):
                        start = floors[old.path]
                consumer, findings = await self._streams.consume(stream, subject, group, topic, start)
                for finding in findings:
                    log.log(logging.DEBUG if first else logging.WARNING, "group %r: %s", group, finding.text)
                found.append(consumer)
        if self._patterns:
            streams = {consumer.stream for consumer in found}
            self._siblings = {stream: await self._streams.siblings(stream, group) for stream in streams}
        self._consumers = found
        self._by_path = {consumer.path: consumer for consumer in found}
        self._noted_to = max([consumer.noted for consumer in found], default=0)
        simple = len(found) == 1 and not (self._patterns or found[0].since or self._noted_to)
        self._plain = f"$JS.ACK.{found[0].path}.1.".encode() if simple else b"\0"
        self._pulls.trouble.clear()

    async def _poll(self) -> None:
        """Look at the consumers now and then: how far they are, and for patterns, who else is there."""
        seen, rounds = object(), 0
        while True:
            await asyncio.sleep(POLL)
            rounds += 1
            heard = (len(self._held), self._pulls.reads)
            try:
                if self._patterns and rounds % 6 == 0:
                    await self.resume()
                elif heard != seen:
                    await self._look()
                seen = heard
            except TransportError as error:
                log.debug("looking at the consumers of %s: %s", self.subscription.topics, error)
            for token in [token for token in self._held if self._leases.lost(token)]:
                self._forget(token)

    async def _look(self) -> list[Consumer]:
        for index, consumer in enumerate(self._consumers):
            info = await self._connection.api(f"CONSUMER.INFO.{consumer.path}")
            for name, value in (
                ("floor", info["ack_floor"]["stream_seq"]), ("last", info["delivered"]["stream_seq"]),
                ("pending", info["num_pending"]), ("held", info["num_ack_pending"]),
            ):  # fmt: skip
                setattr(self._consumers[index], name, value)
        self._delayed = 0
        return self._consumers

    # -- receiving

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or while the window is 0."""
        tries = 0
        while not self._left:
            demand = min(demand, self._window)
            if self._stopped or demand <= 0:
                break
            try:
                await self._bring(demand)
                if self._trouble is not None:
                    self._trouble, self._since = None, time.time()
                tries = 0
            except TransportError as error:
                delay = reconnect_delay(tries, random.random())
                tries += 1
                self._trouble, self._since = str(error), time.time()
                log.warning("receiving %s: %s; trying again in %.2f s", self.subscription.topics, error, delay)
                await asyncio.sleep(delay)
        if not self._window and not self._stopped and self._left:
            left, self._left = self._left, []
            await self._insist_release(left)
        return self._portion(demand)

    async def _bring(self, demand: int) -> None:
        """Pull once, and put what came in `_left`."""
        if not self._connection.up.is_set():
            await self._pulls.changed()
            return
        if self._pulls.trouble:
            log.warning("a consumer of %s is gone: %s; making it anew", self.subscription.topics, self._pulls.trouble)
            self._streams.forget()
            await self.resume()
        if not self._pulls.arrived:
            await self._pulls.pull(self._consumers, demand, self._max_bytes)
        arrived = self._pulls.arrived
        messages = await self._make(arrived)
        self._pulls.arrived = self._pulls.arrived[len(arrived) :] if self._pulls.arrived is not arrived else []
        self._left += messages

    @property
    def _max_bytes(self) -> int:
        return max(self.subscription.max_bytes, 2 * self._connection.max_payload)

    def _portion(self, demand: int) -> list[Message[Any]]:
        size = taken = 0
        for message in self._left[:demand]:
            size += len(message.body)
            taken += 1
            if size >= self.subscription.max_bytes:
                break
        if taken > 1 and size > self.subscription.max_bytes:
            taken -= 1
        messages, self._left = self._left[:taken], self._left[taken:]
        return messages

    async def _make(self, arrived: Sequence[tuple[float, list[Frame]]]) -> list[Message[Any]]:
        """Messages of what came, without what is not for us or not due; those are settled here."""
        messages: list[Message[Any]] = []
        again: list[tuple[Message[Any], Delivery, float]] = []
        skipped: list[Token] = []
        group, held, now = self.subscription.group, self._held, time.time()
        for came, frames in arrived:
            for subject, reply, block, body in frames:
                envelope, due, stranger = read_headers(block)
                topic = self._topics.get(subject) or self._name(subject)
                token = (reply, came)
                if reply.startswith(self._plain) and envelope.id and envelope.timestamp is not None and due <= now:
                    delivery, id, timestamp = None, envelope.id, envelope.timestamp
                else:
                    delivery = read_delivery(reply)
                    id = envelope.id or stranger or f"{delivery.stream}-{delivery.seq}"
                    timestamp = delivery.stored if envelope.timestamp is None else envelope.timestamp
                if (envelope.group is not None and envelope.group != group) or (
                    delivery is not None and not self._wants(topic, timestamp, delivery)
                ):
                    skipped.append(token)
                    continue
                message: Message[Any] = Message(
                    topic, body, id, envelope.key, envelope.headers, timestamp, None, token, 1, envelope.failures,
                    envelope.suspicions, error=envelope.error,
                )  # fmt: skip
                held[token] = message
                messages.append(message)
                if delivery is not None and (delivery.count > 1 or due > now or delivery.seq <= self._noted_to):
                    again.append((message, delivery, due))
        if skipped:
            await self._connection.ask([(reply.decode(), b"", b"+ACK") for reply, _ in skipped])
        if again:
            late = await self._look_up(again)
            messages = [message for message in messages if message not in late]
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
        notes = await self._read_notes([delivery for _, delivery, _ in again])
        for (message, delivery, due), note in zip(again, notes, strict=True):
            if note is not None:
                self._noted.add(message.token)
                message.failures, message.suspicions = note.failures, note.suspicions
                due = note.due or due
            message.deliveries = max(1, delivery.count - (note.released if note is not None else 0))
            message.suspect = is_suspect(message.deliveries, message.failures, message.suspicions)
            if due > now:
                late.append(Settlement(message, "release", delay=due - now))
        if late:
            await self.settle((), late)
        return {one.message for one in late}

    async def _read_notes(self, deliveries: Sequence[Delivery]) -> list[Note | None]:
        body = [json.dumps({"last_by_subj": _note_subject(one)}).encode() for one in deliveries]
        answers = await self._connection.ask([(f"$JS.API.STREAM.MSG.GET.{NOTES}", b"", one) for one in body])
        return [_read_note(answer) for answer in answers]

    def resize(self, window: int) -> None:
        """Change the window. 0 pauses: a waiting `receive` returns nothing."""
        if (window == 0) != (self._window == 0):
            self._since = time.time()
        self._window = window
        self._pulls.wake()

    def stop(self) -> None:
        """Receive nothing more: a waiting `receive` returns what has arrived, perhaps nothing. Idempotent."""
        if not self._stopped:
            self._stopped, self._since = True, time.time()
            self._pulls.wake()

    def _on_change(self) -> None:
        self._since = time.time()
        self._pulls.wake()

    # -- settling

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries. When it returns, the server has them: the last ack of a consumer is confirmed, and with it
        those before. Raises TransportError when the connection broke; the same may be settled again then.
        """
        if not acks and not others:
            return ()
        await self._connection.ready(SOON)
        refused: list[Refused] = []
        ended = [message.token for message in self._ours(acks, refused)]
        lines: list[Request] = []
        if others:
            kept = {id(one) for one in self._ours([other.message for other in others], refused)}
            others = [other for other in others if id(other.message) in kept]
            others = await self._publish_outputs(others, refused)
            ended += [one.message.token for one in others if one.outcome in ("ack", "dead_letter")]
            back = [one for one in others if one.outcome not in ("ack", "dead_letter")]
            lines = await self._write_notes(back, refused)
        lost = await self._end(ended, lines)
        for message in [*acks, *[other.message for other in others]]:
            if message.token[0] in lost:
                refused.append(Refused(message, "lost", "its consumer was deleted"))
        return refused

    def _ours(self, messages: Sequence[Message[Any]], refused: list[Refused]) -> list[Message[Any]]:
        held, fresh = self._held, self._leases.fresh()
        lost = [
            one
            for one in messages
            if one.token not in held or (one.token[1] < fresh and self._leases.lost(one.token))
        ]
        if not lost:
            return list(messages)
        for message in lost:
            self._forget(message.token)
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

    async def _write_notes(self, back: Sequence[Settlement], refused: list[Refused]) -> list[Request]:
        """Write down what explains the next hand-over; returns the naks."""
        now = time.time()
        naks: list[tuple[int, Request]] = []
        notes: list[Request] = []
        for one in back:
            message, delivery = one.message, read_delivery(one.message.token[0])
            if one.delay > 0:
                consumer = next((other for other in self._consumers if other.name == delivery.consumer), None)
                limit = self._connection.settings.max_delayed
                if consumer is not None and consumer.held + self._delayed >= limit:
                    text = f"{limit} messages of {consumer.name!r} are held or delayed already (max_delayed)"
                    refused.append(Refused(message, "rejected", text))
                    continue
                self._delayed += 1
            if one.outcome == "retry":
                failures, suspicions = message.failures + one.counted, 0
                released = delivery.count - failures
            else:
                failures, suspicions = message.failures, message.suspicions
                released = delivery.count - message.deliveries + 1
            due = now + one.delay if one.delay > 0 else 0.0
            notes.append(self._note(delivery, Note(failures, suspicions, released, due)))
            body = b'-NAK {"delay": %d}' % int(one.delay * 1e9) if one.delay > 0 else b"-NAK"
            naks.append((delivery.seq, (message.token[0].decode(), b"", body)))
        await self._confirm_notes(notes)
        return [nak for _, nak in sorted(naks, key=lambda one: one[0])]  # they come again in the order of the naks

    def _note(self, delivery: Delivery, note: Note) -> Request:
        return (_note_subject(delivery), b"", msgspec.json.encode(note))

    async def _confirm_notes(self, notes: Sequence[Request]) -> None:
        if notes:
            why = next(filter(None, await self._publisher.send(notes)), None)
            if why is not None:
                raise TransportError(f"cannot write notes of what goes back: {why}")

    async def _end(self, ended: Sequence[Token], naks: Sequence[Request]) -> set[bytes]:
        """Ack and nak; returns those whose consumer is gone."""
        last: dict[bytes, bytes] = {}
        if len(self._consumers) == 1 and ended:
            last[b""] = ended[-1][0]
        else:
            for reply, _ in ended:
                last[reply.rsplit(b".", 5)[0]] = reply
        confirmed = set(last.values())
        before = b"".join([b"PUB %b 0\r\n\r\n" % reply for reply, _ in ended if reply not in confirmed])
        requests = [*[(reply.decode(), b"", b"+ACK") for reply in confirmed], *naks]
        answers = await self._connection.ask(requests, before=before)
        gone = {request[0].encode() for request, answer in zip(requests, answers, strict=True) if status(answer) == 503}
        if gone:
            paths = {reply.rsplit(b".", 5)[0] for reply in gone}
            gone |= {reply for reply, _ in ended if reply.rsplit(b".", 5)[0] in paths}
        held = self._held
        for token in ended:
            held.pop(token, None)
        if self._noted:
            await self._drop_notes([token for token in ended if token in self._noted])
        for reply in {request[0].encode() for request in naks}:
            for token in [token for token in held if token[0] == reply]:
                self._forget(token)
        return gone

    async def _drop_notes(self, tokens: Sequence[Token]) -> None:
        requests = []
        for token in tokens:
            self._noted.discard(token)
            body = json.dumps({"filter": _note_subject(read_delivery(token[0]))}).encode()
            requests.append((f"$JS.API.STREAM.PURGE.{NOTES}", b"", body))
        try:
            await self._connection.ask(requests)
        except Unanswered as error:
            log.debug("%d notes stay for now: %s", len(tokens), error)

    def _forget(self, token: Token) -> None:
        self._held.pop(token, None)
        self._noted.discard(token)

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected. False: its lease is over. Raises TransportError."""
        if not self._ours([message], []):
            return False
        suspicions = suspicions_now(message.deliveries, message.failures, message.suspicions)
        delivery = read_delivery(message.token[0])
        deliveries = 1 + message.failures + suspicions
        note = Note(message.failures, suspicions, delivery.count - deliveries)
        await self._confirm_notes([self._note(delivery, note)])
        self._noted.add(message.token)
        message.suspicions, message.deliveries, message.suspect = suspicions, deliveries, False
        return True

    async def flush(self) -> None:
        """Return when every earlier settle has reached the broker: each has when it returned."""

    # -- looking

    def status(self) -> SourceStatus:
        """How the source is. `held_by_broker`: received and not settled, as far as this process has heard."""
        error = self._connection.error if not self._connection.up.is_set() else self._trouble
        return SourceStatus(state=self._state(), since=self._since, error=error, held_by_broker=len(self._held))

    def _state(self) -> Literal["connecting", "running", "paused", "blocked", "stopped"]:
        if self._stopped:
            return "stopped"
        if not self._connection.up.is_set():
            return "connecting"
        if self._trouble is not None:
            return "blocked"
        return "running" if self._window else "paused"

    async def backlog(self) -> Backlog | None:
        """Messages that wait for this group, also for their delay, and the age of the oldest that was never handed
        out. What other processes have in hand counts as waiting: the server does not tell the two apart."""
        held = len(self._held)
        messages, oldest = -held, 0.0
        for consumer in await self._look():
            messages += consumer.pending + consumer.held
            if consumer.pending:
                for subject in self._streams.subjects(consumer):
                    body = {"seq": consumer.last + 1, "next_by_subj": subject}
                    try:
                        stored = (await self._connection.api(f"STREAM.MSG.GET.{consumer.stream}", body))["message"]
                    except ApiError:
                        continue
                    read = read_headers(base64.b64decode(stored.get("hdrs") or ""))
                    age = time.time() - (read.envelope.timestamp or _stored_at(stored["time"]))
                    oldest = max(oldest, age)
        return Backlog(max(0, messages), oldest)

    # -- the end

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give everything back that is not settled, uncounted, but for `keep`. Idempotent."""
        if self.closed:
            return
        self.stop()
        self.closed = True
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller])
        await self._pulls.cancel()
        self._connection.listeners.discard(self._on_change)
        try:
            if self._pulls.arrived:
                await self._make(self._pulls.arrived)
            kept = {message.token for message in keep}
            await self._release([message for token, message in self._held.items() if token not in kept])
        except TransportError as error:
            log.warning(
                "closing the source of %s: %s; the %d messages that it holds come back when their leases end",
                self.subscription.topics, error, len(self._held),
            )  # fmt: skip
        self._held.clear()

    async def _insist_release(self, messages: list[Message[Any]]) -> None:
        try:
            await self._release(messages)
        except TransportError as error:
            self._left = [*messages, *self._left]
            log.warning("handing %d messages back: %s; trying again at the next receive", len(messages), error)

    async def _release(self, messages: Sequence[Message[Any]]) -> None:
        await self.settle((), [Settlement(message, "release") for message in messages])


def _note_subject(delivery: Delivery) -> str:
    return f"{NOTE}{delivery.stream}.{delivery.consumer}.{delivery.seq}"


def _read_note(answer: Frame) -> Note | None:
    try:
        stored = read_answer(answer, "read a note")["message"]
        return msgspec.json.decode(base64.b64decode(stored["data"]), type=Note)
    except ApiError as error:
        if error.code == 404:
            return None
        raise
    except (KeyError, ValueError):
        return None


def _stored_at(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text[:26].rstrip("Z") + "+00:00").timestamp()
