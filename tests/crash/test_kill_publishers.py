"""SIGKILL of a publisher in mid-publish: what publish returned for is there, once; what was cut off is whole or not."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest

from tests.crash.kit import Site, crash

pytestmark = crash

USABLE = 5.0  # seconds from the start of the next process to its first publish that returned


@pytest.mark.parametrize(("chunk", "rounds"), [(1, 8), (120, 10)], ids=["one-by-one", "publish_many"])
def test_a_publisher_killed_in_mid_publish_leaves_what_it_was_told_and_nothing_half(
    site: Site, chunk: int, rounds: int
) -> None:
    book = site.book
    cut_off = whole = 0
    first, slowest = 0, 0.0
    for _ in range(rounds):
        publisher = site.publisher(first=first, chunk=chunk, padding=500)
        began = time.monotonic()
        site.until("publish returns", lambda first=first: max(book.accepted(), default=-1) >= first, USABLE)
        slowest = max(slowest, time.monotonic() - began)
        calls = len(book.all("offer")) + site.random.randrange(12)
        site.until("more calls", lambda calls=calls: len(book.all("offer")) >= calls)
        instant = time.monotonic() + site.random.uniform(0, 0.004)
        while time.monotonic() < instant:
            pass  # a sleep would wake at the end of somebody's transaction rather than within it
        publisher.signal(signal.SIGKILL)
        assert publisher.process.wait(5) == -signal.SIGKILL

        stored = Counter(site.stored())
        accepted = book.accepted()
        assert set(accepted.items()) <= stored.keys(), "publish returned and it is not there"
        assert set(stored.values()) == {1}, "there twice"
        offers = {one.n: int(one.what) for one in book.all("offer")}
        numbers = {n for n, _ in stored}
        for low, high in offers.items():
            there = numbers & set(range(low, high + 1))
            assert len(there) in (0, high - low + 1), f"a part of the call {low}..{high}: {len(there)}"
        last = max(offers)
        if last not in accepted:
            cut_off += 1
            whole += last in numbers
        assert numbers <= set(range(offers[last] + 1))
        first = offers[last] + 1
    site.check_file()
    site.tell(
        kills=rounds, published=len(book.accepted()), cut_off=cut_off, cut_off_but_whole=whole,
        usable_again_worst=round(slowest, 3),
    )  # fmt: skip
