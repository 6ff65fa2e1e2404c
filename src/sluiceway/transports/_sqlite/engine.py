"""The I/O thread: the one place where a transport's SQL runs.

Jobs that wait share one transaction, so that a hundred publishers cost one fsync. A claim that finds nothing stays
here until something may have changed: a commit of our own, a ring of the doorbell, a message falling due, or, about
once a second, the database's change counter.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import apsw

from ...errors import TransportError
from . import liveness
from .doorbell import Doorbell, forget
from .schema import explain, open_database
from .store import Inlet, Mismatch, Store

log = logging.getLogger("sluiceway.sqlite")

_POLL = (0.05, 1.0)  # seconds between looks at the change counter: after something happened, and at most
_RETRY = (0.1, 5.0)  # seconds before a claim that failed is tried again: the first time, and at most

Deliver = Callable[[Any, BaseException | None], None]


class Job:
    """Something to do in a transaction, and whom to tell. `full`: the commit must survive a power cut."""

    __slots__ = ("deliver", "full", "loop", "outside", "work")

    def __init__(
        self, work: Callable[[Store], Any], deliver: Deliver, *, full: bool = False, outside: bool = False
    ) -> None:
        self.work = work
        self.deliver = deliver
        self.full = full
        self.outside = outside  # it only reads, and needs no transaction
        self.loop = asyncio.get_running_loop()


class Tap:
    """One source at the I/O thread: its inlet and the claim that waits. What it calls runs on the loop."""

    def __init__(self, inlet: Inlet, on_lost: Callable[[int], None], on_trouble: Callable[[str | None], None]) -> None:
        self.inlet = inlet
        self.on_lost = on_lost
        self.on_trouble = on_trouble
        self.loop = asyncio.get_running_loop()
        self.demand = 0
        self.deliver: Deliver | None = None
        self.due_at: float | None = None
        self.stirred = False
        self.failures = 0
        self.not_before = 0.0


class Engine:
    """Owns the connection, the doorbell and the liveness file. All methods but the first block belong to its thread."""

    def __init__(self, path: str, lease: float, busy_timeout: float) -> None:
        self.path = path
        self.lease = lease
        self._pid = os.getpid()
        self._jobs: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._asleep = False
        self._stopping = False
        self._broken: TransportError | None = None
        self._db = open_database(path, busy_timeout=busy_timeout)
        self._store = Store(self._db)
        self._synchronous_full = True
        self._taps: list[Tap] = []
        self._live: liveness.LivenessFile | None = None
        self._bell: Doorbell | None = None
        self._seen = 0
        self._poll_every = _POLL[0]
        self._poll_at = 0.0
        self._upkeep_at = 0.0
        self._results: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name=f"sluiceway-sqlite {os.path.basename(path)}", daemon=True)
        self._thread.start()

    # -- called by the event loop

    def check(self) -> None:
        """Raise TransportError when the transport cannot be used here any more."""
        if self._broken is not None:
            raise self._broken
        if os.getpid() != self._pid:
            raise TransportError(
                f"this SQLite transport was connected in process {self._pid} and is used in {os.getpid()}, its fork: "
                "a connection does not survive a fork; connect a transport of its own in the child"
            )
        if self._stopping:
            raise TransportError(f"the SQLite transport of {self.path} is closed")

    def submit(self, job: Job) -> None:
        self.check()
        self._jobs.append(job)
        self._wake()

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the I/O thread, between transactions."""
        self.check()
        self._calls.append(function)
        self._wake()

    def _wake(self) -> None:
        if self._asleep:
            self._asleep = False
            try:
                os.write(self._wake_write, b"1")
            except BlockingIOError:
                return  # the pipe is full of wake-ups already

    async def run(self, work: Callable[[Store], Any], *, full: bool = False, outside: bool = False) -> Any:
        """Do `work` and return its result once it is committed."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.submit(Job(work, settle_future(future), full=full, outside=outside))
        return await future

    async def stop(self) -> None:
        """End the thread after what was submitted. Idempotent."""
        if os.getpid() != self._pid:
            return
        self._stopping = True
        self._wake()
        await asyncio.to_thread(self._thread.join)

    # -- the thread

    def _run(self) -> None:
        try:
            while not (self._stopping and not self._jobs and not self._calls):
                self._turn()
        except BaseException as error:
            log.exception("the I/O thread of %s failed; the transport must be connected anew", self.path)
            self._broken = TransportError(f"the I/O thread of {self.path} failed: {error!r}")
            self._abandon(self._broken)
        finally:
            self._close()

    def _abandon(self, error: BaseException) -> None:
        for tap in self._taps:
            if tap.deliver is not None:
                self._deliver(tap.loop, tap.deliver, None, error)
                tap.deliver = None
        for job in self._jobs:
            self._deliver(job.loop, job.deliver, None, error)
        self._flush_results()

    def _close(self) -> None:
        self._db.close()
        if self._bell is not None:
            self._bell.close()
        if self._live is not None:
            self._live.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _turn(self) -> None:
        self._sleep()
        while self._calls:
            self._calls.popleft()()
        jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
        writes = []
        for job in jobs:
            if job.outside:
                self._attempt([job], precise=False)
            else:
                writes.append(job)
        self._look_around()
        claims = [tap for tap in self._taps if self._wants(tap, bool(writes))]
        if writes or claims:
            self._transact(writes, claims)
        self._flush_results()

    def _sleep(self) -> None:
        timeout = self._timeout()
        if timeout is not None and timeout <= 0:
            return
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        if self._bell is not None:
            poll.register(self._bell.fileno(), select.POLLIN)
        self._asleep = True
        if self._jobs or self._calls or self._stopping:  # came before `_asleep` was seen
            self._asleep = False
            return
        ready = poll.poll(None if timeout is None else timeout * 1000 + 1)
        self._asleep = False
        for fd, _ in ready:
            if fd == self._wake_read:
                os.read(fd, 1024)

    def _timeout(self) -> float | None:
        """Seconds until there is something to do; None: until somebody comes."""
        if self._jobs or self._calls or self._stopping:
            return 0.0
        if not self._taps:
            return None
        now = time.monotonic()
        times = [self._upkeep_at]
        waiting = [tap for tap in self._taps if tap.deliver is not None]
        if waiting:
            times.append(self._poll_at)
        for tap in waiting:
            if tap.stirred:
                times.append(tap.not_before)
            elif tap.due_at is not None:
                times.append(max(now + tap.due_at - time.time(), tap.not_before))
        return max(0.0, min(times) - now)

    # -- transactions

    def _transact(self, jobs: list[Job], claims: list[Tap]) -> None:
        everything = [*jobs, *(self._claim_job(tap) for tap in claims)]
        if self._begin(everything):
            self._attempt_begun(everything, precise=False)

    def _attempt(self, jobs: list[Job], *, precise: bool) -> None:
        if jobs[0].outside:
            self._read(jobs[0])
        elif self._begin(jobs):
            self._attempt_begun(jobs, precise=precise)

    def _begin(self, jobs: list[Job]) -> bool:
        """Open a transaction for `jobs`, or tell them why not."""
        full = any(job.full for job in jobs)
        try:
            if full != self._synchronous_full:
                self._db.execute("PRAGMA synchronous = FULL" if full else "PRAGMA synchronous = NORMAL")
                self._synchronous_full = full
            self._db.execute("BEGIN IMMEDIATE")
        except apsw.Error as error:
            for job in jobs:
                self._deliver(job.loop, job.deliver, None, error)
            return False
        return True

    def _attempt_begun(self, jobs: list[Job], *, precise: bool) -> None:
        """Do all in the open transaction; when one fails, each in a transaction of its own."""
        store = self._store
        store.touched.clear()
        store.precise = precise
        try:
            store.refresh()
            results = [job.work(store) for job in jobs]
            self._db.execute("COMMIT")
        except Exception as error:  # a job's error goes to the one who waits for that job
            self._rollback()
            if precise:
                self._deliver(jobs[0].loop, jobs[0].deliver, None, error)
            elif len(jobs) == 1 and not isinstance(error, Mismatch):
                self._deliver(jobs[0].loop, jobs[0].deliver, None, error)
            else:
                for job in jobs:
                    self._attempt([job], precise=True)
            return
        for job, result in zip(jobs, results, strict=True):
            self._deliver(job.loop, job.deliver, result, None)
        if store.touched:
            self._announce()

    def _rollback(self) -> None:
        self._store.forget()
        if self._db.in_transaction:  # a full disk or an I/O error may have ended it
            self._db.execute("ROLLBACK")

    def _read(self, job: Job) -> None:
        try:
            self._store.refresh()
            self._deliver(job.loop, job.deliver, job.work(self._store), None)
        except Exception as error:  # goes to the one who waits
            self._deliver(job.loop, job.deliver, None, error)

    def _announce(self) -> None:
        """Something new may be received: let the own sources look, and ring the other transports."""
        bells = self._store.bells()
        if self._bell is not None:
            bells.discard(self._bell.name)
            self._bell.ring(bells)
        elif bells:
            self._ring_from_outside(bells)
        for tap in self._taps:
            if not self._store.touched.isdisjoint(tap.inlet.queue_ids):
                tap.stirred = True

    def _ring_from_outside(self, bells: Iterable[str]) -> None:
        self._bell = Doorbell(self.path, os.urandom(8).hex())
        self._bell.ring(bells)

    # -- results go to the loop in one call per turn

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, deliver: Deliver, result: Any, error: BaseException | None
    ) -> None:
        self._results.setdefault(loop, []).append(lambda: deliver(result, error))

    def _flush_results(self) -> None:
        if self._results:
            results, self._results = self._results, {}
            for loop, calls in results.items():
                try:
                    loop.call_soon_threadsafe(_call_all, calls)
                except RuntimeError:  # the loop was closed: nobody waits any more
                    continue

    # -- claims

    def open_tap(self, tap: Tap) -> None:
        """Called on this thread: from now on the tap's owner row is looked after."""
        self._taps.append(tap)

    def ask(self, tap: Tap, demand: int, deliver: Deliver) -> None:
        """A receive waits for up to `demand` messages."""

        def ask() -> None:
            if tap.deliver is not None:
                self._deliver(tap.loop, tap.deliver, [], None)
            tap.demand, tap.deliver, tap.stirred = demand, deliver, True
            tap.not_before = 0.0

        self.call(ask)

    def withdraw(self, tap: Tap) -> None:
        """The receive that waits gets nothing."""

        def withdraw() -> None:
            if tap.deliver is not None:
                self._deliver(tap.loop, tap.deliver, [], None)
                tap.deliver = None

        self.call(withdraw)

    def close_tap(self, tap: Tap) -> None:
        def close() -> None:
            if tap in self._taps:
                self._taps.remove(tap)

        self.call(close)

    def _wants(self, tap: Tap, writing: bool) -> bool:
        """Whether to claim for `tap` in this turn. A claim that shares a transaction need not look first."""
        if tap.deliver is None or time.monotonic() < tap.not_before:
            return False
        if not tap.stirred and (tap.due_at is None or tap.due_at > time.time()):
            return False
        if writing:
            return True
        try:
            if self._store.has_ready(tap.inlet):
                return True
            self._park(tap)
        except apsw.Error as error:
            self._claim_failed(tap, error)
        return False

    def _park(self, tap: Tap) -> None:
        tap.stirred = False
        tap.due_at = self._store.due_at(tap.inlet)

    def _claim_job(self, tap: Tap) -> Job:
        def work(store: Store) -> Any:
            owner, until = self._stand(tap, store)
            messages = store.claim(tap.inlet, owner, tap.demand)
            return owner, until, messages, None if messages else store.due_at(tap.inlet)

        job = Job.__new__(Job)
        job.work, job.full, job.outside, job.loop = work, False, False, tap.loop
        job.deliver = lambda result, error: None
        job.deliver = _OnThread(lambda result, error: self._claimed(tap, result, error))
        return job

    def _stand(self, tap: Tap, store: Store) -> tuple[int, float]:
        """The tap's owner and the end of its lease; a new owner when another process has taken over the old."""
        inlet = tap.inlet
        now = liveness.now()
        until = now + self.lease
        if inlet.owner not in store.owners:
            return self.add_owner(store, inlet), until
        if inlet.lease_until - now > self.lease * 2 / 3:
            return inlet.owner, inlet.lease_until
        store.extend_lease(inlet.owner, until)
        return inlet.owner, until

    def add_owner(self, store: Store, inlet: Inlet) -> int:
        if self._live is None:
            nonce = os.urandom(8).hex()
            self._live = liveness.LivenessFile(self.path, nonce)
            liveness.sweep(self.path, {owner.live for owner in store.owners.values()})
            if self._bell is None:
                self._bell = Doorbell(self.path, nonce)
        assert self._bell is not None
        return store.add_owner(inlet, self._pid, os.path.basename(self._live.path), self._bell.name)

    def _claimed(self, tap: Tap, result: Any, error: BaseException | None) -> None:
        if error is not None:
            self._claim_failed(tap, error)
            return
        owner, until, messages, due_at = result
        self.stands(tap, owner, until)
        if tap.failures:
            tap.failures = 0
            self._deliver(tap.loop, lambda result, error: tap.on_trouble(None), None, None)
        if not messages:
            tap.stirred, tap.due_at = False, due_at
            return
        assert tap.deliver is not None
        self._deliver(tap.loop, tap.deliver, messages, None)
        tap.deliver = None
        self._poll_every = _POLL[0]

    def stands(self, tap: Tap, owner: int, until: float) -> None:
        """Called on this thread after the commit: the tap's owner is `owner`, and what was before it is lost."""
        inlet = tap.inlet
        inlet.lease_until = until
        inlet.lapsed_since = None
        if inlet.owner != owner:
            lost, inlet.owner = inlet.owner, owner
            if lost:
                self._deliver(tap.loop, lambda result, error: tap.on_lost(lost), None, None)

    def _claim_failed(self, tap: Tap, error: BaseException) -> None:
        """Try again later what may mend itself; tell the receiver of what cannot."""
        if tap.deliver is None:
            return
        if isinstance(error, apsw.CorruptError | apsw.NotADBError) or not isinstance(error, apsw.Error):
            text = explain(error, self.path) if isinstance(error, apsw.Error) else repr(error)
            failure = TransportError(f"cannot receive: {text}")
            failure.__cause__ = error
            self._deliver(tap.loop, tap.deliver, None, failure)
            tap.deliver = None
            return
        delay = min(_RETRY[1], _RETRY[0] * 2**tap.failures) * random.uniform(0.5, 1.0)
        tap.failures = min(tap.failures + 1, 20)
        tap.stirred, tap.not_before = True, time.monotonic() + delay
        text = explain(error, self.path)
        self._deliver(tap.loop, lambda result, error: tap.on_trouble(text), None, None)

    # -- what happens without being asked

    def _look_around(self) -> None:
        """Hear the bell, look at the change counter when it is time, and see to the owners."""
        if not self._taps:
            return
        if self._bell is not None and self._bell.drain():
            self._stir()
        now = time.monotonic()
        try:
            if now >= self._poll_at and any(tap.deliver is not None for tap in self._taps):
                self._poll(now)
            if now >= self._upkeep_at:
                self._upkeep_at = now + min(1.0, self.lease / 3) * random.uniform(0.8, 1.0)
                self._upkeep()
        except apsw.Error as error:
            log.warning("cannot look after %s, and try again in a second: %s", self.path, error)

    def _stir(self) -> None:
        self._poll_every = _POLL[0]
        for tap in self._taps:
            tap.stirred = True

    def _poll(self, now: float) -> None:
        version = self._db.data_version()
        if version != self._seen:
            self._seen = version
            self._stir()
        else:
            self._poll_every = min(_POLL[1], self._poll_every * 1.5)
        self._poll_at = now + self._poll_every * random.uniform(0.8, 1.0)

    def _upkeep(self) -> None:
        """Take over what dead and hung owners hold, and see whether somebody took over from us."""
        store = self._store
        store.refresh()
        own = {tap.inlet.owner: tap for tap in self._taps}
        dead = [owner for owner in store.owners.values() if owner.id not in own and self._is_dead(owner.live)]
        lapsed = [owner for owner in store.lapsed(liveness.now()) if self._give_up_on(owner, own)]
        if dead or lapsed:
            self._take_over([owner.id for owner in dead], own)
            for name in {owner.bell for owner in dead}:
                forget(name)
            for name in {owner.live for owner in dead}:
                liveness.remove(os.path.join(os.path.dirname(self.path), name))
        for tap in self._taps:
            if tap.inlet.owner not in store.owners:
                self._stand_again(tap)

    def _is_dead(self, live: str) -> bool:
        return liveness.is_dead(os.path.join(os.path.dirname(self.path), live))

    def _give_up_on(self, owner: int, own: dict[int, Tap]) -> bool:
        """A lapsed owner of our own gets a moment more: after a stop of the whole process its renewer comes back too."""
        tap = own.get(owner)
        if tap is None:
            return True
        if tap.inlet.lapsed_since is None:
            tap.inlet.lapsed_since = time.monotonic()
            self._upkeep_at = min(self._upkeep_at, time.monotonic() + min(1.0, self.lease / 3))
            return False
        return time.monotonic() - tap.inlet.lapsed_since >= min(1.0, self.lease / 3)

    def _take_over(self, dead: list[int], own: dict[int, Tap]) -> None:
        def work(store: Store) -> None:
            lapsed = [owner for owner in store.lapsed(liveness.now()) if owner not in own or self._give_up_on(owner, own)]
            for owner in {*dead, *lapsed} & store.owners.keys():
                store.drop_owner(owner, counted=True)
                log.warning("took over what owner %d of %s held: it has died or hangs", owner, self.path)

        self._on_thread(work)

    def _stand_again(self, tap: Tap) -> None:
        def work(store: Store) -> None:
            self.stands(tap, *self._stand(tap, store))

        self._on_thread(work)
        tap.stirred = True

    def _on_thread(self, work: Callable[[Store], Any]) -> None:
        """A transaction of the thread's own; its error is raised here."""
        errors: list[BaseException] = []
        job = Job.__new__(Job)
        job.work, job.full, job.outside = work, False, False
        job.deliver = _OnThread(lambda result, error: errors.append(error) if error is not None else None)
        self._attempt([job], precise=True)
        if errors:
            raise errors[0]


class _OnThread:
    pass


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def settle_future(future: asyncio.Future[Any]) -> Deliver:
    """Hand a result to who waits, unless he has gone."""

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    return deliver
