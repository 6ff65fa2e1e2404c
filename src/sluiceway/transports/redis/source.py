"""The source: one subscription, on a reading connection of its own and the transport's for everything else."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Literal

from msgspec import Struct

from ..._decisions.backoff import reconnect_delay
from ..._decisions.suspicion import suspicions_now
from ...errors import TransportError
from ...message import Message, Refused, Settlement, new_id
from ...source import Backlog, Renewer, SourceStatus, Subscription
from .entries import message_of, messages_of, stored_of
from .groups import make_group, uptime
from .keys import Keys, ms
from .renewer import RedisRenewer, renewed
from .scripts import BACKLOG, LEAVE, SUSPECT, TEND, TRIM
from .settings import Settings
from .settling import Settling
from .wire import Line, ReplyError, Wire

log = logging.getLogger("sluiceway")

_BUSY = 0.1  # seconds: while messages come in without a pause, retries and releases are looked for this often
_PROMPT = 1.0  # seconds after which a read that has to end is cut off
_TRIM = 1.0  # seconds between two looks at what all groups have finished
_GONE = ("NOGROUP", "UNBLOCKED", "ERR no such key", "ERR The XGROUP")  # how the server says that a group is not there


class Limits(Struct, frozen=True, kw_only=True):
    """The transport's options, as a source needs them."""

    lease: float
    max_payload: int
    retention: float
    replicas: int


