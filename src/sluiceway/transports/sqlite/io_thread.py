"""The I/O thread: the one place where a transport's SQL runs. Jobs that wait share one transaction, so that a hundred
publishers cost one fsync, and their results go to the event loop in one call."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

from ...errors import TransportError
from .jobs import Job, for_future
from .reception import Reception
from .schema import close_database, open_database
from .store import Mismatch, Store

log = logging.getLogger("sluiceway.sqlite")


class IOThread:
    """Owns the connection. The event loop uses `submit`, `call`, `run` and `stop`; the rest belongs to the thread.

    Raises ConnectError, from the constructor, when the database cannot be opened.
    """

    def __init__(self, path: str, *, lease: float, busy_timeout: float) -> None:
        self.path = path
        self._pid = os.getpid()
        self._jobs: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._asleep = False
        self._stopping = False
        self._broken: TransportError | None = None
        self._results: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._db = open_database(path, busy_timeout=busy_timeout)
        self._store = Store(self._db)
        self._full = True
        self.reception = Reception(self, self._store, Path(path), lease)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name=f"sluiceway-sqlite {Path(path).name}", daemon=True)
        self._thread.start()

    # -- for the event loop

    def submit(self, job: Job) -> None:
        """Queue a job. Raises TransportError when the transport is closed, has failed, or is of a parent process."""
        self._check()
        self._jobs.append(job)
        self._wake()

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread, before the jobs that wait. Raises as `submit` does."""
        self._check()
        self._calls.append(function)
        self._wake()

    async def run(self, work: Callable[[Store], Any], *, full: bool = False, reads: bool = False) -> Any:
        """Do `work` and return its result once it is committed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self.submit(Job(work, for_future(future), loop, full=full, reads=reads))
        return await future

    async def stop(self) -> None:
        """End the thread after what was submitted, and close all it owns. Idempotent; in a fork it does nothing."""
        if os.getpid() == self._pid:
            self._stopping = True
            self._wake()
            await asyncio.to_thread(self._thread.join)

    @property
    def usable(self) -> bool:
        """Whether `submit` and `call` would take something."""
        return os.getpid() == self._pid and self._broken is None and not self._stopping

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError(
                f"this SQLite transport was connected in process {self._pid} and is used in {os.getpid()}, a fork of "
                "it: SQLite's locks do not survive a fork; start processes with spawn or forkserver, or connect after "
                "the fork"
            )
        if self._broken is not None:
            raise self._broken
        if self._stopping:
            raise TransportError(f"the SQLite transport of {self.path} is closed; connect another one")

    def _wake(self) -> None:
        if self._asleep:
            self._asleep = False
            try:
                os.write(self._wake_write, b"1")
            except BlockingIOError:
                return  # it is full of wake-ups already

    # -- the thread

    def _run(self) -> None:
        try:
            while self._jobs or self._calls or not self._stopping:
                self._turn()
        except BaseException as error:  # a bug: nobody may wait for ever because of it
            log.exception("the I/O thread of %s failed; the transport must be connected anew", self.path)
            self._broken = TransportError(f"the I/O thread of the SQLite transport of {self.path} failed: {error!r}")
            self.reception.fail(self._broken)
            for job in self._jobs:
                self.deliver(job, None, self._broken)
            self._flush()
        finally:
            try:
                self.reception.close()
            finally:
                close_database(self._db)
                os.close(self._wake_read)
                os.close(self._wake_write)

    def _turn(self) -> None:
        self._sleep()
        while self._calls:
            self._calls.popleft()()
        jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
        writes = [job for job in jobs if not job.reads]
        for job in jobs:
            if job.reads:
                self._read(job)
        self.reception.look_around()
        writes += self.reception.claims(writing=bool(writes))
        if writes:
            self.transact(writes)
        self._flush()

    def _sleep(self) -> None:
        timeout = self.reception.timeout()
        if timeout is not None and timeout <= 0:
            return
        poll = select.poll()
        for fd in (self._wake_read, *self.reception.filenos()):
            poll.register(fd, select.POLLIN)
        self._asleep = True
        if not (self._jobs or self._calls or self._stopping):  # else it came before `_asleep` could be seen
            for fd, _ in poll.poll(None if timeout is None else timeout * 1000 + 1):
                if fd == self._wake_read:
                    os.read(fd, 4096)
        self._asleep = False

    def transact(self, jobs: list[Job], *, precise: bool = False) -> None:
        """Do all jobs in one transaction; when one fails, each in a transaction of its own."""
        try:
            self._begin(any(job.full for job in jobs))
        except apsw.Error as error:
            for job in jobs:
                self.deliver(job, None, error)
            return
        self._store.precise = precise
        try:
            self._store.routing.refresh()
            results = [job.work(self._store) for job in jobs]
            self._db.execute("COMMIT")
        except Exception as error:  # it goes to the one who waits for the job
            self._rollback()
            if len(jobs) == 1 and (precise or not isinstance(error, Mismatch)):
                self.deliver(jobs[0], None, error)
            else:
                for job in jobs:
                    self.transact([job], precise=True)
            return
        for job, result in zip(jobs, results, strict=True):
            self.deliver(job, result, None)
        if self._store.touched:
            self.reception.announce()

    def _begin(self, full: bool) -> None:
        if full != self._full:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
            self._full = full
        self._db.execute("BEGIN IMMEDIATE")

    def _rollback(self) -> None:
        self._store.forget()
        if self._db.in_transaction:  # a full disk or an I/O error may have ended it already
            self._db.execute("ROLLBACK")

    def _read(self, job: Job) -> None:
        try:
            self._store.routing.refresh()
            self.deliver(job, job.work(self._store), None)
        except Exception as error:  # it goes to the one who waits for the job
            self.deliver(job, None, error)

    def deliver(self, job: Job, result: Any, error: BaseException | None) -> None:
        """Tell who waits for `job`; calls to an event loop are gathered until the turn ends."""
        if job.loop is None:
            job.deliver(result, error)
        else:
            self.tell(job.loop, lambda: job.deliver(result, error))

    def tell(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have `call` run on `loop` when the turn ends."""
        self._results.setdefault(loop, []).append(call)

    def _flush(self) -> None:
        if self._results:
            results, self._results = self._results, {}
            for loop, calls in results.items():
                try:
                    loop.call_soon_threadsafe(_call_all, calls)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    continue


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
