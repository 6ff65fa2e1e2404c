"""Who is alive: a locked file per transport, and a clock that all processes share.

A process that dies, however it dies, loses its file locks at that instant, so its deliveries come back at once and not
when its lease ends. The lease is for a process that lives and does nothing: stopped, or hung.
"""

from __future__ import annotations

import fcntl
import os
import time
from functools import lru_cache
from pathlib import Path

_own: set[Path] = set()
"""Liveness files of this process. POSIX drops all locks that a process has on a file as soon as it closes any
descriptor of it, and never refuses a process its own lock: a file in here must not be probed."""

os.register_at_fork(after_in_child=_own.clear)

now = time.monotonic
"""Seconds on the machine's steady clock, the same in all its processes. It stands still while the machine is suspended,
and so do the leases."""


@lru_cache
def boot_id() -> str:
    """What tells this boot of the machine, whose clock began at 0, from the one before; empty where unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class LivenessFile:
    """`<database>-live-<nonce>`, locked for as long as this process lives or until `release()`. It is empty.

    The lock is a POSIX record lock: a forked child does not inherit it, so it says nothing but that this very process
    lives. Raises OSError when the file cannot be made.
    """

    def __init__(self, database: Path, nonce: str) -> None:
        self.path = database.with_name(f"{database.name}-live-{nonce}")
        _own.add(self.path)  # before it exists: from then on no other transport of this process may touch it
        try:
            self._fd = self._make()
        except OSError:
            _own.discard(self.path)
            raise

    def _make(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.lockf(fd, fcntl.LOCK_EX)
            try:
                if os.path.samestat(os.fstat(fd), self.path.stat()):
                    return fd
            except FileNotFoundError:
                pass  # another process saw it before it was locked, and swept it away: make it again
            os.close(fd)

    def release(self) -> None:
        """Let go of the lock: from now on this looks like the file of a dead process."""
        os.close(self._fd)
        _own.discard(self.path)


def is_dead(path: Path) -> bool:
    """Whether the process that locked the liveness file `path` has died. When nobody can say, it has not."""
    if path in _own:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # removed, or not ours to read: its lease decides
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who probe do not take each other for the owner
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def sweep(database: Path, known: set[str]) -> None:
    """Remove liveness files that no owner row names: of a process that died between making its file and its row."""
    for path in database.parent.iterdir():
        if path.name.startswith(f"{database.name}-live-") and path.name not in known and is_dead(path):
            remove(path)


def remove(path: Path) -> None:
    """Delete the file of a dead process; when that is not allowed it stays, and does no harm."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
