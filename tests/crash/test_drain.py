"""SIGTERM: what runs is finished, what has not started is another worker's within a second, nothing is done twice."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from tests.crash.actors import Job
from tests.crash.kit import Child, Site, crash

pytestmark = crash

WINDOW = {"concurrency": 5, "max_demand": 40}
AT_ONCE = 1.0  # seconds until another worker starts what went back


def running_in(site: Site, worker: Child) -> set[int]:
    """What the worker started and has not ended."""
    events = [one for one in site.book.all("start", "end") if one.pid == worker.pid]
    return {one.n for one in events if one.event == "start"} - {one.n for one in events if one.event == "end"}


def wait_until_it_holds_all(site: Site, worker: Child, count: int) -> None:
    """Until the worker has claimed all messages and runs as many as it can."""
    claimed = "SELECT max(head) FROM queues"
    site.until("it runs what it can", lambda: len(running_in(site, worker)) == WINDOW["concurrency"])
    site.until("it has claimed all", lambda: site.rows(claimed)[0][0] >= count)


@pytest.mark.parametrize("mode", ["async", "thread"])
def test_a_drain_finishes_what_runs_and_another_worker_starts_the_rest_at_once(site: Site, mode: str) -> None:
    site.load(Job(n) for n in range(40))
    worker = site.worker(**WINDOW, mode=mode, work=(1.5, 1.5))
    wait_until_it_holds_all(site, worker, 40)
    other = site.worker(**WINDOW, mode=mode, work=(0.02, 0.05))
    site.until("the other is up", lambda: other.pid in site.book.pids())
    running = running_in(site, worker)
    at = worker.signal(signal.SIGTERM)

    def others_starts() -> list[float]:
        return [one.at for one in site.book.all("start") if one.pid == other.pid]

    site.until("another worker starts them", others_starts, AT_ONCE)
    site.until("and all of them", lambda: len(others_starts()) == 35)
    assert worker.running, "what runs is still running"
    assert worker.process.wait(10) == 0
    drained = time.monotonic() - at
    assert running <= {one.n for one in site.book.all("end") if one.pid == worker.pid}, "what ran was finished"
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(other) == [0]
    assert site.book.numbers("end") == set(range(40))
    assert site.book.repeated().total() == 0
    assert site.dead() == {}
    first, last = min(others_starts()) - at, max(others_starts()) - at
    site.tell(mode=mode, drain=round(drained, 3), first_start_elsewhere=round(first, 3), last=round(last, 3))


def test_a_drain_under_load_loses_nothing_and_repeats_nothing(site: Site) -> None:
    options: dict[str, Any] = {"concurrency": 10, "max_demand": 70, "batch": 30, "batch_timeout": 20.0}
    slow: dict[str, Any] = {"work": (0.0, 0.03), "batch_work": 0.05}
    site.load(Job(n) for n in range(1_000))
    publisher = site.publisher(first=1_000, pause=0.002)
    rounds = 6
    for turn in range(rounds):
        worker = site.command_line("--workers", "2", **options, **slow) if turn % 2 else site.worker(**options, **slow)
        begun = len(site.book.all("batch-end"))
        more = site.random.randrange(30, 200)
        site.until("it works", lambda begun=begun, more=more: len(site.book.all("batch-end")) > begun + more)
        assert site.end(worker) == [0]
        assert publisher.running
    assert site.end(publisher) == [0]
    worker = site.worker(**{**options, "batch_timeout": 0.05})
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(worker) == [0]
    book = site.book
    accepted = set(range(1_000)) | book.accepted().keys()
    assert accepted <= book.numbers("batch-end")
    assert book.repeated().total() == 0, "nothing that started was handled twice"
    assert len(book.all("batch-start")) == len(book.numbers("batch-start")), "nor in a batch"
    assert site.dead() == {}
    site.tell(drains=rounds, messages=len(accepted))


def test_a_second_sigterm_cancels_what_runs_and_gives_it_back(site: Site) -> None:
    site.load(Job(n) for n in range(40))
    worker = site.worker(**WINDOW, work=(60.0, 60.0))
    wait_until_it_holds_all(site, worker, 40)
    running = running_in(site, worker)
    worker.signal(signal.SIGTERM)
    site.until("it drains", lambda: any(one.event == "state:draining" for one in site.book.all("state:draining")))
    assert worker.running
    at = worker.signal(signal.SIGTERM)
    assert worker.process.wait(5) == 0
    _check_handed_over(site, running, time.monotonic() - at)


def test_a_drain_over_its_time_cancels_what_runs_and_gives_it_back(site: Site) -> None:
    site.load(Job(n) for n in range(40))
    worker = site.worker(**WINDOW, work=(60.0, 60.0), shutdown_timeout=0.5)
    wait_until_it_holds_all(site, worker, 40)
    running = running_in(site, worker)
    at = worker.signal(signal.SIGTERM)
    assert worker.process.wait(5) == 0
    _check_handed_over(site, running, time.monotonic() - at)


def test_a_thread_that_outlasts_the_drain_keeps_its_message_until_its_process_has_ended(site: Site) -> None:
    site.load(Job(n) for n in range(40))
    worker = site.worker(**WINDOW, mode="thread", work=(60.0, 60.0), shutdown_timeout=0.5)
    wait_until_it_holds_all(site, worker, 40)
    running = running_in(site, worker)
    other = site.worker(**WINDOW)
    site.until("the other is up", lambda: other.pid in site.book.pids())
    at = worker.signal(signal.SIGTERM)
    site.until("the other does what had not started", lambda: len(site.book.numbers("end")) == 35)
    assert worker.process.wait(10) == 0
    ended = time.monotonic()
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(other) == [0]
    again = [one for one in site.book.all("start") if one.n in running and one.pid == other.pid]
    assert {one.n for one in again} == running
    assert min(one.at for one in again) > at + 0.5, "not while the thread ran"
    assert site.book.numbers("end") == set(range(40))
    assert site.dead() == {}
    site.tell(drain=round(ended - at, 3), taken_over_after=round(max(one.at for one in again) - ended, 3))


def _check_handed_over(site: Site, running: set[int], drain: float) -> None:
    """The next worker handles all, what was cut off too, and none of it counts as an attempt."""
    other = site.worker(**WINDOW)
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(other) == [0]
    assert site.book.numbers("end") == set(range(40))
    again = [one for one in site.book.all("start") if one.pid == other.pid]
    assert len(again) == 40
    assert {one.attempt for one in again} == {1}
    assert {n for n, events in site.book.starts().items() if len(events) == 2} == running
    assert site.dead() == {}
    site.tell(drain=round(drain, 3))


def test_the_command_line_drains_its_workers_and_says_when_it_was_cut_short(site: Site) -> None:
    site.load(Job(n) for n in range(40))
    boss = site.command_line("--workers", "2", concurrency=5, max_demand=20, work=(60.0, 60.0))
    site.until("both work", lambda: len(site.book.all("start")) == 10)
    boss.signal(signal.SIGTERM)
    unstarted = "SELECT count(*) FROM queue WHERE state = 4"  # back at the broker
    site.until("what has not started is back", lambda: site.rows(unstarted)[0][0] == 30)
    boss.signal(signal.SIGTERM)
    assert boss.process.wait(10) == 128 + signal.SIGTERM
    worker = site.worker(**WINDOW)
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(worker) == [0]
    assert site.book.numbers("end") == set(range(40))
    assert site.dead() == {}
