"""SIGKILL between a retry or a dead letter and the settle that it belongs to: each message ends as its fate says."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

from tests.crash.actors import Job
from tests.crash.kit import Site, crash

pytestmark = crash

ATTEMPTS = 7  # more than any fate needs: an innocent that dies with a process now and then has some to spare
WORKER = {"concurrency": 8, "max_demand": 16, "attempts": ATTEMPTS, "base_delay": 0.01, "work": (0.0, 0.004)}
FATES = ("ok", "fail:1", "always", "fail:2", "ok", "fail:3", "always", "fail:1")
MESSAGES = 800
KILLS = 20


def test_killed_in_the_middle_of_failures_each_message_is_acked_or_dead_lettered_as_its_fate_says(site: Site) -> None:
    fates = {n: FATES[n % len(FATES)] for n in range(MESSAGES)}
    site.load(Job(n, fate) for n, fate in fates.items())
    workers = [site.worker(**WORKER) for _ in range(2)]
    killed: list[int] = []
    while len(killed) < KILLS and site.waiting():
        victim = site.random.choice(workers)
        skip = site.random.randrange(20)
        seen: list[int] = []

        def fails(pid: int = victim.pid, seen: list[int] = seen, skip: int = skip) -> bool:
            seen += [one.n for one in site.book.read() if one.event == "fail" and one.pid == pid]
            return len(seen) > skip or site.waiting() == 0

        site.until("a handler of the victim fails", fails)
        instant = time.monotonic() + site.random.choice((0.0, 0.001, 0.003))  # from the handler's raise to the commit
        while time.monotonic() < instant:
            pass
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.process.wait(5) == -signal.SIGKILL
        killed.append(victim.pid)
        workers[workers.index(victim)] = site.worker(**WORKER)
    site.until("all is settled", lambda: site.waiting() == 0)
    assert site.end(*workers) == [0, 0]

    dead = site.dead()
    guilty = {n for n, fate in fates.items() if fate == "always"}
    assert dead.keys() == guilty, "dead letters are those that always fail, and no others"
    assert {len(letters) for letters in dead.values()} == {1}, "retry, dead letter and settle are one transaction"
    assert site.book.numbers("end") == fates.keys() - guilty, "handled are all others"
    failures = Counter(one.n for one in site.book.all("fail"))
    for n, fate in fates.items():
        least = {"ok": 0, "always": ATTEMPTS}.get(fate) or int(fate.partition(":")[2] or 0)
        extra = sum(one.pid in killed for one in site.book.all("start") if one.n == n) if failures[n] > least else 0
        assert failures[n] <= least + extra, f"{n}, which is {fate}, failed {failures[n]} times"
        if fate == "always":
            (letter,) = dead[n]
            # more when processes died with it in hand: it is not blamed before it ran alone once
            assert ATTEMPTS <= int(letter["sluiceway-dead-attempts"]) <= ATTEMPTS + len(killed)
            assert letter["sluiceway-dead-type"].endswith(("Failure", "KilledItsProcess"))
        elif fate != "ok":
            assert failures[n] >= least
    repeated = site.book.repeated()
    site.check_file()
    site.tell(kills=len(killed), failures=failures.total(), dead_letters=len(dead), starts=repeated.total() + MESSAGES)
