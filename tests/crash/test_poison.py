"""A message that kills its process: it alone is dead-lettered, after at most four deaths."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from sluiceway import App
from tests.crash.actors import Job
from tests.crash.kit import DEAD, Site, crash

pytestmark = crash

GOOD = 10_000


@pytest.mark.parametrize(
    ("fate", "options"),
    [("poison", {}), ("poison", {"mode": "thread"}), ("batch-poison", {"batch": 50})],
    ids=["handler", "thread", "batch-handler"],
)
def test_one_poison_message_among_ten_thousand_costs_one_dead_letter_and_at_most_four_deaths(
    site: Site, fate: str, options: dict[str, Any]
) -> None:
    poison = site.random.randrange(GOOD)
    site.load(Job(n, fate if n == poison else "ok") for n in range(GOOD + 1))
    began = time.monotonic()
    boss = site.command_line("--workers", "2", **options)
    site.until("the queue is empty", lambda: site.waiting() == 0, 60)
    seconds = time.monotonic() - began
    assert site.end(boss) == [0]

    book = site.book
    started, ended = ("batch-start", "batch-end") if options.get("batch") else ("start", "end")
    deaths = [one for one in book.all(started) if one.n == poison]
    assert book.numbers(ended) == set(range(GOOD + 1)) - {poison}, "every good one is handled"
    assert 1 <= len({one.pid for one in deaths}) == len(deaths) <= 4
    assert book.died() == {one.pid for one in deaths}, "no other process died"
    (letter,) = asyncio.run(browse(site))
    assert letter.body == b'{"n":%d,"fate":"%s","padding":""}' % (poison, fate.encode())
    assert letter.headers["sluiceway-dead-type"].endswith("KilledItsProcess")
    assert "process died" in letter.headers["sluiceway-dead-error"]
    assert site.rows("SELECT count(*) FROM queue") == [(1,)]
    repeated = book.repeated()
    assert set(repeated) <= {one.pid for one in deaths}, "only what was in the hand of a process that died is repeated"
    assert max(repeated.values()) <= 1_000, "the widest window"
    site.tell(
        deaths=len(deaths), empty_after=round(seconds, 2), good_repeated=repeated.total() - len(deaths) + 1,
        window_of_the_dead=dict(repeated),
    )  # fmt: skip


async def browse(site: Site) -> list[Any]:
    async with App(site.config().url) as app:
        return [letter async for letter in app.transport.browse(DEAD)]
