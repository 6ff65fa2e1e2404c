"""The acks of a channel: never one that covers what is not settled, and as few as can be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sluiceway.transports.rabbitmq.tags import Tags


def test_a_run_without_gaps_is_one_ack() -> None:
    assert Tags().settle([1, 2, 3]) == [(3, True)]


def test_what_is_behind_an_open_delivery_is_acknowledged_alone() -> None:
    tags = Tags()
    assert tags.settle([2, 3]) == [(2, False), (3, False)]
    assert tags.settle([1]) == [(1, True)]
    assert tags.settle([4]) == [(4, True)]


def test_settling_again_sends_nothing() -> None:
    tags = Tags()
    tags.settle([1, 3])
    assert tags.settle([1, 3]) == []


@given(st.permutations(range(1, 30)), st.lists(st.integers(1, 6), min_size=1, max_size=29))
def test_every_delivery_is_acknowledged_once_and_never_before_it_is_settled(order: list[int], sizes: list[int]) -> None:
    tags, outstanding, settled = Tags(), set(range(1, 30)), set[int]()
    while order:
        call, order = order[: sizes[0]], order[sizes[0] :]
        sizes = [*sizes[1:], sizes[0]]
        settled.update(call)
        for tag, multiple in tags.settle(call):
            assert tag in outstanding, "the broker closes a channel that acknowledges what is not there"
            covered = {one for one in outstanding if one == tag or (multiple and one < tag)}
            assert covered <= settled
            outstanding -= covered
        assert outstanding == set(range(1, 30)) - settled
        assert [tags.is_open(tag) for tag in range(1, 30)] == [tag in outstanding for tag in range(1, 30)]
        assert tags.open_until(29) == len(outstanding)
