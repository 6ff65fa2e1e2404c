"""One cell's processes, each behind a proxy of its own, and its ledger and log. All has ended when the cell has."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import msgspec

from tests.servers.proxy import Proxy

from .actors import VARIABLE, Config, OnPurpose
from .broker import Broker
from .ledger import Book

ROOT = Path(__file__).parent.parent
_LINE = re.compile(r"^\S+ \S+ (worker|publisher) \d+ (WARNING|ERROR|CRITICAL) ([\w.]+): (.*)$")
_NUMBER = re.compile(r"\b\d[\d.,]*\b")


class Stuck(Exception):
    """Something that must happen did not, or in time; the text says what."""


class Actor:
    """A worker or a publisher: a process in a session of its own, and the proxy it speaks through, where one can be."""

    def __init__(self, site: Site, kind: str, config: Config, proxy: Proxy | None) -> None:
        self.kind = kind
        self.proxy = proxy
        environment = {VARIABLE: msgspec.json.encode(config).decode(), "PYTHONPATH": _path()}
        with site.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chaos.actors", kind], cwd=ROOT, env={**os.environ, **environment},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def clean_up(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(10)
        if self.proxy is not None:
            self.proxy.stop()


class Site:
    """The processes of one cell over one broker and one topic of its own."""

    def __init__(self, broker: Broker, folder: Path, topic: str, rate: float) -> None:
        self.broker = broker
        self.folder = folder
        self.topic = topic
        self.rate = rate
        self.book = Book(folder / "ledger")
        self.log_path = folder / "log"
        self.workers: list[Actor] = []
        self.publisher: Actor | None = None
        self._all: list[Actor] = []
        self._marked = 0

    def start(self, workers: int) -> None:
        """Start workers and then a publisher; returns when all are up."""
        for _ in range(workers):
            self.start_worker()
        self.until("the workers are up", lambda: len(self.book.pids) >= workers)
        self.publisher = self._start("publisher")
        self.until("the publisher is up", lambda: len(self.book.pids) > workers)

    def start_worker(self, *, skew: float = 0.0) -> Actor:
        """Start one more; `skew`: seconds by which its clock is ahead."""
        worker = self._start("worker", skew)
        self.workers.append(worker)
        return worker

    def _start(self, kind: str, skew: float = 0.0) -> Actor:
        port = self.broker.port
        proxy = None if port is None else Proxy(port).start()
        config = Config(
            url=self.broker.url(None if proxy is None else proxy.port),
            topic=self.topic, ledger=str(self.folder / "ledger"), parent=os.getpid(), rate=self.rate,
            ordered=self.broker.ordered, skew=skew,
        )  # fmt: skip
        actor = Actor(self, kind, config, proxy)
        self._all.append(actor)
        return actor

    def proxies(self) -> list[Proxy]:
        """Of all processes."""
        return [actor.proxy for actor in self._all if actor.proxy is not None]

    # -- waiting

    def until(self, what: str, condition: Callable[[], bool], seconds: float = 15.0) -> None:
        """Return as soon as `condition` is true. Raises Stuck after `seconds`, or when a process has ended."""
        deadline = time.monotonic() + seconds
        while True:
            self.book.read()
            if condition():
                return
            self.check_alive()
            if time.monotonic() > deadline:
                raise Stuck(f"not within {seconds:g} s: {what}")
            time.sleep(0.01)

    def wait(self, seconds: float) -> None:
        """Let it go on for so long. Raises Stuck when a process has ended meanwhile."""
        until = time.monotonic() + seconds
        self.until("time passes", lambda: time.monotonic() >= until, seconds + 1)

    def check_alive(self) -> None:
        for actor in (*self.workers, *([self.publisher] if self.publisher is not None else [])):
            code = actor.process.poll()
            if code is not None:
                raise Stuck(f"a {actor.kind} ended by itself with exit code {code}: {self.last_words()}")

    def end_publisher(self, seconds: float = 15.0) -> None:
        """Let the publisher finish what it has begun. Raises Stuck when it cannot."""
        if self.publisher is not None:
            publisher, self.publisher = self.publisher, None
            publisher.signal(signal.SIGTERM)
            self._await_end(publisher, seconds)

    def until_up(self) -> None:
        """Wait for all workers. Raises Stuck when one does not come up."""
        self.until("all workers are up", lambda: {worker.pid for worker in self.workers} <= set(self.book.pids))

    def end_workers(self, workers: Sequence[Actor] | None = None, seconds: float = 10.0) -> None:
        """Drain these workers, or all. Raises Stuck when one does not end in good order."""
        self.until_up()
        workers = list(self.workers if workers is None else workers)
        for worker in workers:
            self.workers.remove(worker)
            worker.signal(signal.SIGTERM)
        for worker in workers:
            self._await_end(worker, seconds)

    def _await_end(self, actor: Actor, seconds: float) -> None:
        try:
            code = actor.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Stuck(f"a {actor.kind} did not end within {seconds:g} s of SIGTERM") from None
        if code:
            raise Stuck(f"a {actor.kind} ended with exit code {code}: {self.last_words()}")
        self.book.read()

    # -- the log

    def mark(self) -> None:
        """What is logged from here on is what the fault brought about."""
        self._marked = self.log_path.stat().st_size

    def said(self) -> list[str]:
        """Each warning and error that Sluiceway logged since the mark, once: lines that differ in numbers are one."""
        text = self.log_path.read_bytes()[self._marked :].decode(errors="replace")
        found: dict[str, str] = {}
        for line in text.splitlines():
            match = _LINE.match(line)
            if match is not None and match[3].startswith("sluiceway") and OnPurpose.__name__ not in match[4]:
                found.setdefault(_NUMBER.sub("#", match[4]), match[4])
        return list(found.values())

    def last_words(self) -> str:
        """The end of the log."""
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "(it logged nothing)"

    # -- its life

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as ends:
            for actor in self._all:
                ends.callback(actor.clean_up)
        self.book.read()
        self.book.close()


@contextlib.contextmanager
def opened(broker: Broker, folder: Path, topic: str, rate: float) -> Iterator[Site]:
    folder.mkdir(parents=True, exist_ok=True)
    with Site(broker, folder, topic, rate) as site:
        yield site


def _path() -> str:
    return os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
