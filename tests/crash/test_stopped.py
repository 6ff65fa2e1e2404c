"""A process that lives and does nothing: stopped by SIGSTOP, or with a handler that blocks its event loop."""

from __future__ import annotations

import os
import signal
import time

import apsw
import pytest

from tests.crash.actors import Job
from tests.crash.kit import Site, crash

pytestmark = crash

LEASE = 2.0
WINDOW = {"concurrency": 10, "max_demand": 20, "lease": LEASE}


def test_a_worker_stopped_past_its_lease_is_taken_over_and_fenced_when_it_wakes(site: Site) -> None:
    gate = site.folder / "gate"
    site.load(Job(n) for n in range(20))
    stopped = site.worker(**WINDOW, gate=str(gate))
    site.until("it runs ten", lambda: len(site.book.all("start")) == 10)
    site.until("it holds twenty", lambda: site.rows("SELECT max(head) FROM queues")[0][0] >= 20)
    other = site.worker(**WINDOW)
    site.until("the other is up", lambda: other.pid in site.book.pids())
    _stop_outside_of_transactions(site, stopped.pid)
    at = time.monotonic()
    site.until("another one handles them", lambda: len(site.book.numbers("end")) == 20, LEASE + 5)
    taken = min(one.at for one in site.book.all("start") if one.pid == other.pid) - at
    last = max(one.at for one in site.book.all("end")) - at
    site.until("and settles them", lambda: site.waiting() == 0)
    gate.touch()
    woken = stopped.signal(signal.SIGCONT)
    # and it may begin what it had queued, until it hears of its loss: that stays within its window, and is refused
    site.until("it ends what it ran", lambda: sum(one.pid == stopped.pid for one in site.book.all("end")) >= 10)
    site.until("its settles are refused", lambda: "refused to settle" in site.log.read_text())
    assert site.end(other) == [0]

    site.load(Job(n) for n in range(100, 200))
    site.until("it goes on by itself", lambda: len(site.book.numbers("end")) == 120)
    on = min(one.at for one in site.book.all("end") if one.n >= 100) - woken
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(stopped) == [0]
    starts = site.book.starts()
    assert {n for n, events in starts.items() if len(events) > 1} <= set(range(20))
    assert max(len(events) for events in starts.values()) == 2
    assert all(one.pid == stopped.pid for one in site.book.all("start") if one.n >= 100)
    assert site.dead() == {}
    site.check_file()
    site.tell(
        lease=LEASE, taken_over_after=round(taken, 3), all_handled_after=round(last, 3),
        repeated=site.book.repeated().total(), new_work_after_waking=round(on, 3),
    )  # fmt: skip


def _stop_outside_of_transactions(site: Site, pid: int) -> None:
    """Stop a process at an instant at which it holds no lock of the database: with one, nobody could write."""

    def stopped() -> bool:
        os.kill(pid, signal.SIGSTOP)
        try:
            site.rows("BEGIN IMMEDIATE; ROLLBACK")
        except apsw.BusyError:
            os.kill(pid, signal.SIGCONT)
            return False
        return True

    site.until("stopped outside of a transaction", stopped, 20)


def test_a_worker_stopped_for_less_than_its_lease_keeps_what_it_has(site: Site) -> None:
    site.load(Job(n) for n in range(20))
    stopped = site.worker(concurrency=10, max_demand=20, lease=20.0, work=(1.0, 1.0))
    site.until("it runs ten", lambda: len(site.book.all("start")) == 10)
    site.until("it holds twenty", lambda: site.rows("SELECT max(head) FROM queues")[0][0] >= 20)
    other = site.worker(concurrency=10, max_demand=20, lease=20.0)
    site.until("the other is up", lambda: other.pid in site.book.pids())
    _stop_outside_of_transactions(site, stopped.pid)
    begun = len(site.book.all("start"))
    until = time.monotonic() + 2.5
    site.until("the time of two looks for dead processes", lambda: time.monotonic() > until)
    assert len(site.book.all("start")) == begun
    stopped.signal(signal.SIGCONT)
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(stopped, other) == [0, 0]
    assert all(len(events) == 1 for events in site.book.starts().values())
    assert site.book.numbers("end") == set(range(20))


@pytest.mark.parametrize("mode", ["block", "thread"])
def test_a_handler_that_runs_longer_than_the_lease_keeps_its_message_though_it_blocks_the_loop(
    site: Site, mode: str
) -> None:
    lease = 1.0
    site.load(Job(n) for n in range(3))
    busy = site.worker(concurrency=1, max_demand=3, lease=lease, mode=mode, work=(3.0, 3.0))
    site.until("it runs one", lambda: len(site.book.all("start")) == 1)
    site.until("it holds three", lambda: site.rows("SELECT max(head) FROM queues")[0][0] >= 3)
    other = site.worker(concurrency=5, max_demand=10, lease=lease)
    site.until("the other is up", lambda: len(site.book.pids()) == 2)
    site.until("it is done", lambda: len(site.book.all("end")) == 1)
    assert {one.pid for one in site.book.all("start")} == {busy.pid}, "nobody else handled it"
    busy.signal(signal.SIGTERM)  # it may block its loop for another message before it hears that
    assert busy.process.wait(15) == 0
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(other) == [0]
    assert site.book.numbers("end") == {0, 1, 2}
    assert site.book.repeated().total() == 0
    assert site.dead() == {}
