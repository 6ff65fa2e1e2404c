"""The ledger: a file in which the processes of a cell write down what they do. It owes nothing to the product."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct


class Ledger:
    """Writes one line per event, `pid nanoseconds event n what`, each in one write at the end of the file.

    The kernel has a line as soon as `os.write` returns, so no SIGKILL takes it back.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def note(self, event: str, n: int = -1, what: str = "-") -> None:
        os.write(self._file, f"{os.getpid()} {time.monotonic_ns()} {event} {n} {what}\n".encode())


class Event(Struct, frozen=True):
    """One line. `at` is in seconds, by the clock that all processes share."""

    pid: int
    at: float
    event: str
    n: int
    what: str


class Book:
    """The ledger, read as it grows, and what it says of each message.

    `offer`: a publish of it began; `accept`: one returned, so from then on it must not be lost; `refuse`: one raised;
    `start` and `end`: a handler was entered and has done its work; `fail`: it raised on purpose.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("rb")
        self._rest = b""
        self.pids: list[int] = []  # of the actors that came up, in order
        self.offers: Counter[int] = Counter()
        self.offered: dict[int, float] = {}  # when last
        self.accepted: dict[int, float] = {}  # when first
        self.refused: Counter[str] = Counter()  # by the name of the error
        self.starts: Counter[int] = Counter()
        self.started: dict[int, float] = {}  # when first
        self.running: Counter[int] = Counter()  # handlers, by pid
        self.failed: Counter[int] = Counter()  # on purpose
        self.ended: dict[int, float] = {}  # when first

    def read(self) -> None:
        """Read what is new."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            pid, at, event, n, what = line.decode().split(" ", 4)
            self._take(Event(int(pid), int(at) / 1e9, event, int(n), what))

    def _take(self, one: Event) -> None:
        match one.event:
            case "up":
                self.pids.append(one.pid)
            case "offer":
                self.offers[one.n] += 1
                self.offered[one.n] = one.at
            case "accept":
                self.accepted.setdefault(one.n, one.at)
            case "refuse":
                self.refused[one.what] += 1
            case "start":
                self.started.setdefault(one.n, one.at)
                self.starts[one.n] += 1
                self.running[one.pid] += 1
            case "fail":
                self.running[one.pid] -= 1
                self.failed[one.n] += 1
            case "end":
                self.running[one.pid] -= 1
                self.ended.setdefault(one.n, one.at)

    def repeated(self) -> int:
        """How many times a message was started once more than it was offered for, or had to be since it failed.

        What a publisher offered again, since it never heard whether the first was accepted, may be there twice.
        """
        return sum(max(0, times - self._expected(n)) for n, times in self.starts.items())

    def _expected(self, n: int) -> int:
        offers = max(1, self.offers[n])
        return offers + min(offers, self.failed[n])

    def overtaken(self, key_of: Callable[[int], str]) -> int:
        """How many messages were begun before an earlier one of their key had ended.

        What was offered again is left out: nobody knows when it was accepted.
        """
        last: dict[str, float] = {}
        count = 0
        for n in sorted(n for n in self.ended if self.offers[n] == 1):
            key = key_of(n)
            count += self.started[n] < last.get(key, 0.0)
            last[key] = max(self.ended[n], last.get(key, 0.0))
        return count

    def missing(self) -> set[int]:
        """What was accepted and not handled."""
        return self.accepted.keys() - self.ended.keys()

    def new_since(self, at: float) -> float | None:
        """When first a message ended that nobody had started before `at`."""
        return min((when for n, when in self.ended.items() if self.started[n] > at), default=None)

    def caught_up(self, at: float) -> float:
        """When all had ended that was accepted before `at`; inf when that is yet to come."""
        return max((self.ended.get(n, float("inf")) for n, when in self.accepted.items() if when <= at), default=at)

    def close(self) -> None:
        self._file.close()
