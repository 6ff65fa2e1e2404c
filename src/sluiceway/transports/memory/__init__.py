"""The in-memory transport: a real one, with groups, leases, redelivery and delay. It lives as long as its process."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar

from ..._decisions.topics import check_topic, is_dead_letter_topic
from ...errors import OptionError, TransportError
from ...message import Message, Outgoing, Refused, Settlement, Stored
from ...source import Backlog, Renewer, SourceStatus, Subscription
from ...transport import Features, Finding
from ._broker import Broker
from ._queue import BODY, HEADERS, ID, KEY, TIMESTAMP, TOPIC, Hold, place_of

__all__ = ["MemorySource", "MemoryTransport"]

MAX_PAYLOAD = 16 * 1024 * 1024


class MemoryTransport:
    """A broker inside the process.

    `lease`: seconds after which the deliveries of a source that was dropped without `aclose` come back. While a source
    lives it keeps its own leases, however long a handler blocks the loop. `max_payload`: bytes a body may have.

    Several apps may share one: pass the object, or open it by name. It serves one running loop at a time; a publish
    from another thread's loop is handed over to it. Messages stay when it is closed: they go with the object.
    Raises OptionError when a value is not allowed.
    """

    _named: ClassVar[dict[str, MemoryTransport]] = {}

    def __init__(self, *, lease: float = 30.0, max_payload: int = MAX_PAYLOAD) -> None:
        if lease <= 0:
            raise OptionError(f"MemoryTransport: lease must be more than 0 seconds, got {lease!r}")
        if max_payload < 1:
            raise OptionError(f"MemoryTransport: max_payload must be 1 or more bytes, got {max_payload!r}")
        self.lease = lease
        self.features = Features(
            durable=False,
            retains=True,
            order="group",
            delay="native",
            atomic=True,
            park=True,
            release=True,
            lease=True,
            max_payload=max_payload,
            wildcards=True,
            browse=True,
            backlog=True,
        )
        self._broker = Broker(max_payload)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def named(cls, name: str) -> MemoryTransport:
        """The transport that everyone in this process gets by this name."""
        return cls._named.setdefault(name, cls())

    @classmethod
    def from_url(cls, url: str) -> MemoryTransport:
        """`memory://` is a new transport, `memory://name` the one of this process by that name."""
        scheme, mark, name = url.partition("://")
        if scheme != "memory" or not mark:
            raise OptionError(f"MemoryTransport: the URL must be memory:// or memory://name, got {url!r}")
        return cls.named(name) if name else cls()

    async def connect(self) -> None:
        """Nothing to open."""
        self._bind()

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        """With `create` make the groups known, so that what is published from now on waits for them."""
        self._bind()
        findings = []
        for subscription in subscriptions:
            known = self._broker.groups.get(subscription.group)
            if create:
                self._register(subscription)
            elif known is None or frozenset(subscription.topics) not in known.subscriptions:
                text = f"group {subscription.group!r} for {', '.join(subscription.topics)} begins when it subscribes"
                findings.append(Finding("info", text))
        return findings

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish all or nothing, in order. Raises PayloadTooLarge, and OptionError for a topic that cannot be."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if owner := self._other_loop():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.publish(messages), owner))
                return
            self._bind()
        self._broker.publish(messages, loop.time())
        self._arm(loop)

    async def subscribe(self, subscription: Subscription) -> MemorySource:
        """Open a source. Raises OptionError for a topic that cannot be."""
        loop = self._bind()
        self._register(subscription)
        hold = self._broker.open(subscription.group, frozenset(subscription.topics), loop)
        return MemorySource(self, hold, subscription)

    async def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        """The messages of `topic` that no source holds, delayed ones too, as they are at the first step."""
        self._bind()
        for entry in self._broker.browse(topic, int(after) if after is not None else -1):
            yield Stored(
                str(place_of(entry)), entry[TOPIC], entry[BODY], entry[ID], entry[KEY], entry[HEADERS], entry[TIMESTAMP]
            )

    async def dead_letter_topics(self) -> Sequence[str]:
        """The dead-letter topics that have messages at rest; sorted."""
        self._bind()
        return sorted(filter(is_dead_letter_topic, self._broker.topics_at_rest()))

    async def remove(self, stored: Sequence[Stored]) -> None:
        """Delete messages for every group. What a source holds by now is left to it."""
        self._bind()
        self._broker.remove({int(one.position) for one in stored})

    async def aclose(self) -> None:
        """Nothing to close. The messages stay, for others may share them."""

    def held(self, group: str) -> int:
        """How many deliveries of a group are unsettled, as the broker counts."""
        return self._broker.held(group)

    def expire(self, source: MemorySource) -> None:
        """For tests: the source's leases run out now. Its deliveries come back as those of a process that died."""
        self._broker.give_back(source.hold, died=True)

    def crash(self, source: MemorySource) -> None:
        """For tests: the source's process dies now. The source gets and settles nothing more."""
        source.stop()
        self._broker.close(source.hold, died=True)

    def _register(self, subscription: Subscription) -> None:
        if not subscription.topics:
            raise OptionError(f"group {subscription.group!r}: a subscription needs at least one topic")
        for topic in subscription.topics:
            check_topic(topic, pattern=True)
        self._broker.register(
            subscription.group,
            frozenset(subscription.topics),
            ordered=subscription.order_by is not None,
            start=subscription.start,
        )

    # -- the loop ------------------------------------------------------------------------------------------------

    def _bind(self) -> asyncio.AbstractEventLoop:
        """The running loop. When it is another than before, what sources of closed loops held comes back."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return loop
        if self._other_loop():
            raise TransportError("MemoryTransport: it serves another running event loop; use one per loop")
        if self._loop is not None:
            self._broker.shift_clock(loop.time() - self._loop.time())
            self._broker.close_dead()
        self._loop, self._timer = loop, None
        self._arm(loop)
        return loop

    def _other_loop(self) -> asyncio.AbstractEventLoop | None:
        return self._loop if self._loop is not None and self._loop.is_running() else None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the one timer to when the next delayed message is due."""
        due = self._broker.next_due
        if due is None or (self._timer is not None and self._timer.when() <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(due, self._release_due, loop)

    def _release_due(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._broker.release_due(loop.time())
        self._arm(loop)


class MemorySource:
    """One member of a group. Dropped without `aclose`, its deliveries come back when the lease has passed."""

    settles_at_once = True

    def __init__(self, transport: MemoryTransport, hold: Hold, subscription: Subscription) -> None:
        self.lease: float | None = transport.lease
        self.renewer: Callable[[], Renewer] | None = None
        self.hold = hold
        self._transport = transport
        self._broker = transport._broker
        self._max_bytes = subscription.max_bytes
        self._paused = False
        self._stopped = False
        self._since = time.time()
        self._finalizer = weakref.finalize(self, _dropped, self._broker, hold, transport.lease)
        self._finalizer.atexit = False

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        messages: Sequence[Message[Any]] = []
        woken = False
        while not (self._stopped or self._paused or messages):
            messages = self._broker.take(self.hold, demand, self._max_bytes)
            if not messages:
                await self._wait()
                woken = True
        if woken:
            self._broker.leftover(self.hold)
        return messages

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        refused = self._broker.ack(self.hold, acks) if acks else []
        if others:
            loop = self._transport._bind()
            now = loop.time()
            refused += [no for one in others if (no := self._broker.end(self.hold, one, now)) is not None]
            self._transport._arm(loop)
        return refused

    async def suspect(self, message: Message[Any]) -> bool:
        return self._broker.suspect(self.hold, message)

    async def flush(self) -> None:
        """Nothing to wait for: a settle is done when it returns."""

    def resize(self, window: int) -> None:
        if self._paused != (window <= 0) and not self._stopped:
            self._since = time.time()
        self._paused = window <= 0
        self.hold.wake()

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._since = time.time()
        self.hold.wake()

    def status(self) -> SourceStatus:
        return SourceStatus(
            state="stopped" if self._stopped else "paused" if self._paused else "running",
            since=self._since,
            held_by_broker=len(self.hold.held),
        )

    async def backlog(self) -> Backlog:
        return self._broker.backlog(self.hold, time.time())

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give back what is unsettled, uncounted. `keep` can still be settled, until the lease has passed."""
        self.stop()
        if self._finalizer.detach() is None:
            return
        tokens = {message.token for message in keep}
        self._broker.give_back(self.hold, died=False, keep=tokens)
        if self.hold.held:
            self.hold.loop.call_later(self.lease or 0, _end_lease, self._broker, self.hold)
        else:
            self._broker.close(self.hold, died=False)

    async def _wait(self) -> None:
        """Wait until woken: by a message, a stop or a change of the window."""
        hold = self.hold
        hold.waiter = hold.loop.create_future()
        for queue in hold.queues:
            queue.sleepers.append(hold)
        try:
            await hold.waiter
        except asyncio.CancelledError:
            self._broker.leftover(hold)
            raise
        finally:
            hold.waiter = None
            for queue in hold.queues:
                if queue.sleepers and hold in queue.sleepers:
                    queue.sleepers.remove(hold)


def _dropped(broker: Broker, hold: Hold, lease: float) -> None:
    """A source is gone without a word, perhaps on another thread: its lease runs from now."""

    try:
        hold.loop.call_soon_threadsafe(hold.loop.call_later, lease, _end_lease, broker, hold)
    except RuntimeError:  # the loop is closed: the next loop takes back what its sources held
        pass


def _end_lease(broker: Broker, hold: Hold) -> None:
    broker.close(hold, died=True)
