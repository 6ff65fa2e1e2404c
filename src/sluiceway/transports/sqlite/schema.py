"""The file: what it holds, how it is opened, and what is said when it cannot be."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import apsw

from ...errors import ConnectError

APPLICATION_ID = 0x536C7569  # "Slui"
SCHEMA_VERSION = 1

FRESH, RETRYING, CLAIMED, SCHEDULED, BACK, PARKED = 0, 1, 2, 3, 4, 6
"""States of a row. The odd ones wait for `due_at`: `state & 1` is the term of their index."""

UNASSIGNED = 0
"""The queue of messages that no group has asked for yet, dead letters among them."""

# A queue is read like a log: `queues.head` is the last fresh row that was claimed, and one row of `claims` says who
# claimed a run of them. So the first delivery of a message, which is nearly always the only one, changes no row of it:
# half the work and two thirds of the log of a claim that marks every row. What comes back from a consumer, or waited
# for its time, is BACK, and from then on claimed one by one.
#
# Columns that change come first: an update then need not read over the body to find them. AUTOINCREMENT never gives a
# number twice, so a token (seq, owner) can never mean another message. STRICT refuses a body that is not bytes.
_SCHEMA = """
CREATE TABLE queue(
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  queue_id INTEGER NOT NULL,
  state INTEGER NOT NULL DEFAULT 0,         -- 0 fresh, 1 comes again later, 2 claimed, 3 published with a delay,
                                            -- 4 came back, 6 waits for an earlier message of its key
  due_at REAL,                              -- wall clock, of states 1 and 3
  owner INTEGER,                            -- of state 2
  deliveries INTEGER NOT NULL DEFAULT 0,    -- hand-overs that ended, without releases
  failures INTEGER NOT NULL DEFAULT 0,
  suspicions INTEGER NOT NULL DEFAULT 0,
  direct INTEGER NOT NULL DEFAULT 0,        -- 1: published to this group alone
  topic TEXT NOT NULL,
  id ANY NOT NULL,                          -- a blob when it is no valid UTF-8
  key ANY,
  headers TEXT,                             -- JSON, NULL for none
  timestamp REAL NOT NULL,
  body BLOB NOT NULL
) STRICT;
CREATE INDEX fresh ON queue(queue_id) WHERE state = 0;
CREATE INDEX waiting ON queue(queue_id, due_at) WHERE state & 1;
CREATE INDEX claimed ON queue(owner) WHERE state = 2;
CREATE INDEX back ON queue(queue_id) WHERE state = 4;
CREATE INDEX parked ON queue(queue_id) WHERE state = 6;
CREATE INDEX unassigned ON queue(topic) WHERE queue_id = 0;
CREATE TABLE claims(
  owner INTEGER NOT NULL,
  queue_id INTEGER NOT NULL,
  first INTEGER NOT NULL,                   -- every fresh row of the queue from this seq
  last INTEGER NOT NULL,                    -- to this one is the owner's
  PRIMARY KEY (owner, queue_id, first)
) STRICT, WITHOUT ROWID;
CREATE TABLE queues(
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  grp TEXT NOT NULL,
  pattern TEXT NOT NULL,
  implied INTEGER NOT NULL,                 -- 1: made by a message to the group, not by a subscription
  head INTEGER NOT NULL DEFAULT 0,          -- fresh rows up to this seq are claimed
  UNIQUE (grp, pattern)
) STRICT;
CREATE TABLE owners(
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  pid INTEGER NOT NULL,
  boot_id TEXT NOT NULL,
  lease_until REAL NOT NULL,                -- the machine's steady clock
  live TEXT NOT NULL,                       -- name of the locked file beside the database
  bell TEXT NOT NULL,
  queue_ids TEXT NOT NULL,                  -- JSON
  ordered INTEGER NOT NULL
) STRICT;
CREATE TABLE routing(version INTEGER NOT NULL) STRICT;  -- grows with every change to queues and owners
INSERT INTO routing VALUES (1);
"""

HELD_INDEX = "CREATE INDEX IF NOT EXISTS held ON queue(queue_id, key, state, owner) WHERE state > 0"
"""Only `order_by` needs it, so it is made when first asked for."""

_MAX_WAL = 64 * 1024 * 1024


_open: dict[apsw.Connection, tuple[int, str]] = {}
"""Connections and the process and file they belong to. A forked child inherits them, with SQLite's belief in locks that
the child does not have; it must neither use nor close them, nor open the same file beside them."""


def open_database(path: str, *, busy_timeout: float) -> apsw.Connection:
    """Open the database at `path`, and make it when there is none.

    `busy_timeout`: seconds to wait for other processes' transactions. Raises ConnectError that says what is wrong with
    the file and what to do.
    """
    _check_fork(path)
    _check_place(path)
    try:
        db = apsw.Connection(path)
        try:
            _wait_when_busy(db, busy_timeout)
            _check_ours(db, path)
            _prepare(db)
        except BaseException:
            db.close()
            raise
    except apsw.Error as error:
        raise ConnectError(explain(error, path)) from error
    _open[db] = os.getpid(), path
    return db


def close_database(db: apsw.Connection) -> None:
    """Close what `open_database` opened. Idempotent."""
    db.close()
    _open.pop(db, None)


def _check_fork(path: str) -> None:
    pid = os.getpid()
    for other, opened in list(_open.values()):
        if other != pid and opened == path:
            raise ConnectError(
                f"cannot open the SQLite database {path} in process {pid}: it was forked from process {other} while "
                "that had the database open, and SQLite's locks do not survive a fork; start processes with spawn or "
                "forkserver, or fork before connecting"
            )


def _check_place(path: str) -> None:
    """Raise ConnectError when `path` cannot be a database because of the folder, or because it is one."""
    folder = Path(path).parent
    if Path(path).is_dir():
        raise ConnectError(f"cannot open the SQLite database {path}: it is a folder; name a file in it")
    if not folder.is_dir():
        raise ConnectError(f"cannot open the SQLite database {path}: there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConnectError(
            f"cannot open the SQLite database {path}: the folder {folder} is not writable for this user, and SQLite "
            "keeps its log beside the database; change the folder's owner or mode, or use another folder"
        )
    if Path(path).exists() and not os.access(path, os.R_OK | os.W_OK):
        raise ConnectError(
            f"cannot open the SQLite database {path}: this user may not read and write it; change its owner or mode"
        )


def _wait_when_busy(db: apsw.Connection, seconds: float) -> None:
    """Let `db` wait up to `seconds` for a lock.

    SQLite's own handler sleeps up to 100 ms at a time, which leaves the file idle between two processes that take
    turns; transactions here last about a millisecond, so this one asks again after a fraction of that.
    """
    deadline = 0.0

    def again(tries: int) -> bool:
        nonlocal deadline
        if tries == 0:
            deadline = time.monotonic() + seconds
        elif time.monotonic() >= deadline:
            return False
        time.sleep(random.uniform(0.0001, 0.0003) if tries < 1000 else random.uniform(0.001, 0.005))
        return True

    db.set_busy_handler(again)


def _check_ours(db: apsw.Connection, path: str) -> None:
    application, version = _number(db, "PRAGMA application_id"), _number(db, "PRAGMA user_version")
    tables = _number(db, "SELECT count(*) FROM sqlite_schema")
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        raise ConnectError(
            f"the SQLite database {path} has schema version {version}, and this Sluiceway knows versions up to "
            f"{SCHEMA_VERSION}: a newer Sluiceway made it; upgrade this one, or use another file"
        )
    if application != APPLICATION_ID and (application or version or tables):
        raise ConnectError(
            f"the SQLite database {path} belongs to another program (application id {application:#x}, {tables} tables "
            f"and indexes; Sluiceway's is {APPLICATION_ID:#x}); it was left as it is: use another file"
        )


def _number(db: apsw.Connection, sql: str) -> int:
    row: Any = db.execute(sql).fetchone()
    return int(row[0])


def _prepare(db: apsw.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL").fetchall()
    db.execute(f"PRAGMA mmap_size = 0; PRAGMA journal_size_limit = {_MAX_WAL}; PRAGMA synchronous = FULL").fetchall()
    if _number(db, "PRAGMA user_version") == 0:
        db.execute("BEGIN IMMEDIATE")
        try:
            if _number(db, "PRAGMA user_version") == 0:  # else another process was faster
                db.execute(_SCHEMA)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise


def explain(error: apsw.Error, path: str) -> str:
    """What went wrong with the file and what to do, for a person."""
    match error:
        case apsw.NotADBError():
            return f"{path} is not a SQLite database (or it is encrypted); it was left as it is: use another file"
        case apsw.CorruptError():
            return (
                f"the SQLite database {path} is damaged ({error}); stop all processes that use it, keep a copy with "
                f"its -wal file, and save what can be read with: sqlite3 {path} .recover"
            )
        case apsw.FullError():
            return f"the disk that holds the SQLite database {path} is full; make room, nothing stored was lost"
        case apsw.BusyError():
            return (
                f"the SQLite database {path} was locked by another process for the whole of the busy timeout; look "
                "for one that is stopped or has a transaction open in it"
            )
        case apsw.CantOpenError() | apsw.ReadOnlyError():
            return (
                f"cannot open or write the SQLite database {path} ({error}); the file, its -wal and -shm files and "
                "their folder must be writable for this user, and the disk must not be mounted read-only"
            )
    return f"the SQLite database {path} reports: {error}"
