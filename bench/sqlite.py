"""Messages/s over one SQLite file, against a loop written by hand over the same table."""

from __future__ import annotations

import os
import shutil
from array import array
from pathlib import Path
from time import perf_counter
from typing import cast

import apsw

from sluiceway import App, Message, Pause

from . import together
from .child import Job, pin, unpin
from .memory import PLAIN, TUNED
from .pairs import Case, Figure
from .payload import Order, decode, handle, order
from .watch import Watch, handed_out

COUNT = 60_000
CHUNK = 1_000  # messages per publish
CLAIM = 100  # messages per turn of the hand-written loop
FULL = "full.db"


def consumer(path: Path, *, closed: bool = True) -> tuple[App, Pause]:
    """The app under test: typed decode, a handler that does nothing, ack after it. It does not start by itself."""
    app, gate = App(f"sqlite:///{path}"), Pause()
    if closed:
        gate.close()

    @app.consumer("orders", concurrency=10, gates=[gate])
    async def consume(message: Message[Order]) -> None:
        return

    return app, gate


async def fill(folder: str, scale: float) -> dict[str, float]:
    """Publish what all measures of the case start from. The group exists, so the messages wait in its queue."""
    app, _ = consumer(Path(folder) / FULL)
    count = int(COUNT * scale)
    async with app.running():
        for start in range(0, count, CHUNK):
            await app.publish_many("orders", map(order, range(start, min(count, start + CHUNK))))
    return {"rate": 0.0}


def copied(folder: str) -> Path:
    """A copy of the filled file, on disk, for one measure."""
    path = Path(folder) / f"copy-{os.getpid()}.db"
    shutil.copyfile(Path(folder) / FULL, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path


async def ours(folder: str, scale: float) -> dict[str, float]:
    """A consumer takes everything that waits."""
    path = copied(folder)
    app, gate = consumer(path)
    count = int(COUNT * scale)
    async with app.running():
        watch = Watch(app)
        with watch.sampling(handed_out(path)):
            began = perf_counter()
            gate.open()
            await watch.until(count)
            elapsed = perf_counter() - began
    return {"rate": count / elapsed, "window": watch.largest_window}


def by_hand(folder: str, scale: float) -> dict[str, float]:
    """What one writes by hand and well: 100 at a time, done ones deleted and the next claimed in one transaction."""
    path = copied(folder)
    db = apsw.Connection(str(path))
    db.execute("PRAGMA journal_mode = WAL; PRAGMA mmap_size = 0; PRAGMA journal_size_limit = 67108864").fetchall()
    db.execute("PRAGMA synchronous = NORMAL").fetchall()
    queue = db.execute("SELECT id FROM queues WHERE pattern = 'orders'").fetchall()[0][0]
    execute = db.execute
    select = f"SELECT seq, body FROM queue WHERE queue_id = ? AND state = 0 ORDER BY seq LIMIT {CLAIM}"
    claim = "UPDATE queue SET state = 2, owner = 1, deliveries = deliveries + 1 WHERE seq IN carray(?)"
    count, handled = int(COUNT * scale), 0
    done = array("q")
    began = perf_counter()
    while True:
        execute("BEGIN IMMEDIATE")
        if done:
            execute("DELETE FROM queue WHERE seq IN carray(?)", (apsw.carray(done),))
        rows = cast("list[tuple[int, bytes]]", execute(select, (queue,)).fetchall())
        done = array("q", [seq for seq, _ in rows])
        if done:
            execute(claim, (apsw.carray(done),))
        execute("COMMIT")
        if not done:
            break
        for _, body in rows:
            handle(decode(body))
        handled += len(rows)
    elapsed = perf_counter() - began
    db.close()
    path.unlink()
    assert handled == count, (handled, count)
    return {"rate": count / elapsed}


# -- several processes -----------------------------------------------------------------------------------------------


def shared(folder: str, scale: float, processes: int, cores: int) -> dict[str, float]:
    """Some processes take everything that waits in one file."""
    unpin()
    path = copied(folder)
    count = int(COUNT * scale)
    given = [{"path": str(path), "core": number % cores - 1, "count": count} for number in range(processes)]
    return {"rate": together.rate("bench.sqlite:worker", given, count)}


async def worker(path: str, core: int, count: int) -> dict[str, float]:
    pin(core)
    return await together.work(*consumer(Path(path)), count)


# -- publishing ------------------------------------------------------------------------------------------------------


async def publish(folder: str, scale: float, chunk: int) -> dict[str, float]:
    """Publish to a group that waits, `chunk` messages per call; each call is on disk when it returns."""
    app, _ = consumer(Path(folder) / f"publish-{os.getpid()}.db")
    count = int((COUNT if chunk > 1 else COUNT // 30) * scale) // chunk * chunk or chunk
    orders = [order(number) for number in range(count)]
    async with app.running():
        began = perf_counter()
        if chunk == 1:
            for one in orders:
                await app.publish("orders", one)
        else:
            for start in range(0, count, chunk):
                await app.publish_many("orders", orders[start : start + chunk])
        return {"rate": count / (perf_counter() - began)}


FILL = Job("bench.sqlite:fill", limit=120)


def _consume(*, tuned: bool) -> Case:
    figure = Figure(f"SQLite, typed 200-byte JSON, {TUNED if tuned else PLAIN}", least=0.8 if tuned else None)
    jobs = (Job("bench.sqlite:ours", tuned=tuned), Job("bench.sqlite:by_hand", tuned=tuned))
    return Case((figure,), *jobs, prepare=FILL, folder=True)


def _shared(name: str, cores: int, *, least: float | None) -> Case:
    two, one = (Job("bench.sqlite:shared", {"processes": number, "cores": cores}, pinned=False) for number in (2, 1))
    return Case((Figure(f"SQLite, two processes on one file, {name}", least=least),), two, one, FILL, folder=True)


def _publish(name: str, chunk: int) -> Case:
    figure = Figure(f"SQLite, publish {name}, on disk when it returns")
    return Case((figure,), Job("bench.sqlite:publish", {"chunk": chunk}), folder=True)


CASES = [
    _consume(tuned=True),
    _consume(tuned=False),
    _shared("a core each", 2, least=0.9),
    _shared("one core", 1, least=None),
    _publish("1,000 at a time", 1000),
    _publish("100 at a time", 100),
    _publish("one at a time", 1),
]
