"""A datagram socket per transport: whoever commits something rings, so that a sleeping receiver need not poll.

A ring is only a hint. It carries nothing, may be lost, and may come from anyone: a receiver that is rung looks into
the database, and one that is never rung looks there about once a second anyway.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path


class Doorbell:
    """The bell of one transport. `name` is how others ring it; it is kept in the database.

    On Linux the name is abstract (no file, no path too long for a socket address, gone with its process); elsewhere it
    is a socket file in the folder for temporary files.
    """

    def __init__(self, database: Path, nonce: str) -> None:
        short = f"sluiceway-{hashlib.sha256(os.fsencode(database)).hexdigest()[:16]}-{nonce}"
        self.name = f"@{short}" if sys.platform == "linux" else str(Path(tempfile.gettempdir(), short))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(_address(self.name))
        self.fileno = self._socket.fileno

    def drain(self) -> bool:
        """Take all rings that have come; returns whether there was one. Never waits."""
        rung = False
        while True:
            try:
                self._socket.recv(16)
            except BlockingIOError:
                return rung
            rung = True

    def ring(self, names: Iterable[str]) -> None:
        """Ring other transports. Never waits and never fails: who is not there or has a full queue needs no ring."""
        for name in names:
            try:
                self._socket.sendto(b"1", _address(name))
            except OSError:  # gone, full (so it is awake), or in another network namespace: its poll finds the message
                continue

    def close(self) -> None:
        self._socket.close()
        forget(self.name)


def forget(name: str) -> None:
    """Remove what a bell left on disk. One that is gone, or never was a file, is no error."""
    if not name.startswith("@"):
        try:
            Path(name).unlink(missing_ok=True)
        except OSError:  # another user's: harmless, and for the one who cleans the folder
            return


def _address(name: str) -> str:
    return "\0" + name[1:] if name.startswith("@") else name
