"""Receiving, on the I/O thread: claims that wait, what wakes them, and the owners of what is claimed.

A claim that finds nothing waits for a commit of our own, a ring of the doorbell, a message that falls due or, about
once a second, a look at the database's change counter.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

from ...errors import TransportError
from ...message import Message
from . import liveness
from .doorbell import Doorbell, forget
from .inlet import Inlet
from .jobs import Deliver, Host, Job
from .schema import explain
from .store import Store

log = logging.getLogger("sluiceway.sqlite")

_POLL = (0.05, 1.0)  # seconds between looks at the change counter: after something happened, and at most
_RETRY = (0.1, 5.0)  # seconds before a claim that failed is tried again: the first time, and at most


class Tap:
    """One source at the I/O thread. `on_lost(owner)` and `on_trouble(text or None)` are called on the event loop."""

    def __init__(self, inlet: Inlet, on_lost: Callable[[int], None], on_trouble: Callable[[str | None], None]) -> None:
        self.inlet = inlet
        self.on_lost = on_lost
        self.on_trouble = on_trouble
        self.loop = asyncio.get_running_loop()
        self.demand = 0
        self.deliver: Deliver | None = None  # set while a receive waits
        self.stirred = False  # there may be something new
        self.due_at: float | None = None  # wall clock
        self.failures = 0
        self.not_before = 0.0  # monotonic clock


class Reception:
    """The taps of one transport, its doorbell and its liveness file.

    `open`, `ask`, `withdraw` and `close_tap` are called from the event loop, all else on the I/O thread.
    """

    def __init__(self, thread: Host, store: Store, path: Path, lease: float) -> None:
        self._thread = thread
        self._store = store
        self._path = path
        self._name = str(path)
        self._lease = lease
        self._moment = min(1.0, lease / 3)
        self._nonce = os.urandom(8).hex()
        self._taps: list[Tap] = []
        self._live: liveness.LivenessFile | None = None
        self._keeps = False
        self._bell: Doorbell | None = None
        self._data_version = 0
        self._poll_every = _POLL[0]
        self._poll_at = 0.0
        self._upkeep_at = 0.0
        self._lapsed: dict[int, float] = {}  # owners, and since when we know: monotonic clock

    # -- for the event loop

    def open(self, tap: Tap) -> None:
        """Look after the tap and its owner from now on."""
        self._thread.call(lambda: self._taps.append(tap))

    def close_tap(self, tap: Tap, *, keeps: bool) -> None:
        """Forget the tap; the receive that waits gets nothing. `keeps`: its owner keeps messages for as long as the
        process lives, so the liveness file has to stay."""

        def close() -> None:
            self._answer(tap, [])
            self._keeps |= keeps
            if tap in self._taps:
                self._taps.remove(tap)

        self._thread.call(close)

    def ask(self, tap: Tap, demand: int, deliver: Deliver) -> None:
        """A receive waits for up to `demand` messages."""

        def ask() -> None:
            self._answer(tap, [])
            tap.demand, tap.deliver, tap.stirred = demand, deliver, True

        self._thread.call(ask)

    def withdraw(self, tap: Tap) -> None:
        """The receive that waits gets nothing."""
        self._thread.call(lambda: self._answer(tap, []))

    # -- for the I/O thread

    def close(self) -> None:
        """Give up the bell and the liveness file. While a row names the file it stays: unlocked, so that others take
        over at once, or locked when a closed source keeps what still runs."""
        if self._bell is not None:
            self._bell.close()
        if self._live is not None and not self._keeps:
            self._live.release()
            if not self._is_named(self._live.path.name):
                liveness.remove(self._live.path)

    def _is_named(self, live: str) -> bool:
        try:
            return self._store.execute("SELECT 1 FROM owners WHERE live = ?", (live,)).fetchone() is not None
        except apsw.Error:
            return True

    def fail(self, error: BaseException) -> None:
        """Nothing works any more: tell every receive that waits."""
        for tap in self._taps:
            self._answer(tap, None, error)

    def filenos(self) -> tuple[int, ...]:
        return () if self._bell is None else (self._bell.fileno(),)

    def timeout(self) -> float | None:
        """Seconds until there is something to do; None: when somebody asks."""
        if not self._taps:
            return None
        now = time.monotonic()
        times = [self._upkeep_at]
        for tap in self._taps:
            if tap.deliver is not None:
                times.append(max(self._poll_at, tap.not_before))
                if tap.stirred:
                    times.append(tap.not_before)
                elif tap.due_at is not None:
                    times.append(now + tap.due_at - time.time())
        return max(0.0, min(times) - now)

    def announce(self) -> None:
        """After a commit that made something receivable: let our own taps look, and ring the other transports."""
        touched = self._store.touched
        for tap in self._taps:
            if not touched.isdisjoint(tap.inlet.queue_ids):
                tap.stirred = True
        others = self._store.routing.bells(touched)
        touched.clear()
        if self._bell is not None:
            others.discard(self._bell.name)
        if others:
            try:
                self._own_bell().ring(others)
            except OSError as error:  # no socket to be had: the others find the message at their next poll
                log.warning("cannot ring the other processes of %s: %s", self._path, error)

    def _own_bell(self) -> Doorbell:
        if self._bell is None:
            self._bell = Doorbell(self._path, self._nonce)
        return self._bell

    def look_around(self) -> None:
        """Hear the bell; look at the change counter and after the owners when it is time."""
        if not self._taps:
            return
        if self._bell is not None and self._bell.drain():
            self._stir()
        now = time.monotonic()
        try:
            if now >= self._poll_at and any(tap.deliver is not None for tap in self._taps):
                self._poll(now)
            if now >= self._upkeep_at:
                self._upkeep_at = now + self._moment * random.uniform(0.8, 1.0)
                self._upkeep()
        except (apsw.Error, OSError) as error:
            log.warning("cannot look after %s; trying again in a second: %s", self._path, self._text(error))

    def _stir(self) -> None:
        self._poll_every = _POLL[0]
        for tap in self._taps:
            tap.stirred = True

    def _poll(self, now: float) -> None:
        version = self._store.db.data_version()
        if version != self._data_version:
            self._data_version = version
            self._stir()
        else:
            self._poll_every = min(_POLL[1], self._poll_every * 1.5)
        self._poll_at = now + self._poll_every * random.uniform(0.8, 1.0)

    # -- claims

    def claims(self, *, writing: bool) -> list[Job]:
        """The claims to make now. One that shares a transaction anyway (`writing`) need not look first."""
        return [self._claim(tap) for tap in self._taps if tap.deliver is not None and self._worth_it(tap, writing)]

    def _worth_it(self, tap: Tap, writing: bool) -> bool:
        if time.monotonic() < tap.not_before:
            return False
        if not tap.stirred and (tap.due_at is None or tap.due_at > time.time()):
            return False
        try:
            if writing or self._store.has_ready(tap.inlet):
                return True
            self._park(tap, self._store.due_at(tap.inlet))
        except apsw.Error as error:
            self._failed(tap, error)
        return False

    def _park(self, tap: Tap, due_at: float | None) -> None:
        tap.stirred, tap.due_at = False, due_at

    def _claim(self, tap: Tap) -> Job:
        def work(store: Store) -> tuple[int, float, list[Message[Any]], float | None]:
            owner, until = self._stand(tap.inlet, store)
            messages = store.claim(tap.inlet, owner, tap.demand)
            return owner, until, messages, None if messages else store.due_at(tap.inlet)

        return Job(work, lambda result, error: self._claimed(tap, result, error))

    def _claimed(self, tap: Tap, result: Any, error: BaseException | None) -> None:
        if error is not None:
            self._failed(tap, error)
            return
        owner, until, messages, due_at = result
        self._stands(tap, owner, until)
        if tap.failures:
            tap.failures, tap.not_before = 0, 0.0
            self._thread.tell(tap.loop, lambda: tap.on_trouble(None))
        if messages:
            self._poll_every = _POLL[0]
            self._answer(tap, messages)
        else:
            self._park(tap, due_at)

    def _answer(self, tap: Tap, messages: Any, error: BaseException | None = None) -> None:
        deliver, tap.deliver = tap.deliver, None
        if deliver is not None:
            self._thread.tell(tap.loop, lambda: deliver(messages, error))

    def _failed(self, tap: Tap, error: BaseException) -> None:
        """Try again later what may mend itself; tell the receiver of what cannot."""
        text = self._text(error)
        if isinstance(error, apsw.CorruptError | apsw.NotADBError) or not isinstance(error, apsw.Error | OSError):
            failure = TransportError(f"cannot receive: {text}")
            failure.__cause__ = error
            self._answer(tap, None, failure)
            return
        delay = min(_RETRY[1], _RETRY[0] * 2**tap.failures) * random.uniform(0.5, 1.0)
        tap.failures = min(tap.failures + 1, 20)
        tap.stirred, tap.not_before = True, time.monotonic() + delay
        self._thread.tell(tap.loop, lambda: tap.on_trouble(text))

    def _text(self, error: BaseException) -> str:
        return explain(error, self._name) if isinstance(error, apsw.Error) else f"{self._name}: {error!r}"

    # -- owners

    def add_owner(self, inlet: Inlet, store: Store) -> tuple[int, float]:
        """A new owner for the inlet, with a full lease: its id, and until when."""
        if self._live is None:
            self._live = liveness.LivenessFile(self._path, self._nonce)
            liveness.sweep(self._path, {owner.live for owner in store.routing.owners.values()})
        until = liveness.now() + self._lease
        live, bell = self._live.path.name, self._own_bell().name
        ordered = inlet.ordered
        return store.routing.add_owner(inlet.queue_ids, ordered=ordered, lease_until=until, live=live, bell=bell), until

    def _stand(self, inlet: Inlet, store: Store) -> tuple[int, float]:
        """The inlet's owner and the end of its lease; a new owner when another process has taken over the old."""
        if inlet.owner not in store.routing.owners:
            return self.add_owner(inlet, store)
        now = liveness.now()
        if inlet.lease_until - now > self._lease * 2 / 3:
            return inlet.owner, inlet.lease_until
        store.routing.extend_lease(inlet.owner, now + self._lease)
        return inlet.owner, now + self._lease

    def _stands(self, tap: Tap, owner: int, until: float) -> None:
        """After the commit: the tap's owner is `owner`, and what it held as another is lost."""
        inlet = tap.inlet
        inlet.lease_until = until
        if owner != inlet.owner:
            lost, inlet.owner = inlet.owner, owner
            self._thread.tell(tap.loop, lambda: tap.on_lost(lost))

    def _upkeep(self) -> None:
        """Take over what dead and hung owners hold, and notice when somebody took over from us."""
        store = self._store
        store.routing.refresh()
        own = {tap.inlet.owner for tap in self._taps}
        dead = [owner for owner in store.routing.owners.values() if owner.id not in own and self._is_dead(owner.live)]
        lapsed = self._given_up(store.routing.lapsed())
        if dead or lapsed:
            self._take_over({owner.id for owner in dead}, lapsed)
            for owner in dead:
                forget(owner.bell)
                liveness.remove(self._path.with_name(owner.live))
        for tap in self._taps:
            if tap.inlet.owner not in store.routing.owners:
                self._stand_again(tap)

    def _is_dead(self, live: str) -> bool:
        return liveness.is_dead(self._path.with_name(live))

    def _given_up(self, lapsed: list[int]) -> set[int]:
        """Those whose lease ended a moment ago already: after a stop of all processes their renewers come back too."""
        now = time.monotonic()
        self._lapsed = {owner: self._lapsed.get(owner, now) for owner in lapsed}
        return {owner for owner, since in self._lapsed.items() if now - since >= self._moment / 2}

    def _take_over(self, dead: set[int], lapsed: set[int]) -> None:
        def work(store: Store) -> None:
            still = dead | lapsed.intersection(store.routing.lapsed())  # a renewal may have come between
            for owner in still & store.routing.owners.keys():
                store.routing.drop_owner(owner, counted=True)
                log.warning("took over what owner %d of %s held: its process has died or hangs", owner, self._path)

        self._transact(work)

    def _stand_again(self, tap: Tap) -> None:
        owner, until = self._transact(lambda store: self._stand(tap.inlet, store))
        self._stands(tap, owner, until)
        tap.stirred = True

    def _transact(self, work: Callable[[Store], Any]) -> Any:
        """A transaction of the thread's own."""
        outcome: list[tuple[Any, BaseException | None]] = []
        self._thread.transact([Job(work, lambda *given: outcome.append(given))], precise=True)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result
