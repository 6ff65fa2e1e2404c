"""Who is alive: a locked file per process, a clock that all processes share, and the renewal of leases.

A process that dies, however it dies, loses its file locks at that instant, so its deliveries come back at once and not
when its lease ends. The lease is for a process that lives and does nothing: stopped, or hung.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import TransportError
from .schema import open_database

_own: set[str] = set()
"""Liveness files of this process. POSIX drops all locks that a process has on a file as soon as it closes any
descriptor of it, and never refuses a process its own lock: a file in here must not be probed."""

os.register_at_fork(after_in_child=_own.clear)

_CLOCK = time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC


def now() -> float:
    """Seconds on the machine's steady clock, the same in all processes; it goes on while the machine is suspended."""
    return time.clock_gettime(_CLOCK)


def boot_id() -> str:
    """What tells this boot of the machine, whose clock began at 0, from the one before; empty where unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class LivenessFile:
    """`<database>-live-<nonce>`, locked for as long as this process lives or until `close()`.

    The lock is a POSIX record lock: a forked child does not inherit it, so it says nothing but that this very process
    lives. The file is empty.
    """

    def __init__(self, database: str, nonce: str) -> None:
        self.path = f"{database}-live-{nonce}"
        _own.add(self.path)  # before it exists: from then on no other transport of this process may touch it
        while True:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            try:
                if os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                    return
            except FileNotFoundError:
                pass  # another process saw it unlocked and swept it away: make it again
            os.close(self._fd)

    def close(self) -> None:
        """Remove the file and let go of the lock."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass  # somebody tidied up; the lock ends all the same
        os.close(self._fd)
        _own.discard(self.path)


def is_dead(path: str) -> bool:
    """Whether the process that locked the liveness file `path` has died. When nobody can say, it has not."""
    if path in _own:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # removed or not ours to read: its lease decides
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who probe do not take each other for the owner
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def sweep(database: str, known: set[str]) -> None:
    """Remove liveness files that no owner row names: of a process that died between making its file and its row."""
    folder, name = os.path.split(database)
    for entry in os.scandir(folder):
        if entry.name.startswith(f"{name}-live-") and entry.name not in known and is_dead(entry.path):
            remove(entry.path)


def remove(path: str) -> None:
    """Delete the file of a dead process. One that is gone already is no error."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


class SQLiteRenewer:
    """Renews the leases of a source's deliveries, on a connection of its own, from any thread or process.

    A lease belongs to the owner and covers all that it holds, so a renewal is one row however many tokens there are.
    Raises TransportError when the database cannot be opened or written; the leases are then as they were.
    """

    def __init__(self, path: str, lease: float) -> None:
        self._db = open_database(path, busy_timeout=lease / 3)
        self._lease = lease

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        """Set the leases of `tokens` to their full length from now; returns those that another consumer has."""
        lost = {owner for owner in {token[1] for token in tokens} if not self._renew(owner)}
        return [token for token in tokens if token[1] in lost] if lost else []

    def _renew(self, owner: int) -> bool:
        import apsw

        try:
            self._db.execute("UPDATE owners SET lease_until = ? WHERE id = ?", (now() + self._lease, owner))
        except apsw.Error as error:
            raise TransportError(f"cannot renew the lease of owner {owner}: {error}") from error
        return self._db.changes() == 1

    def close(self) -> None:
        self._db.close()


RenewerFactory = Callable[[], SQLiteRenewer]
