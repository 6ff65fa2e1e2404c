"""The source: one subscription on the SQLite file, as the event loop sees it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal

import apsw

from ...errors import TransportError
from ...message import Message, Refused, Settlement
from ...source import Backlog, Renewer, SourceStatus, Subscription
from .inlet import Inlet
from .io_thread import IOThread
from .jobs import for_future
from .reception import Tap
from .renewer import SQLiteRenewer
from .schema import HELD_INDEX, explain
from .store import Store

log = logging.getLogger("sluiceway.sqlite")

_DURABLE = {"retry", "dead_letter"}  # these settles, and all that have outputs, must survive a power cut


class SQLiteSource:
    """One subscription. It is an owner of its own: what it received is fenced by its scope, the owner's id.

    `receive` returns messages in the order of their publishing, retries in their old place once they are due. When
    another process takes over (this one was stopped for longer than the lease) the scope changes, `on_revoke` is
    called with the old one, and settles of what was received under it come back as lost.
    """

    def __init__(
        self, thread: IOThread, subscription: Subscription, *, path: str, lease: float, max_payload: int
    ) -> None:
        self.lease: float | None = lease
        self.renewer: Callable[[], Renewer] | None = partial(SQLiteRenewer, path, lease)
        self.closed = False
        self._thread = thread
        self._reception = thread.reception
        self._subscription = subscription
        self._path = path
        self._max_payload = max_payload
        self._window = subscription.window
        self._held: dict[Any, Message[Any]] = {}  # by token
        self._left: list[Message[Any]] = []  # claimed, and not yet returned by a receive
        self._asked: asyncio.Future[None] | None = None  # done when the claim that goes on has been answered
        self._stopped = False
        self._trouble: str | None = None
        self._since = time.time()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Make the group's queues and an owner. Before anything else, once. Raises TransportError when it cannot."""
        subscription = self._subscription

        def work(store: Store) -> tuple[Inlet, int, float]:
            if subscription.order_by is not None:
                store.execute(HELD_INDEX)
            queue_ids = open_queues(store, subscription)
            inlet = Inlet(queue_ids, ordered=subscription.order_by is not None, max_bytes=subscription.max_bytes)
            return inlet, *self._reception.add_owner(inlet, store)

        try:
            inlet, owner, until = await self._run("subscribe", work, full=True)
        except OSError as error:
            raise TransportError(f"cannot subscribe: no liveness file beside {self._path}: {error}") from error
        inlet.owner, inlet.lease_until = owner, until
        self._owner: int = owner
        self._tap = Tap(inlet, self._on_lost, self._on_trouble)
        self._reception.open(self._tap)

    # -- receiving

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or while the window is 0.

        A full disk or a lock that nobody lets go of is waited out, and `status()` says so. Raises TransportError for
        a damaged file.
        """
        if self._asked is not None:  # for a receive that was cancelled: what it gets comes before all that is later
            await asyncio.wait((self._asked,))
        if not self._left:
            demand = min(demand, self._window)
            if self._stopped or demand <= 0:
                return []
            self._reception.ask(self._tap, demand, self._received)
            self._asked = asyncio.get_running_loop().create_future()
            try:
                await asyncio.shield(self._asked)
            except asyncio.CancelledError:
                self._withdraw()
                raise
        messages, self._left = self._left[:demand], self._left[demand:]
        return messages

    def _received(self, messages: list[Message[Any]] | None, error: BaseException | None) -> None:
        asked, self._asked = self._asked, None
        self._left += messages or ()
        self._held.update({message.token: message for message in messages or ()})
        if asked is not None:
            for_future(asked)(None, error)

    def resize(self, window: int) -> None:
        """Change the window. 0 pauses: a waiting `receive` returns nothing."""
        if (window == 0) != (self._window == 0):
            self._since = time.time()
        self._window = window
        if window == 0:
            self._withdraw()
            self._give_back()

    def stop(self) -> None:
        """Receive nothing more: a waiting `receive` returns what a claim in progress gets, or nothing. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._since = time.time()
            self._withdraw()

    def _withdraw(self) -> None:
        if self._thread.usable:
            self._reception.withdraw(self._tap)

    def _give_back(self) -> None:
        """Hand back what was claimed for nobody."""
        if self._left:
            others = [Settlement(message, "release") for message in self._left]
            self._left = []
            self._in_background(self.settle((), others))

    # -- settling

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries in one transaction; what others have taken over by now comes back as lost.

        Raises TransportError when the database takes nothing now (a full disk, a lock); nothing is settled then. What
        was settled before is lost, also when the message has come again since: token and owner are the same then.
        """
        if not acks and not others:
            return ()
        ended = [*acks, *[other.message for other in others]] if others else acks
        stale = self._let_go(ended)
        if stale:
            acks = [message for message in acks if message not in stale]
            others = [other for other in others if other.message not in stale]
        limit = self._max_payload
        full = any(other.outputs or other.outcome in _DURABLE for other in others)
        refused: list[Refused]
        try:
            refused = await self._run("settle", lambda store: store.settle(acks, others, limit), full=full)
        except TransportError:
            self._held.update({message.token: message for message in ended if message not in stale})
            raise
        self._held.update({one.message.token: one.message for one in refused if one.kind == "rejected"})
        return refused + [Refused(message, "lost") for message in stale] if stale else refused

    def _let_go(self, messages: Sequence[Message[Any]]) -> list[Message[Any]]:
        """Forget what is being settled; returns those that were settled before and have come again since."""
        held, stale = self._held, []
        for message in messages:
            current = held.pop(message.token, message)
            if current is not message:
                held[message.token] = current
                stale.append(message)
        return stale

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down that the message is suspected, on disk when it returns. False: the message is not ours any more.

        Raises TransportError when the database takes nothing now; nothing is written then.
        """
        suspicions = await self._run("suspect", lambda store: store.suspect(message.token), full=True)
        if suspicions is None:
            return False
        message.suspicions = suspicions
        message.suspect = False
        return True

    async def flush(self) -> None:
        """Return when every earlier settle is committed."""
        await self._run("flush", lambda store: None, reads=True)

    # -- looking

    def status(self) -> SourceStatus:
        """How the source is. `held_by_broker`: claimed and not settled, as far as this process has heard."""
        return SourceStatus(
            state=self._state(),
            since=self._since,
            error=self._trouble,
            scopes=frozenset({self._owner}),
            held_by_broker=len(self._held),
        )

    def _state(self) -> Literal["running", "paused", "blocked", "stopped"]:
        if self._stopped:
            return "stopped"
        if self._trouble is not None:
            return "blocked"
        return "running" if self._window else "paused"

    async def backlog(self) -> Backlog | None:
        """Messages that wait for this group, also for their retry or delay, and the age in seconds of the oldest that
        is due. With more than 100,000 the answer may be some seconds old."""
        inlet = self._tap.inlet
        found: Backlog = await self._run("count the backlog", lambda store: store.backlog(inlet), reads=True)
        return found

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give everything back that is not settled, uncounted, but for `keep`: that stays ours until its lease or this
        process ends. Idempotent."""
        if self.closed:
            return
        self.stop()
        self.closed = True
        self._left.clear()
        self._held.clear()
        inlet = self._tap.inlet
        kept = [message.token[0] for message in keep if message.token[1] == inlet.owner]
        self._reception.close_tap(self._tap, keeps=bool(kept))

        def work(store: Store) -> None:
            if kept:
                store.routing.keep(inlet.owner, kept)
            else:
                store.routing.drop_owner(inlet.owner, counted=False)

        await self._run("close the source", work)

    # -- what the I/O thread says

    def _on_lost(self, owner: int) -> None:
        log.warning("another process took over what owner %d of %s held; its settles are void", owner, self._path)
        self._owner = self._tap.inlet.owner
        self._held.clear()
        self._left.clear()
        self._in_background(self._subscription.on_revoke(frozenset({owner}), None))

    def _in_background(self, work: Awaitable[Any]) -> None:
        async def run() -> None:
            try:
                await work
            except Exception:
                log.exception("the source of group %r on %s goes on after", self._subscription.group, self._path)

        task = asyncio.ensure_future(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_trouble(self, text: str | None) -> None:
        if text is not None and self._trouble is None:
            log.warning("cannot receive, and go on trying: %s", text)
        if (text is None) != (self._trouble is None):
            self._since = time.time()
        self._trouble = text

    async def _run(self, what: str, work: Callable[[Store], Any], *, full: bool = False, reads: bool = False) -> Any:
        try:
            return await self._thread.run(work, full=full, reads=reads)
        except apsw.Error as error:
            raise TransportError(f"cannot {what}: {explain(error, self._path)}") from error


def open_queues(store: Store, subscription: Subscription) -> list[int]:
    """Make the queues of the subscription's group where they are missing; returns their ids."""
    start = subscription.start
    if isinstance(start, datetime):
        since: float | None = start.timestamp()
    else:
        since = -math.inf if start == "earliest" else None
    return store.routing.open(subscription.group, subscription.topics, since)
