"""The renewal of leases, from a thread or process that no handler can block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw

from ...errors import TransportError
from . import liveness
from .schema import close_database, explain, open_database


class SQLiteRenewer:
    """Renews the leases of a source's deliveries on a connection of its own.

    A lease belongs to the owner and covers all that it holds, so a renewal is one row however many tokens there are.
    `lease`: seconds; a third of it is the longest that a call waits for another process's transaction. Raises
    ConnectError when the database cannot be opened.
    """

    def __init__(self, path: str, lease: float) -> None:
        self._path = path
        self._lease = lease
        self._db = open_database(path, busy_timeout=lease / 3)
        self._db.execute("PRAGMA synchronous = NORMAL")

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        """Set the leases of `tokens` to their full length from now; returns those that are lost, for good.

        Raises TransportError when the database takes nothing now; the leases are then as they were.
        """
        try:
            lost = {owner for owner in {token[1] for token in tokens} if not self._renew(owner)}
        except apsw.Error as error:
            raise TransportError(f"cannot renew leases: {explain(error, self._path)}") from error
        return [token for token in tokens if token[1] in lost] if lost else []

    def _renew(self, owner: int) -> bool:
        self._db.execute("UPDATE owners SET lease_until = ? WHERE id = ?", (liveness.now() + self._lease, owner))
        return self._db.changes() == 1

    def close(self) -> None:
        """Close the connection. Idempotent."""
        close_database(self._db)
