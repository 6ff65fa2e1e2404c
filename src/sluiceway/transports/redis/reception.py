"""Reception: what one source reads, on a connection of its own, and what it has in hand."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import TransportError
from ...message import Message, Settlement, new_id
from ...source import Subscription
from .entries import message_of, messages_of
from .groups import make_group, uptime
from .keys import Keys, ms
from .renewer import renewed
from .scripts import TRIM
from .settings import Settings
from .settling import Settling
from .taking import TAKE, TEND
from .wire import Line, ReplyError, Wire, explained, refusal

log = logging.getLogger("sluiceway")

_BUSY = 0.1  # seconds: while messages come in without a pause, retries and releases are looked for this often
_AT_ONCE = 250  # messages taken in order in one step, which is some ten milliseconds of the server's time
_TRIM = 1.0  # seconds between two looks at what all groups have finished


class Reception:
    """A consumer in the group of each topic, under a name that was never used before, and what it holds.

    When its lease is gone it goes on under a new name and holds nothing; `on_lost` is told the old one. `may_hold` says
    whether messages may be received at all. `on_reached` hears that the server has done all that it was asked for, and
    there is nothing left but to wait.
    """

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        subscription: Subscription,
        *,
        lease: float,
        retention: float,
        may_hold: Callable[[], bool],
        on_reached: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.group = subscription.group
        self.topics = list(dict.fromkeys(subscription.topics))
        self.keys_of = [keys.of(topic, self.group) for topic in self.topics]
        self.consumer = ""
        self.held: set[Any] = set()  # tokens
        self.line = Line(settings)
        self.wake = asyncio.Event()  # set when a receive has to end
        self.blocked: Wire | None = None  # the connection on which a read waits
        self.bytes_each = subscription.max_bytes / 10  # what a message of the last read came to on the wire
        self._keys = keys
        self._subscription = subscription
        self._lease = lease
        self._ordered = subscription.order_by is not None
        self._take = TAKE if self._ordered else TEND
        self._behind: dict[str, bytes] = {}  # in order: where the streams to wait at ended, when there was nothing
        self._turn = 0  # which topic is first
        self.taking = asyncio.Lock()
        """In order: held from when messages are asked for until they are handed on. What goes back meanwhile would not
        be known of there, nor they here, and they could pass it: so neither is sent while the other is under way."""
        self._retention = -1 if retention == float("inf") else ms(retention)
        self._may_hold = may_hold
        self._on_reached = on_reached
        self._on_lost = on_lost
        self._streams = [*self.topics, *(of[1] for of in self.keys_of)]
        self._unseeing = Settling(keys, self.group, self.topics, "unseen")
        self._bells: dict[str, list[bytes]] = {}  # by retry stream: heard, and not yet looked after
        self._serial = 0
        self._busy = False  # the last read brought all it was to
        self._tend_at = self._tend_busy_at = self._trim_at = self._recover_at = self._reap_at = 0.0
        self._known_wire: Wire | None = None
        self._known_groups = False

    def look_again(self) -> None:
        """Something was handed back, or comes again at once."""
        self._tend_at = 0.0

    def doubt(self) -> None:
        """A read failed: what the server handed us meanwhile is looked for before the next one."""
        self._recover_at = self._tend_at = 0.0

    async def make_groups(self, wire: Wire) -> None:
        """Make the groups where they are missing."""
        start = self._subscription.start
        if start == "latest" and self._known_groups:  # the keys are gone, so what is there now came after the beginning
            start = "earliest"
        for topic in self.topics:
            await make_group(wire, self._keys, topic, self.group, start)
        self._known_groups = True

    async def join(self, wire: Wire) -> None:
        """Become known, as a new consumer."""
        consumer = f"{socket.gethostname()}-{os.getpid()}-{new_id()}"
        now = time.monotonic()
        for of in self.keys_of:
            await wire.run(TEND, of, self.group, consumer, ms(self._lease), 0, 0, 1)
        renewed.pop(self.consumer, None)
        renewed[consumer] = now
        self.consumer = consumer
        self._tend_at = 0.0

    async def lost(self, wire: Wire, why: str) -> None:
        """The old consumer is gone; go on as a new one."""
        old, held = self.consumer, len(self.held)
        self.held.clear()
        self._bells.clear()
        await self.join(wire)
        if held:
            log.warning("%s of group %r: %s; %d messages in hand come again", self.topics, self.group, why, held)
        self._on_lost(old)

    async def receive(self, want: int) -> list[Message[Any]]:
        """Up to `want` messages; none when something has to be looked after first, or `wake` was set.

        Raises TransportError: then ask again, after `doubt`.
        """
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
        if self._ordered or now >= self._tend_at or (self._busy and now >= self._tend_busy_at):
            async with self.taking:
                found = await self._tend(wire, want, now)
            if found or not self._may_hold():
                return found
        if self._busy and want >= len(self.topics):
            found = await self._read(wire, self.topics, want // len(self.topics))
            if found or not self._may_wait():
                return found
        return await self._wait(wire, want)

    async def _reach(self) -> Wire | None:
        """The connection to read on; None when the receive has to end before there is one."""
        if self.line.up:
            return await self.line.wire()
        reaching, waking = asyncio.ensure_future(self.line.wire()), asyncio.ensure_future(self.wake.wait())
        try:
            await asyncio.wait((reaching, waking), return_when=asyncio.FIRST_COMPLETED)
            return reaching.result() if reaching.done() else None
        finally:
            reaching.cancel()
            waking.cancel()

    def _may_wait(self) -> bool:
        return self._may_hold() and self._tend_at > time.monotonic()

    async def _wait(self, wire: Wire, want: int) -> list[Message[Any]]:
        """Wait at the server until something comes, or it is time to look after what waits for its time."""
        block = max(1, ms(self._tend_at - time.monotonic()))
        self.blocked = wire
        try:
            if not self._may_wait():
                return []
            self._on_reached()
            if self._ordered:
                read = ("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", *self._behind, *self._behind.values())
                await wire.ask(*read, seconds=block / 1000 + 10)
                return []
            if want >= len(self._streams):
                return await self._read(wire, self._streams, want // len(self._streams), "BLOCK", block)
            # A read of several streams may bring a message of each, which is more than we may hold: so this one only
            # looks, from behind what the group has read; then the topics with the oldest messages are read.
            answers = await wire.call(*(("XINFO", "GROUPS", stream) for stream in self._streams))
            after = [_last_delivered(answer, self.group.encode()) for answer in answers]
            read = ("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", *self._streams, *after)
            seen = await wire.ask(*read, seconds=block / 1000 + 10) if self._may_wait() else None
            oldest = sorted((_order(entries[0][0]), name.decode()) for name, entries in seen or ())
            topics = [name for _, name in oldest if name in self.topics]
            if len(topics) < len(oldest):
                self._tend_at = 0.0  # for the retry streams
            return await self._read(wire, topics[:want], 1) if topics and self._may_hold() else []
        finally:
            self.blocked = None

    async def _read(self, wire: Wire, streams: Sequence[str], count: int, *block: Any) -> list[Message[Any]]:
        before, count = wire.received, min(count, self._fitting())
        seconds = block[1] / 1000 + 10 if block else 30.0
        group = ("XREADGROUP", "GROUP", self.group, self.consumer, "COUNT", count, *block)
        answer = await wire.ask(*group, "STREAMS", *streams, *(">" for _ in streams), seconds=seconds)
        found: list[Message[Any]] = []
        self._busy = False
        for name, entries in answer or ():
            stream = name.decode()
            at, which = self._unseeing.places[stream]
            self._busy = self._busy or len(entries) >= count
            if which == 2:
                bells = [one for one, fields in entries if fields[0] == b"bell"]
                if bells:
                    self._bells.setdefault(stream, []).extend(bells)
                    entries = [entry for entry in entries if entry[1][0] != b"bell"]
            messages, others = messages_of(entries, self.topics[at], stream, self.consumer, self.group)
            found += messages
            if others:
                await wire.ask("XACK", stream, self.group, *others)
        self.held.update([message.token for message in found])
        if self._bells:
            self._tend_at = 0.0
        if found:
            self.bytes_each = (wire.received - before) / len(found)
        return found

    def _fitting(self) -> int:
        """How many messages like the last ones `max_bytes` has room for."""
        return max(1, int(self._subscription.max_bytes / self.bytes_each))

    async def _tend(self, wire: Wire, want: int, now: float) -> list[Message[Any]]:
        """Renew the lease, find the dead, move what is due, and take what was handed back and what came for a retry."""
        found: list[Message[Any]] = []
        next_at = now + self._lease / 3
        before = wire.received
        if now >= self._trim_at:
            self._trim_at = now + _TRIM
            for of in self.keys_of:
                await wire.run(TRIM, of, self.group, self._retention)
        bells, self._bells = self._bells, {}
        self._behind = {}
        reap = int(now >= self._reap_at)
        self._turn += 1
        for turn in range(len(self.topics)):
            at = (turn + self._turn) % len(self.topics)
            of = self.keys_of[at]
            room = min(want - len(found), self._fitting(), _AT_ONCE if self._ordered else want)
            heard = bells.get(of[1], ())
            answer = await wire.run(self._take, of, self.group, self.consumer, ms(self._lease), room, reap, 0, *heard)
            if not answer[0]:
                await self.lost(wire, "the lease was lost")
                return []
            _, soonest, more, gone, taken, *behind = answer
            if behind:
                self._behind.update(zip((of[0], of[1], of[1] + "#wake"), behind[0], strict=False))
            if gone:
                log.error("%d messages of %r were deleted from the stream before group %r had handled them: by XDEL, "
                          "or by XTRIM or MAXLEN of another program", gone, self.topics[at], self.group)  # fmt: skip
            for which, one, delivered, suspicions, failures, fields in taken:
                self._serial += 1
                topic, stream = self.topics[at], of[which - 1]
                known = (delivered, int(suspicions), int(failures), self._serial)
                found.append(message_of([one, fields], topic, stream, self.consumer, *known))
            next_at = min(next_at, now if more else next_at, now + soonest / 1000 if soonest >= 0 else next_at)
        renewed[self.consumer] = now
        if found:
            self.held.update([message.token for message in found])
            self.bytes_each = (wire.received - before) / len(found)
        self._tend_at, self._tend_busy_at = next_at, now + _BUSY
        return found

    async def _recover(self, wire: Wire) -> None:
        """Give back what the server handed us and we never saw: the answer of a read was lost."""
        unseen: list[Settlement] = []
        held = {token[:2] for token in self.held}
        commands = [("XPENDING", stream, self.group, "-", "+", len(held) + 1000, self.consumer)
                    for stream in self._streams]  # fmt: skip
        for stream, answer in zip(self._streams, await wire.call(*commands), strict=True):
            if isinstance(answer, ReplyError):
                raise refusal(wire, f"tell what we hold of {stream!r}", answer) from answer
            for one, *_ in answer:
                if (stream, one) not in held:
                    message: Message[Any] = Message("", b"", "", token=(stream, one, self.consumer))
                    unseen.append(Settlement(message, "release"))
        if unseen:
            log.info("%d messages of %s were lost on the way; receiving them again", len(unseen), self.topics)
            await self._unseeing.settle(self.line.wire, self.consumer, unseen)
            self._tend_at = 0.0


def _order(one: bytes) -> tuple[int, int]:
    milliseconds, _, number = one.partition(b"-")
    return int(milliseconds), int(number)


def _last_delivered(answer: Any, group: bytes) -> bytes:
    """Up to where a group has read a stream, by XINFO GROUPS. Raises TransportError when there is no such group."""
    if isinstance(answer, ReplyError):
        raise TransportError(explained(answer)) from answer
    for info in answer:
        if info[1] == group:
            last: bytes = info[7]
            return last
    raise TransportError(f"group {group!r} is gone") from ReplyError("NOGROUP")
