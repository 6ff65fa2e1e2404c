"""What the crash tests share: processes that are killed by their pid and never left behind, and the ledger's reader."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from sluiceway import App
from tests.crash.actors import PARENT, TOPIC, VARIABLE, Config, Job

ROOT = Path(__file__).resolve().parents[2]
DEAD = f"{TOPIC}.default.dead"
PATIENCE = 30.0  # seconds: the most that any single step may take

# One group: two of these at once on two cores slow each other down. (pytest-xdist 3.8 does not group under
# pytest 9.2; they pass side by side, too.) A test that hangs fails by its own deadlines.
crash = [pytest.mark.crash, pytest.mark.slow, pytest.mark.xdist_group("crash")]


class Event(msgspec.Struct, frozen=True):
    """One line of the ledger."""

    pid: int
    at: float  # seconds, monotonic: the same clock in all processes
    event: str
    n: int
    attempt: int
    what: str


class Book:
    """The ledger, read from its beginning as it grows. It knows only what the processes wrote down."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("rb")
        self._rest = b""
        self.events: list[Event] = []

    def read(self) -> list[Event]:
        """Read what is new; returns that."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        new = [_event(line.decode()) for line in lines]
        self.events += new
        return new

    def all(self, *kinds: str) -> list[Event]:
        self.read()
        return [one for one in self.events if one.event in kinds]

    def numbers(self, kind: str) -> set[int]:
        return {one.n for one in self.all(kind)}

    def pids(self) -> list[int]:
        return [one.pid for one in self.all("up")]

    def accepted(self) -> dict[int, str]:
        """What publish returned for: number and id."""
        return {one.n: one.what for one in self.all("accept")}

    def starts(self) -> dict[int, list[Event]]:
        starts = defaultdict(list)
        for one in self.all("start"):
            starts[one.n].append(one)
        return starts

    def repeated(self) -> Counter[int]:
        """By pid: messages that it started and that were started again after that, by whomever."""
        return Counter(one.pid for events in self.starts().values() for one in events[:-1])

    def check_order(self, before: Callable[[int], int | None], dead: Iterable[int] = ()) -> None:
        """Every message was first started when the one `before` it had been handled, or dead-lettered; and while one of
        a key ran, no other of it did in another process, but for those that had died.
        """
        done, died = set(dead), self.died()
        running: dict[int, Event] = {}  # by number
        for one in self.all("start", "end"):
            previous = before(one.n)
            if one.event == "end":
                done.add(one.n)
                running.pop(one.n, None)
                continue
            assert previous is None or previous in done, f"{one.n} was started before {previous} was done: {one}"
            if previous in running:
                assert running[previous].pid in died, f"{one.n} was started while {previous} ran: {one}"
            running[one.n] = one

    def died(self) -> set[int]:
        """Processes that came up and did not end in good order."""
        return set(self.pids()) - {one.pid for one in self.all("down")}

    def close(self) -> None:
        self._file.close()


def _event(line: str) -> Event:
    pid, _, at, event, n, attempt, what = line.split(" ", 6)
    return Event(int(pid), int(at) / 1e9, event, int(n), int(attempt), what)


class Child:
    """One process in a session and process group of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd=ROOT,
                env={**os.environ, **environment},
            )  # fmt: skip
        self.pid = self.process.pid
        self.is_boss = "--workers" in command

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> float:
        """Send a signal to this very process; returns when."""
        self.process.send_signal(number)
        return time.monotonic()

    def kill(self) -> float:
        at = self.signal(signal.SIGKILL)
        assert self.process.wait(PATIENCE) == -signal.SIGKILL
        return at

    def clean_up(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole group: of `sluiceway run` there may be more
            os.killpg(self.pid, signal.SIGKILL)
        if self.running:
            self.process.kill()
            self.process.wait(PATIENCE)


class Site:
    """One test's folder, database, ledger and processes."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.db = folder / "jobs.db"
        self.book = Book(folder / "ledger")
        self.log = folder / "log"
        self.name = name
        seed = os.environ.get("SLUICEWAY_CRASH_SEED") or os.urandom(4).hex()
        self.random = random.Random(f"{seed} {name}")
        self.began = time.monotonic()
        self._children: list[Child] = []
        print(f"seed: SLUICEWAY_CRASH_SEED={seed}")

    # -- processes

    def config(self, **options: Any) -> Config:
        return Config(db=str(self.db), ledger=str(self.folder / "ledger"), **options)

    def start(self, *arguments: str, config: Config) -> Child:
        environment = {
            VARIABLE: msgspec.json.encode(config).decode(),
            PARENT: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONFAULTHANDLER": "1",
        }
        child = Child([sys.executable, "-m", *arguments], environment, self.log)
        self._children.append(child)
        return child

    def worker(self, **options: Any) -> Child:
        """A worker as a program of one's own: `await app.run()`."""
        return self.start("tests.crash.actors", "worker", config=self.config(**options))

    def publisher(self, **options: Any) -> Child:
        return self.start("tests.crash.actors", "publisher", config=self.config(**options))

    def command_line(self, *arguments: str, **options: Any) -> Child:
        """`sluiceway run`, whose workers are respawned by it."""
        return self.start(
            "sluiceway", "run", "tests.crash.actors:app", *arguments, "--log-level", "warning",
            config=self.config(**options),
        )  # fmt: skip

    def close(self) -> None:
        for child in self._children:
            child.clean_up()
        self.book.close()

    def end(self, *workers: Child) -> list[int]:
        """SIGTERM to workers that have come up; returns their exit codes."""
        for worker in workers:
            if not worker.is_boss:
                self.until("the worker is up", lambda worker=worker: worker.pid in self.book.pids())
            worker.signal(signal.SIGTERM)
        return [worker.process.wait(PATIENCE) for worker in workers]

    # -- waiting

    def until(self, what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Return what `condition` gives as soon as it is true. Fails with the end of the log after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {seconds:g} s; {self.state()}")
            time.sleep(0.004)
        return found

    def state(self) -> str:
        counts = Counter(one.event for one in self.book.all() or self.book.events)
        codes = [child.process.poll() for child in self._children]
        rows: object = None
        with contextlib.suppress(apsw.Error):
            rows = self.rows("SELECT queue_id, state, owner, topic, count(*) FROM queue GROUP BY 1, 2, 3, 4")
        log = self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""
        return f"ledger {dict(counts)}; exit codes {codes}; rows {rows}; end of the log:\n{log}"

    # -- the database, without the product

    def rows(self, sql: str, *bindings: Any) -> list[tuple[Any, ...]]:
        db = apsw.Connection(str(self.db), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            db.set_busy_timeout(5000)
            return db.execute(sql, bindings).fetchall()
        finally:
            db.close()

    def waiting(self) -> int:
        """Rows that are no dead letters, in whatever state."""
        return self.rows("SELECT count(*) FROM queue WHERE topic = ?", TOPIC)[0][0] if self.db.exists() else 0

    def dead(self) -> dict[int, list[dict[str, str]]]:
        """The headers of the dead letters, by number."""
        found = defaultdict(list)
        for body, headers in self.rows("SELECT body, headers FROM queue WHERE topic = ?", DEAD):
            found[msgspec.json.decode(body, type=Job).n].append(json.loads(headers))
        return found

    def stored(self, topic: str = TOPIC, after: int = 0) -> list[tuple[int, str]]:
        """Number and id of every message of the topic, from the `after`th one on."""
        rows = self.rows("SELECT body, id FROM queue WHERE topic = ? ORDER BY seq LIMIT -1 OFFSET ?", topic, after)
        return [(msgspec.json.decode(body, type=Job).n, id_) for body, id_ in rows]

    def check_file(self) -> None:
        assert self.rows("PRAGMA integrity_check") == [("ok",)]

    def load(self, jobs: Iterable[Job], key: str | None = None) -> dict[int, str]:
        """Publish jobs from here; returns number and id."""
        jobs = list(jobs)
        ids = App(self.config().url).publish_many_sync(TOPIC, jobs, key=lambda _: key)
        return {job.n: id_ for job, id_ in zip(jobs, ids, strict=True)}

    # -- telling

    def tell(self, **figures: Any) -> None:
        """Print what was measured; with SLUICEWAY_CRASH_REPORT=FILE also as a line of JSON there."""
        line = {"test": self.name, "seconds": round(time.monotonic() - self.began, 1), **figures}
        print(line)
        report = os.environ.get("SLUICEWAY_CRASH_REPORT")
        if report:
            with Path(report).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def opened(folder: Path, name: str) -> Iterator[Site]:
    site = Site(folder, name)
    try:
        yield site
    finally:
        site.close()
