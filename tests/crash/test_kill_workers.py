"""SIGKILL of workers at random instants: nothing is lost, little is repeated, and the work goes on."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from tests.crash.actors import OUTPUT, Job
from tests.crash.kit import Child, Site, crash

pytestmark = crash

BACK = 5.0  # seconds until somebody handles something new
PLAIN = {"concurrency": 10, "max_demand": 20, "work": (0.005, 0.05)}
BATCHES = {**PLAIN, "concurrency": 5, "batch": 10, "max_demand": 25, "batch_work": 0.005}
THREADS = {**PLAIN, "mode": "thread"}
OUTPUTS = {**PLAIN, "outputs": True}
STREAM = {"pause": 0.002}
BACKLOG = 1_500  # so that windows are full whenever somebody dies


class Killer:
    """Kills workers of a site and keeps count. Everything it checks is in the ledger."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.killed: list[int] = []
        self.recoveries: list[float] = []

    def wait_for_work(self, pid: int) -> None:
        """A worker that has not begun anything is no victim worth its kill."""
        book = self.site.book
        begun = any(one.pid == pid and one.event == "start" for one in reversed(book.events))
        self.site.until(
            f"worker {pid} starts a message",
            lambda: begun or any(one.pid == pid and one.event == "start" for one in book.read()),
        )

    def at_a_random_instant(self) -> None:
        """Let the stream go on for a random while."""
        until = time.monotonic() + self.site.random.uniform(0.0, 0.25)
        self.site.until("a random instant", lambda: time.monotonic() >= until)

    def kill(self, *pids: int) -> float:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        at = time.monotonic()
        self.killed += pids
        return at

    def wait_for_recovery(self, at: float) -> None:
        """Until a message that nobody had begun before `at` was handled."""
        book = self.site.book
        book.read()
        old = {one.n for one in book.events if one.event == "start" and one.at <= at}
        new: set[int] = set()
        unread = [one for one in book.events if one.at > at]

        def something_new() -> float | None:
            for one in (*unread, *book.read()):
                if one.event == "start" and one.at > at and one.n not in old:
                    new.add(one.n)
                elif one.event == "end" and one.n in new:
                    return one.at
            unread.clear()
            return None

        self.recoveries.append(self.site.until("somebody handles something new", something_new, BACK) - at)

    def check(self, window: int, handled: str, loaded: dict[int, str]) -> None:
        """Nothing lost, repeated at most the windows of the killed, no innocent dead."""
        site, book = self.site, self.site.book
        accepted = {**loaded, **book.accepted()}
        assert site.dead() == {}, "innocents"
        lost = accepted.keys() - book.numbers(handled)
        assert not lost, f"lost: {[one for one in book.events if one.n in lost and one.event != 'offer']}"
        assert book.numbers("start") <= accepted.keys() | {one.n for one in book.all("offer")}, "from nowhere"
        repeated = book.repeated()
        assert set(repeated) <= set(self.killed), f"repeated though nobody died: {repeated}"
        assert not {pid: count for pid, count in repeated.items() if count > window}, "more than a window"
        outputs = site.stored(OUTPUT)
        if outputs:
            assert sorted(n for n, _ in outputs) == sorted(accepted), "one output per message, by the settle it is in"
        assert site.rows("SELECT count(*) FROM queue") == [(len(outputs),)]
        site.check_file()
        site.tell(
            kills=len(self.killed), messages=len(accepted), repeated=repeated.total(),
            most_repeated_by_one=max(repeated.values(), default=0), window=window,
            recovery_median=round(sorted(self.recoveries)[len(self.recoveries) // 2], 3),
            recovery_worst=round(max(self.recoveries), 3),
        )  # fmt: skip


def finish(killer: Killer, publisher: Child, workers: list[Child]) -> None:
    """End the stream, wait for the last message, drain."""
    site = killer.site
    assert site.end(publisher) == [0]
    site.until("the queue is empty", lambda: site.waiting() == 0)

    def only_the_living() -> bool:
        living = set(site.book.pids()) - set(killer.killed) - {publisher.pid}
        return len(living) == 2 and sorted(living) == sorted(pid for (pid,) in site.rows("SELECT pid FROM owners"))

    site.until("the dead are forgotten", only_the_living)
    assert set(site.end(*workers)) == {0}
    assert [path.name for path in site.folder.glob("*-live-*")] == []


@pytest.mark.parametrize(
    ("options", "kills", "handled"),
    [(PLAIN, 30, "end"), (BATCHES, 12, "batch-end"), (THREADS, 8, "end"), (OUTPUTS, 10, "end")],
    ids=["async", "batches", "threads", "outputs"],
)
def test_workers_killed_at_random_lose_nothing_and_repeat_at_most_their_windows(
    site: Site, options: dict[str, Any], kills: int, handled: str
) -> None:
    killer = Killer(site)
    loaded = site.load(Job(n) for n in range(BACKLOG))
    publisher = site.publisher(**STREAM, first=BACKLOG)
    workers = kill_workers(killer, kills, options)
    finish(killer, publisher, workers)
    killer.check(options["max_demand"], handled, loaded)


def kill_workers(killer: Killer, kills: int, options: dict[str, Any]) -> list[Child]:
    """Kill one of two workers, now and then both, and start them anew; returns those that live in the end."""
    site = killer.site
    workers = [site.worker(**options) for _ in range(2)]
    while len(killer.killed) < kills:
        for worker in workers:
            killer.wait_for_work(worker.pid)
        killer.at_a_random_instant()
        victims = workers if site.random.random() < 0.3 else [site.random.choice(workers)]
        at = killer.kill(*(victim.pid for victim in victims))
        for victim in victims:
            assert victim.process.wait(5) == -signal.SIGKILL
        workers = [site.worker(**options) if worker in victims else worker for worker in workers]
        killer.wait_for_recovery(at)
    return workers


def test_with_order_by_no_kill_lets_a_message_overtake_an_earlier_one_of_its_key(site: Site) -> None:
    options = {**PLAIN, "ordered": True, "work": (0.002, 0.02)}
    killer = Killer(site)
    publisher = site.publisher(**STREAM, keys=7)
    finish(killer, publisher, kill_workers(killer, 10, options))
    killer.check(options["max_demand"], "end", {})
    site.book.check_order(lambda n: n - 7 if n >= 7 else None)


def test_the_command_line_replaces_workers_that_are_killed_at_random(site: Site) -> None:
    killer = Killer(site)
    loaded = site.load(Job(n) for n in range(BACKLOG))
    publisher = site.publisher(**STREAM, first=BACKLOG)
    boss = site.command_line("--workers", "2", **PLAIN)

    def living() -> list[int]:
        pids = [one.pid for one in site.book.all("start") if one.pid not in killer.killed]
        return sorted(set(pids))

    while len(killer.killed) < 8:
        site.until("two workers work", lambda: len(living()) == 2)
        killer.at_a_random_instant()
        at = killer.kill(site.random.choice(living()))
        killer.wait_for_recovery(at)
    finish(killer, publisher, [boss])
    killer.check(PLAIN["max_demand"], "end", loaded)


def test_when_all_processes_are_killed_at_once_all_is_there_when_they_come_back(site: Site) -> None:
    killer = Killer(site)
    first = 0
    for _ in range(4):
        publisher = site.publisher(**STREAM, first=first)
        workers = [site.worker(**PLAIN) for _ in range(2)]
        for worker in workers:
            killer.wait_for_work(worker.pid)
        site.until("the publisher publishes", lambda first=first: max(site.book.accepted(), default=-1) > first)
        killer.at_a_random_instant()
        for victim in (publisher, *workers):
            victim.signal(signal.SIGKILL)
        killer.killed += [victim.pid for victim in (publisher, *workers)]
        for victim in (publisher, *workers):
            assert victim.process.wait(5) == -signal.SIGKILL
        settled = site.book.numbers("end")
        there = {n for n, _ in site.stored()}
        assert site.book.accepted().keys() <= there | settled, "lost"
        first = max(one.n for one in site.book.all("offer")) + 1
    publisher = site.publisher(**STREAM, first=first)
    workers = [site.worker(**PLAIN) for _ in range(2)]
    killer.wait_for_recovery(time.monotonic())
    finish(killer, publisher, workers)
    killer.check(PLAIN["max_demand"], "end", {})