class RedisSource:
    """One subscription: a consumer of its own in the group of each topic, under a name that was never used before.

    Its lease covers all that it holds. When the lease is lost (this process stood still for longer) it goes on under a
    new name, `on_revoke` is called with the old one, and settles of what it received before come back as lost.
    """

    returns_failed = True  # what a newer version sent

    def __init__(self, settings: Settings, keys: Keys, line: Line, subscription: Subscription, limits: Limits) -> None:
        group, topics = subscription.group, list(dict.fromkeys(subscription.topics))
        self.closed = False
        self.lease: float | None = limits.lease
        self._lease = limits.lease
        self._of = [keys.of(topic, group) for topic in topics]
        leases = [of[3] for of in self._of]
        self.renewer: Callable[[], Renewer] | None = partial(RedisRenewer, settings, leases, limits.lease)
        self._keys = keys
        self._topics = topics
        self._group = group
        self._subscription = subscription
        self._retention = -1 if limits.retention == float("inf") else ms(limits.retention)
        self._line = line
        self._own = Line(settings)  # for reading
        checks = {"max_payload": limits.max_payload, "replicas": limits.replicas}
        self._settling = Settling(keys, group, topics, "others", **checks)
        self._acking = Settling(keys, group, topics, "acks", **checks)  # the runtime calls both at once
        self._unseeing = Settling(keys, group, topics, "unseen")
        self._streams = [*topics, *(of[1] for of in self._of)]
        self._window = subscription.window
        self._held: set[Any] = set()  # tokens
        self._left: list[Message[Any]] = []  # received, and not yet returned
        self._bells: dict[str, list[bytes]] = {}  # by retry stream: heard, and not yet looked after
        self._serial = 0
        self._bytes_each = subscription.max_bytes / 10  # what a message of the last read came to on the wire
        self._busy = False  # the last read brought all it was to
        self._blocked: Wire | None = None  # the connection on which a read waits
        self._reading = asyncio.Lock()
        self._tend_at = self._tend_busy_at = self._trim_at = self._recover_at = self._reap_at = 0.0
        self._known_wire: Wire | None = None
        self._stopped = False
        self._error: str | None = None
        self._tries = 0
        self._since = time.time()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._consumer = ""

    async def open(self) -> None:
        """Make the groups where they are missing, and become known. Before anything else, once."""
        await self._make_groups(await self._line.wire())
        await self._join(await self._line.wire())

    async def _make_groups(self, wire: Wire) -> None:
        for topic in self._topics:
            await make_group(wire, self._keys, topic, self._group, self._subscription.start)

    async def _join(self, wire: Wire) -> None:
        consumer = f"{socket.gethostname()}-{os.getpid()}-{new_id()}"
        now = time.monotonic()
        for of in self._of:
            await wire.run(TEND, of, self._group, consumer, ms(self._lease), 0, 0, 1)
        renewed.pop(self._consumer, None)
        renewed[consumer] = now
        self._consumer = consumer
        self._tend_at = 0.0

    async def _lost(self, wire: Wire, why: str) -> None:
        """The old consumer is gone; go on as a new one."""
        old, held = self._consumer, len(self._held)
        self._held.clear()
        self._left.clear()
        self._bells.clear()
        await self._join(wire)
        if held:
            log.warning("%s of group %r: %s; %d messages in hand come again", self._topics, self._group, why, held)
        self._in_background(self._subscription.on_revoke(frozenset({old}), None))

    # -- receiving

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or while the window is 0.

        A server that cannot be reached or answers with errors is waited for, and `status()` says so.
        """
        async with self._reading:
            while not self._left and not self._stopped and (want := min(demand, self._window)) > 0:
                self._wake.clear()
                try:
                    self._left = await self._receive(want)
                    self._reached()
                except asyncio.CancelledError:
                    self._own.close()  # what it would have brought is found and received later
                    raise
                except TransportError as error:
                    await self._wait_out(error)
            count = self._count(demand)
            messages, self._left = self._left[:count], self._left[count:]
            return messages

    def _count(self, demand: int) -> int:
        """How many of those that are left one receive returns."""
        if self._bytes_each * len(self._left) <= self._subscription.max_bytes:
            return demand
        count, size = 0, 0
        for message in self._left[:demand]:
            if size and size + len(message.body) > self._subscription.max_bytes:
                break
            count, size = count + 1, size + len(message.body)
        return count

    async def _receive(self, want: int) -> list[Message[Any]]:
        wire = await self._reach()
        if wire is None:
            return []
        now = time.monotonic()
        if wire is not self._known_wire:
            # Where the server was away for longer than a lease, all leases have ended, and nobody is dead for it.
            self._reap_at = now + max(0.0, self._lease - await uptime(wire))
            self._known_wire, self._recover_at = wire, 0.0
        if now >= self._recover_at:
            await self._recover(wire)
            self._recover_at = now + self._lease / 3
        if now >= self._tend_at or (self._busy and now >= self._tend_busy_at):
            found = await self._tend(wire, want, now)
            if found or not self._may_hold():
                return found
        if self._busy and want >= len(self._topics):
            found = await self._read(wire, self._topics, want // len(self._topics))
            if found or not self._may_wait():
                return found
        return await self._wait(wire, want)

    async def _reach(self) -> Wire | None:
        """The connection to read on; None when the receive has to end before there is one."""
        if self._own.up:
            return await self._own.wire()
        reaching, waking = asyncio.ensure_future(self._own.wire()), asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait((reaching, waking), return_when=asyncio.FIRST_COMPLETED)
            return reaching.result() if reaching.done() else None
        finally:
            reaching.cancel()
            waking.cancel()

    def _may_hold(self) -> bool:
        return not self._stopped and self._window > 0

    def _may_wait(self) -> bool:
        return self._may_hold() and self._tend_at > time.monotonic()

    async def _wait(self, wire: Wire, want: int) -> list[Message[Any]]:
        """Wait at the server until something comes, or it is time to look after what waits for its time."""
        block = max(1, ms(self._tend_at - time.monotonic()))
        self._blocked = wire
        try:
            if not self._may_wait():
                return []
            if want >= len(self._streams):
                return await self._read(wire, self._streams, want // len(self._streams), "BLOCK", block)
            # A read of several streams may bring a message of each, which is more than we may hold: so this one only
            # looks, from behind what the group has read; then the topics with the oldest messages are read.
            answers = await wire.call(*(("XINFO", "GROUPS", stream) for stream in self._streams))
            after = [_last_delivered(answer, self._group.encode()) for answer in answers]
            read = ("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", *self._streams, *after)
            seen = await wire.ask(*read, seconds=block / 1000 + 10) if self._may_wait() else None
            oldest = sorted((_order(entries[0][0]), name.decode()) for name, entries in seen or ())
            topics = [name for _, name in oldest if name in self._topics]
            if len(topics) < len(oldest):
                self._tend_at = 0.0  # for the retry streams
            return await self._read(wire, topics[:want], 1) if topics and self._may_hold() else []
        finally:
            self._blocked = None

    async def _read(self, wire: Wire, streams: Sequence[str], count: int, *block: Any) -> list[Message[Any]]:
        before, count = wire.received, min(count, self._fitting())
        seconds = block[1] / 1000 + 10 if block else 30.0
        group = ("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", count, *block)
        answer = await wire.ask(*group, "STREAMS", *streams, *(">" for _ in streams), seconds=seconds)
        found: list[Message[Any]] = []
        self._busy = False
        for name, entries in answer or ():
            stream = name.decode()
            at, which = self._settling.places[stream]
            self._busy = self._busy or len(entries) >= count
            if which == 2:
                bells = [one for one, fields in entries if fields[0] == b"bell"]
                if bells:
                    self._bells.setdefault(stream, []).extend(bells)
                    entries = [entry for entry in entries if entry[1][0] != b"bell"]
            messages, others = messages_of(entries, self._topics[at], stream, self._consumer, self._group)
            found += messages
            if others:
                await wire.ask("XACK", stream, self._group, *others)
        self._held.update([message.token for message in found])
        if self._bells:
            self._tend_at = 0.0
        if found:
            self._bytes_each = (wire.received - before) / len(found)
        return found

    def _fitting(self) -> int:
        """How many messages like the last ones `max_bytes` has room for."""
        return max(1, int(self._subscription.max_bytes / self._bytes_each))

    async def _tend(self, wire: Wire, want: int, now: float) -> list[Message[Any]]:
        """Renew the lease, find the dead, move what is due, and take what was handed back and what came for a retry."""
        found: list[Message[Any]] = []
        next_at = now + self._lease / 3
        if now >= self._trim_at:
            self._trim_at = now + _TRIM
            for of in self._of:
                await wire.run(TRIM, of, self._group, self._retention)
        bells, self._bells = self._bells, {}
        reap = int(now >= self._reap_at)
        for at, of in enumerate(self._of):
            room = min(want - len(found), self._fitting())
            heard = bells.get(of[1], ())
            answer = await wire.run(TEND, of, self._group, self._consumer, ms(self._lease), room, reap, 0, *heard)
            if not answer[0]:
                await self._lost(wire, "the lease was lost")
                return []
            _, soonest, more, gone, taken = answer
            if gone:
                log.error("%d messages of %r were deleted from the stream before group %r had handled them: by XDEL, "
                          "or by XTRIM or MAXLEN of another program", gone, self._topics[at], self._group)  # fmt: skip
            for which, one, delivered, suspicions, fields in taken:
                self._serial += 1
                topic, stream = self._topics[at], of[which - 1]
                entry, known = [one, fields], int(suspicions)
                found.append(message_of(entry, topic, stream, self._consumer, delivered, known, self._serial))
            next_at = min(next_at, now if more else next_at, now + soonest / 1000 if soonest >= 0 else next_at)
        renewed[self._consumer] = now
        self._held.update([message.token for message in found])
        self._tend_at, self._tend_busy_at = next_at, now + _BUSY
        return found

    async def _recover(self, wire: Wire) -> None:
        """Give back what the server handed us and we never saw: the answer of a read was lost."""
        unseen: list[Settlement] = []
        held = {token[:2] for token in self._held}
        commands = [("XPENDING", stream, self._group, "-", "+", len(held) + 1000, self._consumer)
                    for stream in self._streams]  # fmt: skip
        for stream, answer in zip(self._streams, await wire.call(*commands), strict=True):
            if isinstance(answer, ReplyError):
                raise TransportError(f"{wire.name}: {answer}") from answer
            for one, *_ in answer:
                if (stream, one) not in held:
                    message: Message[Any] = Message("", b"", "", token=(stream, one, self._consumer))
                    unseen.append(Settlement(message, "release"))
        if unseen:
            log.info("%d messages of %s were lost on the way; receiving them again", len(unseen), self._topics)
            await self._unseeing.settle(self._own.wire, self._consumer, unseen)
            self._tend_at = 0.0

    async def _wait_out(self, error: TransportError) -> None:
        """Say what is wrong; mend what we can; wait a little."""
        if str(error.__cause__ or "").startswith(_GONE) and not self._stopped:
            try:
                wire = await self._own.wire()
                await self._make_groups(wire)
                log.warning("group %r on %s was not there any more; made anew", self._group, self._topics)
                await self._lost(wire, "its group was deleted")
                return
            except TransportError as worse:
                error = worse
        self._recover_at = 0.0
        delay = reconnect_delay(self._tries, random.random())
        self._tries += 1
        if self._error is None:
            self._since = time.time()
        if self._error != str(error):
            log.warning("receiving from %s: %s; trying again in %.2f s, and on", self._topics, error, delay)
        self._error = str(error)
        try:
            await asyncio.wait_for(self._wake.wait(), delay)
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
        self._wake.set()
        if self._reading.locked():
            self._in_background(self._unblock())

    async def _unblock(self) -> None:
        """End a read that waits at the server; what it brings meanwhile is received as ever."""
        try:
            async with asyncio.timeout(_PROMPT):
                while self._reading.locked() and not self._may_hold():
                    if self._blocked is not None:
                        await (await self._line.wire()).ask("CLIENT", "UNBLOCK", self._blocked.client_id)
                    await asyncio.sleep(0.005)
        except (TransportError, TimeoutError):
            self._own.close()  # what it would have brought goes back, or is found by the next receive

    # -- settling

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries: acks in one round trip, everything else in steps that are whole or not at all. What others
        have taken over by now comes back as lost. Raises TransportError when the server cannot take it now."""
        consumer = self._consumer
        wire = await self._line.wire()  # before the lease is looked at: this may take a while
        fenced = time.monotonic() - renewed.get(consumer, 0.0) > self._lease * 2 / 3
        held = self._held
        plain = [] if fenced else [one.token for one in acks if not one.suspicions and one.token in held]
        if plain:
            await self._settling.ack(wire, plain)
        refused: list[Refused] = []
        if len(plain) != len(acks) or others:
            known = set(plain)
            rest = [Settlement(one, "ack") for one in acks if one.token not in known]
            refused = await self._settle(self._acking, rest) + await self._settle(self._settling, others)
            kept = {one.message.token for one in refused if one.kind == "rejected"}
            held.difference_update({one.message.token for one in (*rest, *others)} - kept)
        held.difference_update(plain)
        return refused

    async def _settle(self, settling: Settling, some: Sequence[Settlement]) -> list[Refused]:
        """What is no plain ack. What we do not hold any more, or never did under this name, is lost."""
        refused: list[Refused] = []
        ours: list[Settlement] = []
        for one in some:
            if one.message.token not in self._held:
                refused.append(Refused(one.message, "lost"))
            elif why := settling.why_not(one):
                refused.append(Refused(one.message, "rejected", why))
            else:
                ours.append(one)
        refused += await settling.settle(self._line.wire, self._consumer, ours)
        if any(one.outcome in ("release", "retry", "park") and not one.delay for one in ours):
            self._tend_at = 0.0
        return refused

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected. False: the message is not ours any more.

        Raises TransportError when the server cannot take it now; it is not known then whether it was written.
        """
        stream, one, *_ = message.token
        at, which = self._settling.places[stream]
        suspicions = suspicions_now(message.deliveries, message.failures, message.suspicions)
        wire = await self._line.wire()
        if message.token not in self._held or not await wire.run(
            SUSPECT, self._of[at], self._group, self._consumer, which, one, suspicions
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
            scopes=frozenset({self._consumer}),
            held_by_broker=len(self._held),
        )

    def _state(self) -> Literal["connecting", "running", "paused", "blocked", "stopped"]:
        if self._stopped:
            return "stopped"
        if self._error is not None:
            return "blocked" if self._own.up else "connecting"
        return "running" if self._window else "paused"

    async def backlog(self) -> Backlog | None:
        """Messages that wait for this group, also for their retry or delay, and the age in seconds of the oldest that
        is due. Where entries were deleted from the stream by hand, more than 10,000 are counted as 10,000."""
        wire = await self._line.wire()
        now = time.time()
        count, oldest = 0, now
        for topic, of in zip(self._topics, self._of, strict=True):
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
        renewed.pop(self._consumer, None)
        async with self._reading:
            self._left.clear()
            self._held.clear()
            self._own.close()
            try:
                wire = await self._line.wire()
                for of in self._of:
                    mine = [one.token for one in keep if one.token[2] == self._consumer and one.token[0] in of[:2]]
                    kept = [b"%d" % (1 + of.index(stream)) + number for stream, number, *_ in mine]
                    await wire.run(LEAVE, of, self._group, self._consumer, *kept)
            except TransportError as error:
                if not str(error.__cause__ or "").startswith(_GONE):
                    raise

    def _in_background(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _logged(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except Exception:
            log.exception("the source of group %r on %s goes on after", self._group, self._topics)


def _order(one: bytes) -> tuple[int, int]:
    milliseconds, _, number = one.partition(b"-")
    return int(milliseconds), int(number)


def _last_delivered(answer: Any, group: bytes) -> bytes:
    """Up to where a group has read a stream, by XINFO GROUPS. Raises TransportError when there is no such group."""
    if isinstance(answer, ReplyError):
        raise TransportError(str(answer)) from answer
    for info in answer:
        if info[1] == group:
            last: bytes = info[7]
            return last
    raise TransportError(f"group {group!r} is gone") from ReplyError("NOGROUP")
