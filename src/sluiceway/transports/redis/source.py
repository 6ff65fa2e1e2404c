"""The source: one subscription, which reads on a connection of its own and settles on the transport's."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, Literal

from msgspec import Struct

from ..._decisions.backoff import reconnect_delay
from ..._decisions.suspicion import suspicions_now
from ...errors import TransportError
from ...message import Message, Refused, Settlement
from ...source import Backlog, Renewer, SourceStatus, Subscription
from .entries import stored_of
from .keys import Keys
from .reception import Reception
from .renewer import RedisRenewer, renewed
from .scripts import BACKLOG, LEAVE, SUSPECT
from .settings import Settings
from .settling import Settling
from .wire import Line

log = logging.getLogger("sluiceway")

_suspicions = attrgetter("suspicions")

_PROMPT = 1.0  # seconds after which a read that has to end is cut off
_GONE = ("NOGROUP", "UNBLOCKED", "ERR no such key", "ERR The XGROUP")  # how the server says that a group is not there


class Limits(Struct, frozen=True, kw_only=True):
    """The transport's options, as a source needs them."""

    lease: float
    max_payload: int
    retention: float


class RedisSource:
    """One subscription: a consumer of its own in the group of each topic.

    Its lease covers all that it holds. When the lease is lost (this process stood still for longer) it goes on under a
    new name, `on_revoke` is called with the old one, and settles of what it received before come back as lost.
    """

    returns_failed = True  # what a newer version sent

    def __init__(self, settings: Settings, keys: Keys, line: Line, subscription: Subscription, limits: Limits) -> None:
        group, topics = subscription.group, list(dict.fromkeys(subscription.topics))
        self.closed = False
        self.lease: float | None = limits.lease
        self._lease = limits.lease
        self._reception = reception = Reception(
            settings, keys, subscription,
            lease=limits.lease, retention=limits.retention, may_hold=self._may_hold,
            on_reached=self._reached, on_lost=self._on_lost,
        )  # fmt: skip
        leases = [of[3] for of in reception.keys_of]
        self.renewer: Callable[[], Renewer] | None = partial(RedisRenewer, settings, leases, limits.lease)
        self._subscription = subscription
        self._topics = topics
        self._group = group
        self._line = line
        self._ordered = subscription.order_by is not None
        how: dict[str, Any] = {"ordered": self._ordered, "max_payload": limits.max_payload}
        self._settling = Settling(keys, group, topics, "others", **how)
        self._acking = Settling(keys, group, topics, "acks", **how)  # the runtime calls both at once
        self._window = subscription.window
        self._left: list[Message[Any]] = []  # received, and not yet returned
        self._receiving = asyncio.Lock()
        self._stopped = False
        self._error: str | None = None
        self._tries = 0
        self._since = time.time()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Make the groups where they are missing, and become known. Before anything else, once."""
        await self._reception.make_groups(await self._line.wire())
        await self._reception.join(await self._line.wire())

    # -- receiving

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or while the window is 0.

        A server that cannot be reached or answers with errors is waited for, and `status()` says so.
        """
        async with self._receiving:
            while not self._left and not self._stopped and (want := min(demand, self._window)) > 0:
                self._reception.wake.clear()
                try:
                    self._left = await self._reception.receive(want)
                    self._reached()
                except asyncio.CancelledError:
                    self._reception.line.close()  # what it would have brought is found and received later
                    raise
                except TransportError as error:
                    await self._wait_out(error)
            count = self._count(demand)
            messages, self._left = self._left[:count], self._left[count:]
            return messages

    def _count(self, demand: int) -> int:
        """How many of those that are left one receive returns."""
        if self._ordered or self._reception.bytes_each * len(self._left) <= self._subscription.max_bytes:
            return demand
        count, size = 0, 0
        for message in self._left[:demand]:
            if size and size + len(message.body) > self._subscription.max_bytes:
                break
            count, size = count + 1, size + len(message.body)
        return count

    async def _wait_out(self, error: TransportError) -> None:
        """Say what is wrong; mend what we can; wait a little."""
        if str(error.__cause__ or "").startswith(_GONE) and not self._stopped:
            try:
                wire = await self._reception.line.wire()
                await self._reception.make_groups(wire)
                log.warning("group %r on %s was not there any more; made anew", self._group, self._topics)
                await self._reception.lost(wire, "its group was deleted")
                return
            except TransportError as worse:
                error = worse
        self._reception.doubt()
        delay = reconnect_delay(self._tries, random.random())
        self._tries += 1
        if self._error is None:
            self._since = time.time()
        if self._error != str(error):
            log.warning("receiving from %s: %s; trying again in %.2f s, and on", self._topics, error, delay)
        self._error = str(error)
        try:
            await asyncio.wait_for(self._reception.wake.wait(), delay)
        except TimeoutError:
            return

    def _reached(self) -> None:
        if self._error is not None:
            log.info("receiving from %s again, after %.1f s", self._topics, time.time() - self._since)
            self._error, self._since, self._tries = None, time.time(), 0

    # -- stop and pause

    def resize(self, window: int) -> None:
        """Change the window. 0 pauses: a waiting `receive` returns nothing."""
        if (window == 0) != (self._window == 0):
            self._since = time.time()
        self._window = window
        if window == 0:
            self._interrupt()
            if self._left:
                left, self._left = self._left, []
                self._in_background(self.settle((), [Settlement(message, "release") for message in left]))

    def stop(self) -> None:
        """Receive nothing more: a waiting `receive` returns what has arrived, perhaps nothing. Idempotent."""
        if not self._stopped:
            self._stopped, self._since = True, time.time()
            self._interrupt()

    def _interrupt(self) -> None:
        self._reception.wake.set()
        if self._receiving.locked():
            self._in_background(self._unblock())

    async def _unblock(self) -> None:
        """End a read that waits at the server; what it brings meanwhile is received as ever."""
        try:
            async with asyncio.timeout(_PROMPT):
                while self._receiving.locked() and not self._may_hold():
                    if self._reception.blocked is not None:
                        await (await self._line.wire()).ask("CLIENT", "UNBLOCK", self._reception.blocked.client_id)
                    await asyncio.sleep(0.005)
        except (TransportError, TimeoutError):
            self._reception.line.close()  # what it would have brought goes back, or is found by the next receive

    # -- settling

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries: acks in one round trip, everything else in steps that are whole or not at all. What others
        have taken over by now comes back as lost. Raises TransportError when the server cannot take it now."""
        consumer = self._reception.consumer
        wire = await self._line.wire()  # before the lease is looked at: this may take a while
        fenced = time.monotonic() - renewed.get(consumer, 0.0) > self._lease * 2 / 3
        held = self._reception.held
        tokens = [one.token for one in acks]
        if tokens and not (fenced or others) and held.issuperset(tokens) and not any(map(_suspicions, acks)):
            await self._settling.ack(wire, consumer, acks)
            held.difference_update(tokens)
            return ()
        plain = [] if fenced else [one for one in acks if not one.suspicions and one.token in held]
        if plain:
            await self._settling.ack(wire, consumer, plain)
        done = {one.token for one in plain}
        rest = [Settlement(one, "ack") for one in acks if one.token not in done]
        refused = await self._settle(self._acking, rest) + await self._settle(self._settling, others)
        kept = {one.message.token for one in refused if one.kind == "rejected"}
        held.difference_update(done, {one.message.token for one in (*rest, *others)} - kept)
        return refused

    async def _settle(self, settling: Settling, some: Sequence[Settlement]) -> list[Refused]:
        """What is no plain ack. What we do not hold any more, or never did under this name, is lost."""
        refused: list[Refused] = []
        if not some:  # then the other task may be at it
            return refused
        ours: list[Settlement] = []
        for one in some:
            if one.message.token not in self._reception.held:
                refused.append(Refused(one.message, "lost"))
            elif why := settling.why_not(one):
                refused.append(Refused(one.message, "rejected", why))
            else:
                ours.append(one)
        async with self._reception.taking if self._ordered else nullcontext():
            refused += await settling.settle(self._line.wire, self._reception.consumer, ours)
        if any(one.outcome in ("release", "retry", "park") and not one.delay for one in ours):
            self._reception.look_again()
        return refused

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected. False: the message is not ours any more.

        Raises TransportError when the server cannot take it now; it is not known then whether it was written.
        """
        stream, one, *_ = message.token
        at, which = self._settling.places[stream]
        suspicions = suspicions_now(message.deliveries, message.failures, message.suspicions)
        wire = await self._line.wire()
        if message.token not in self._reception.held or not await wire.run(
            SUSPECT, self._reception.keys_of[at], self._group, self._reception.consumer, which, one, suspicions
        ):
            return False
        message.suspicions, message.suspect = suspicions, False
        return True

    async def flush(self) -> None:
        """Return when every earlier settle has reached the server."""
        await (await self._line.wire()).ask("PING")

    # -- looking

    def status(self) -> SourceStatus:
        """How the source is. `held_by_broker`: received and not settled."""
        return SourceStatus(
            state=self._state(),
            since=self._since,
            error=self._error,
            scopes=frozenset({self._reception.consumer}),
            held_by_broker=len(self._reception.held),
        )

    def _state(self) -> Literal["connecting", "running", "paused", "blocked", "stopped"]:
        if self._stopped:
            return "stopped"
        if self._error is not None:
            return "blocked" if self._reception.line.up else "connecting"
        return "running" if self._window else "paused"

    async def backlog(self) -> Backlog | None:
        """Messages that wait for this group, also for their retry or delay, and the age in seconds of the oldest that
        is due. Where entries were deleted from the stream by hand, more than 10,000 are counted as 10,000."""
        wire = await self._line.wire()
        now = time.time()
        count, oldest = 0, now
        for topic, of in zip(self._topics, self._reception.keys_of, strict=True):
            waits, entries = await wire.run(BACKLOG, of, self._group)
            count += waits
            oldest = min([oldest, *(stored_of(entry, topic).timestamp for entry in entries if entry)])
        return Backlog(count, now - oldest)

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give everything back that is not settled, uncounted, but for `keep`: that stays ours until its lease ends.
        Idempotent. Raises TransportError when the server cannot take it; what we held comes back to others as if this
        process had died."""
        if self.closed:
            return
        self.stop()
        self.closed = True
        renewed.pop(self._reception.consumer, None)
        async with self._receiving:
            self._left.clear()
            self._reception.held.clear()
            self._reception.line.close()
            try:
                wire = await self._line.wire()
                for of in self._reception.keys_of:
                    mine = [
                        one.token for one in keep if one.token[2] == self._reception.consumer and one.token[0] in of[:2]
                    ]
                    kept = [b"%d" % (1 + of.index(stream)) + number for stream, number, *_ in mine]
                    await wire.run(LEAVE, of, self._group, self._reception.consumer, *kept)
            except TransportError as error:
                if not str(error.__cause__ or "").startswith(_GONE):
                    raise

    def _may_hold(self) -> bool:
        return not self._stopped and self._window > 0

    def _on_lost(self, consumer: str) -> None:
        self._left.clear()
        self._in_background(self._subscription.on_revoke(frozenset({consumer}), None))

    def _in_background(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _logged(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except Exception:
            log.exception("the source of group %r on %s goes on after", self._group, self._topics)
