"""SIGKILL of a publisher in mid-publish: what publish returned for is there, once; what was cut off is whole or not."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest

from tests.crash.kit import Site, crash

pytestmark = crash

USABLE = 5.0  # seconds from the start of the next process to its first publish that returned


@pytest.mark.parametrize(("chunk", "rounds"), [(1, 8), (2_000, 10)], ids=["one-by-one", "publish_many"])
def test_a_publisher_killed_in_mid_publish_leaves_what_it_was_told_and_nothing_half(
    site: Site, chunk: int, rounds: int
) -> None:
    book = site.book
    stored: Counter[tuple[int, str]] = Counter()
    cut_off = whole = first = 0
    slowest = 0.0
    for _ in range(rounds):
        publisher = site.publisher(first=first, chunk=chunk, padding=1_000)
        began = time.monotonic()
        site.until("publish returns", lambda first=first: max(book.accepted(), default=-1) >= first, USABLE)
        slowest = max(slowest, time.monotonic() - began)
        in_mid_call(site, site.random.randrange(1, 4))
        publisher.signal(signal.SIGKILL)
        assert publisher.process.wait(5) == -signal.SIGKILL

        new = site.stored(after=stored.total())
        stored.update(new)
        accepted = book.accepted()
        assert set(accepted.items()) <= stored.keys(), "publish returned and it is not there"
        assert set(stored.values()) == {1}, "there twice"
        numbers = {n for n, _ in new}
        last = max(one.n for one in book.all("offer"))
        for low in range(first, last + chunk, chunk):
            there = len(numbers & set(range(low, low + chunk)))
            assert there in (0, chunk), f"a part of the call from {low} on: {there} of {chunk}"
        assert numbers <= set(range(first, last + chunk)), "from nowhere"
        if last not in accepted:
            cut_off += 1
            whole += last in numbers
        first = last + chunk
    site.check_file()
    site.tell(
        kills=rounds, published=len(book.accepted()), cut_off=cut_off, cut_off_but_whole=whole,
        usable_again_worst=round(slowest, 3),
    )  # fmt: skip


def in_mid_call(site: Site, calls: int) -> None:
    """Return at a random instant in one of the next calls, judged by how long the last one took."""
    book = site.book
    offer, accept = book.all("offer")[0], book.all("accept")[0]
    seen = len(book.all("offer"))
    site.until("more calls", lambda: len(book.all("offer")) >= seen + calls - 1)
    seen = len(book.all("offer"))
    deadline = time.monotonic() + 10
    while len(book.all("offer")) == seen:
        assert time.monotonic() < deadline, site.state()
    instant = time.monotonic() + site.random.uniform(0, (accept.at - offer.at))
    while time.monotonic() < instant:
        pass  # a sleep would be too coarse
