"""Deaths and `order_by`: whatever kills a process, no message of a key overtakes an earlier one."""

from __future__ import annotations

import pytest

from tests.crash.actors import Job
from tests.crash.kit import Site, crash

pytestmark = crash

KEYS = 3
MESSAGES = 24  # 0, 3, 6, … are of one key


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fate", ["die:1", "die:2", "die-fail", "poison"])
def test_whatever_kills_a_process_those_behind_it_wait_for_it(site: Site, fate: str, workers: int) -> None:
    culprit = KEYS * 2
    for key in range(KEYS):
        jobs = [Job(n, fate if n == culprit else "ok") for n in range(key, MESSAGES, KEYS)]
        site.load(jobs, key=str(key))
    boss = site.command_line("--workers", str(workers), ordered=True, work=(0.0, 0.01))
    site.until("the queue is empty", lambda: site.waiting() == 0)
    assert site.end(boss) == [0]
    dead = {culprit} if fate == "poison" else set()
    assert site.dead().keys() == dead
    assert site.book.numbers("end") == set(range(MESSAGES)) - dead
    site.book.check_order(lambda n: n - KEYS if n >= KEYS else None, dead)
    if fate == "poison":
        assert sum(one.n == culprit for one in site.book.all("start")) <= 4
