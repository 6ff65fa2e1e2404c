"""A store in a SQLite file, for the processes of one machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apsw

from ...errors import OptionError
from .._checks import is_seconds
from .store import Claim

SWEEP = 60.0  # seconds between two looks for keys that have run out
SWEPT = 1_000  # keys forgotten in one look, so that no call waits long

_SCHEMA = """
CREATE TABLE IF NOT EXISTS idempotency (key TEXT PRIMARY KEY, token TEXT NOT NULL, expires REAL NOT NULL, result BLOB)
WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS idempotency_by_expires ON idempotency (expires);
"""
_CLAIM = """
INSERT INTO idempotency (key, token, expires) VALUES (:key, :token, :now + :seconds)
ON CONFLICT (key) DO UPDATE SET token = :token, expires = :now + :seconds, result = NULL WHERE expires <= :now
"""
_DONE = """
INSERT INTO idempotency (key, token, expires, result) VALUES (:key, :token, :now + :seconds, :result)
ON CONFLICT (key) DO UPDATE SET expires = :now + :seconds, result = :result WHERE token = :token AND result IS NULL
"""
_LOOK = "SELECT result FROM idempotency WHERE key = :key"
_RENEW = "UPDATE idempotency SET expires = :now + :seconds WHERE key = :key AND token = :token AND result IS NULL"
_RELEASE = "DELETE FROM idempotency WHERE key = :key AND token = :token AND result IS NULL"
_FORGET = "DELETE FROM idempotency WHERE key IN (SELECT key FROM idempotency WHERE expires <= :now LIMIT :count)"


def _named(path: Any) -> str:
    with contextlib.suppress(TypeError):
        name = os.fspath(path)
        if isinstance(name, str) and name:  # with no name SQLite would open a file that it deletes at the end
            return name
    raise OptionError(f"SQLiteStore: path must name a file, like 'idempotency.db'; got {path!r}")


class SQLiteStore:
    """Keeps keys in the SQLite file `path`, which any number of processes of one machine may share.

    The file is its own: not the broker's. It is opened at the first call and used from one thread. `busy_timeout` is
    how many seconds a call waits for another process's write. What was written survives the death of a process; a power
    failure may undo the last moments. Keys that have run out are forgotten, a thousand a minute at most.

    Raises OptionError for what is no path or no time.
    """

    def __init__(self, path: str | os.PathLike[str] = "idempotency.db", *, busy_timeout: float = 10.0) -> None:
        if not is_seconds(busy_timeout):
            raise OptionError(f"SQLiteStore: busy_timeout must be seconds, more than 0; got {busy_timeout!r}")
        self.path = _named(path)
        self._busy_timeout = busy_timeout
        self._connection: apsw.Connection | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._sweep_at = 0.0

    async def claim(self, key: str, token: str, lease: float) -> Claim:
        claim: Claim = await self._call(self._claim, {"key": key, "token": token, "seconds": lease})
        return claim

    async def renew(self, key: str, token: str, lease: float) -> bool:
        return bool(await self._call(self._write, _RENEW, {"key": key, "token": token, "seconds": lease}))

    async def done(self, key: str, token: str, result: bytes, ttl: float) -> bool:
        bindings = {"key": key, "token": token, "seconds": ttl, "result": result}
        return bool(await self._call(self._write, _DONE, bindings))

    async def release(self, key: str, token: str) -> None:
        await self._call(self._write, _RELEASE, {"key": key, "token": token})

    async def aclose(self) -> None:
        """Close the file. Idempotent; a later call opens it again."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(thread, self._close)
            thread.shutdown()

    async def __aenter__(self) -> SQLiteStore:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._thread is None:  # one thread: calls reach the file in the order in which they were made
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="idempotency")
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # -- on the thread -------------------------------------------------------------------------------------------

    def _open(self) -> apsw.Connection:
        if self._connection is None:
            connection = apsw.Connection(self.path)
            connection.set_busy_timeout(round(self._busy_timeout * 1000))
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(_SCHEMA)
            self._connection = connection
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _claim(self, bindings: dict[str, Any]) -> Claim:
        self._sweep()
        if self._write(_CLAIM, bindings):
            return Claim("claimed")
        row = self._open().execute(_LOOK, bindings).fetchone()
        if row is None or row[0] is None:  # None: it was released or forgotten this very moment
            return Claim("busy")
        return Claim("done", row[0])

    def _write(self, statement: str, bindings: dict[str, Any]) -> bool:
        connection = self._open()
        connection.execute(statement, {**bindings, "now": time.time()})
        return connection.changes() > 0

    def _sweep(self) -> None:
        now = time.monotonic()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP
            self._write(_FORGET, {"count": SWEPT})
