"""The source: one subscription, over a member that it may share with others of its group."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..._decisions.commit_metadata import Note
from ..._decisions.suspicion import suspicions_now
from ...errors import PayloadTooLarge, TransportError
from ...message import Message, Outgoing, Refused, Scope, Settlement
from ...source import Backlog, Renewer, SourceStatus, Subscription
from .member import Member
from .publishing import Parcel, Publisher
from .requests import Ask, End, Settling, Token
from .wire import key_bytes, retry_topic, topic_name, write_headers

log = logging.getLogger("sluiceway.kafka")

PATIENCE = 15.0  # seconds that a settle waits for its commit before it says that it cannot

Measure = Callable[[Subscription, int], Any]


class KafkaSource:
    """One subscription. A delivery is ours as long as its partition is: after that its settle is refused as lost, and
    is not sent."""

    returns_failed = True  # what a newer version sent
    lease: float | None = None
    renewer: Callable[[], Renewer] | None = None

    def __init__(
        self,
        member: Member,
        publisher: Publisher,
        subscription: Subscription,
        prefix: str,
        measure: Measure,
        leave: Callable[[KafkaSource, Sequence[int]], Any],
    ) -> None:
        self.closed = False
        self.subscription = subscription
        self.member = member
        self._publisher = publisher
        self._prefix = prefix
        self._measure = measure
        self._leave = leave
        self._topics = frozenset(subscription.topics)
        self._window = subscription.window
        self._stopped = False
        self._since = time.time()
        self._ask: Ask | None = None
        self._held: dict[Token, Message[Any]] = {}
        self._told: set[asyncio.Task[None]] = set()

    # -- receiving

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or while the window is 0."""
        demand = min(demand, self._window)
        if self._stopped or demand <= 0:
            await asyncio.sleep(0)
            return []
        ask = self._ask = Ask(self, self._topics, demand, self.subscription.max_bytes)
        try:
            self.member.ask(ask)
            messages = await ask.answer
        finally:
            self._ask = None
            if not ask.answer.done():
                ask.answer.cancel()
        if not messages:
            self._check_member()
        self._held.update((message.token, message) for message in messages)
        return messages

    def _check_member(self) -> None:
        """Raise TransportError when nothing came since the member's thread has failed."""
        if self.member.ended and not (self._stopped or self.closed):
            raise TransportError(f"the member of group {self.subscription.group!r} has ended: {self.member.trouble}")

    def _withdraw(self) -> None:
        ask = self._ask
        if ask is not None and not ask.answer.done():
            ask.answer.set_result([])
            if not self.member.ended:
                self.member.give_up(ask)

    def resize(self, window: int) -> None:
        """Change the window. 0 pauses: a waiting `receive` returns nothing."""
        if (window == 0) != (self._window == 0):
            self._since = time.time()
        self._window = window
        if not window:
            self._withdraw()

    def stop(self) -> None:
        """Receive nothing more: a waiting `receive` returns. Idempotent."""
        if not self._stopped:
            self._stopped, self._since = True, time.time()
            self._withdraw()

    def revoked(self, scopes: frozenset[Scope], seconds: float | None) -> None:
        """Partitions are taken away, in so many seconds; None: they are gone."""
        task = asyncio.ensure_future(self.subscription.on_revoke(scopes, seconds))
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    # -- settling

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries. When it returns, the broker has what that means: copies and dead letters first, then the
        offsets. Raises TransportError when that cannot be told; the same may be settled again then."""
        refused: list[Refused] = []
        ends: list[tuple[Token, End]] = [(message.token, None) for message in acks]
        parcels: list[Parcel] = []
        owners: list[Message[Any]] = []  # of each parcel
        for one in others:
            message = one.message
            if message.token not in self._held:
                refused.append(Refused(message, "lost", "it was settled before, or its partition is another's"))
                continue
            try:
                more, end = self._end(one)
                self._publisher.check(more)
            except (PayloadTooLarge, ValueError) as error:
                refused.append(Refused(message, "rejected", str(error)))
                continue
            parcels += more
            owners += [message] * len(more)
            ends.append((message.token, end))
        for owner, refusal in zip(owners, await self._publisher.send(parcels), strict=True):
            if refusal is None:
                continue
            if not refusal.final:
                raise TransportError(f"what belongs to a settle is not published: {refusal.why}")
            refused.append(Refused(owner, "rejected", refusal.why))
            ends = [one for one in ends if one[0] != owner.token]
        lost = set(await self._commit(ends))
        asked = [*acks, *(one.message for one in others)]
        refused += [Refused(one, "lost", "its partition is another's") for one in asked if one.token in lost]
        for token, _ in ends:
            self._held.pop(token, None)
        return refused

    def _end(self, settlement: Settlement) -> tuple[list[Parcel], End]:
        """What is published for a settlement, and how the hand-over ends. Raises OptionError, PayloadTooLarge."""
        message = settlement.message
        parcels = self._publisher.parcels(settlement.outputs)
        delayed = settlement.delay > 0
        if settlement.outcome == "retry":
            failures = message.failures + settlement.counted
            if delayed:
                return [*parcels, self._copy(message, settlement.delay, failures, 0, 0)], None
            return parcels, Note(failures, failures, 0)
        if settlement.outcome in ("release", "park"):
            if delayed:
                before = message.deliveries - 1
                return [
                    *parcels,
                    self._copy(message, settlement.delay, message.failures, message.suspicions, before),
                ], None
            return parcels, True
        return parcels, None

    def _copy(self, message: Message[Any], delay: float, failures: int, suspicions: int, before: int) -> Parcel:
        topic = retry_topic(message.topic, self.subscription.group)
        out = Outgoing(topic, message.body, message.key, message.headers, message.id, message.timestamp)
        headers = write_headers(
            out, due=time.time() + delay, failures=failures, suspicions=suspicions, deliveries=before
        )
        return Parcel(topic_name(self._prefix, topic), message.body, key_bytes(message.key), headers, out)

    async def _commit(self, ends: Sequence[tuple[Token, End]]) -> Sequence[Token]:
        if not ends:
            return []
        if self.member.ended:
            return [token for token, _ in ends]
        settling = Settling(ends)
        self.member.settle(settling)
        done, _ = await asyncio.wait([settling.done], timeout=PATIENCE)
        if not done:
            raise TransportError(
                f"offsets of group {self.subscription.group!r} are not committed: {self.member.trouble}"
            )
        return settling.done.result()

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected. False: it is not ours any more. Raises TransportError."""
        if message.token not in self._held or self.member.ended:
            return False
        suspicions = suspicions_now(message.deliveries, message.failures, message.suspicions)
        note = Note(
            1 + message.failures + suspicions, message.failures, suspicions
        )  # which explains every death so far
        token: Token = message.token

        def write() -> None:
            p = self.member.books.partitions.get((token.topic, token.partition))
            if p is not None and p.generation == token.generation:
                p.write(token.offset, note)

        self.member.call(write)
        if await self._commit([(token, False)]):
            return False
        message.deliveries, message.suspicions, message.suspect = note.deliveries, suspicions, False
        return True

    async def flush(self) -> None:
        """Return when every earlier settle has reached the broker: each has when it returned."""

    # -- looking

    def status(self) -> SourceStatus:
        """How the source is. `held_by_broker`: received and not settled."""
        scopes = frozenset(p.scope for p in list(self.member.books.partitions.values()) if p.topic in self._topics)
        return SourceStatus(
            state=self._state(), since=self._since, error=self.member.trouble, scopes=scopes,
            held_by_broker=len(self._held),
        )  # fmt: skip

    def _state(self) -> Literal["connecting", "running", "paused", "blocked", "stopped"]:
        if self._stopped:
            return "stopped"
        if self.member.trouble is not None:
            return "connecting"
        return "running" if self._window else "paused"

    async def backlog(self) -> Backlog | None:
        """Messages that wait for this group, also for their delay, without what this source holds; and the age of the
        oldest that is not finished, without those that wait for a retry."""
        return await asyncio.to_thread(self._measure, self.subscription, len(self._held))

    # -- the end

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give everything back that is not settled, uncounted, but for `keep`. Idempotent."""
        if self.closed:
            return
        self.stop()
        self.closed = True
        await self._leave(self, [message.token.delivery for message in keep])
        self._held.clear()
