"""RabbitMQ: what an ordered source writes down of its keys, and what the next process makes of that."""

from __future__ import annotations

import time
from typing import Any

from sluiceway.message import Message
from sluiceway.transports.rabbitmq.order import Order, read, write


def message(tag: int, key: str = "k") -> Message[Any]:
    return Message("t", b"", f"id {tag}", key, token=tag)


def taken(order: Order, *tags: int) -> None:
    for tag in tags:
        order.came(message(tag), 0, None)
        assert order.takes(message(tag))


def ids(order: Order) -> list[str]:
    return [name for _, _, name, _ in order.record(0)]


def test_nothing_is_written_down_while_all_is_in_its_place() -> None:
    order = Order()
    taken(order, 1, 2)
    order.ended([1])
    assert order.record(0) == []


def test_what_goes_is_written_down_with_what_is_before_it_and_still_in_hand() -> None:
    order = Order()
    taken(order, 1, 2, 3)
    order.goes(2, 5.0)
    assert ids(order) == ["id 1", "id 2"]


def test_a_copy_that_has_come_back_is_written_down_until_it_is_settled() -> None:
    """It stands at the end of the queue, behind later ones: if this process dies, those come first."""
    order = Order()
    place = order.came(message(1), 0, None)
    assert place is not None
    assert order.takes(message(1))
    order.goes(1, 5.0)
    order.ended([1])
    assert order.came(message(2), 0, place) == place
    assert order.takes(message(2))
    assert ids(order) == ["id 2"]
    order.ended([2])
    assert order.record(0) == []


def test_the_next_process_hands_out_in_the_order_that_is_written_down() -> None:
    order = Order()
    taken(order, 1, 2, 3)
    order.goes(2, time.time() + 60)
    away, explained = read([write(order.record(0), {"id 9": 2})])
    assert explained == {"id 9": 2}
    following = Order()
    following.learn(0, away)
    last, first = message(103), message(101)
    last.id, first.id = "id 3", "id 1"
    following.came(last, 0, None)
    assert not following.takes(last), "the first and the second are away"
    following.came(first, 0, None)
    assert following.takes(first)
    assert following.called() == []
    (second,) = [place for place, _, name, _ in away if name == "id 2"]
    copy = message(102)
    following.came(copy, 0, second)
    assert following.takes(copy)
    assert following.called() == [last]


def test_a_message_that_is_in_hand_twice_is_taken_once() -> None:
    order = Order()
    place = order.came(message(1), 0, None)
    assert order.came(message(2), 0, place) is None


def test_what_does_not_come_is_forgotten_and_holds_up_no_more() -> None:
    order = Order()
    order.learn(0, [(5, "k", "id 5", 1.0)])
    order.came(message(6), 0, None)
    assert not order.takes(message(6))
    assert order.overdue() == [("k", 5, 0)]
    order.forgets("k", 5)
    assert [one.token for one in order.called()] == [6]


def test_what_waits_for_nothing_is_freed_in_its_order() -> None:
    order = Order()
    order.learn(0, [(5, "k", "id 5", 1.0)])
    for tag in (6, 7):
        order.came(message(tag), 0, None)
        assert not order.takes(message(tag))
    assert order.free(set()) == []
    assert order.came(message(5), 0, 5) == 5
    assert order.takes(message(5))
    assert order.free({"k"}) == []
    freed = order.free(set())
    assert [one.token for one in freed] == [6, 7]
    assert all(order.takes(one) for one in freed)
    assert order.room == {}


def test_a_record_that_nobody_of_ours_wrote_is_none() -> None:
    assert read([]) == ([], {})
    good = write([(1, "k\udce9", "a", 2.0)], {})
    for other in (b"", b"[]", b"\xff", b'{"away": 1, "explained": {}}', b'{"away": [], "explained": []}'):
        assert read([other]) == ([], {})
        assert read([good, other]) == ([(1, "k\udce9", "a", 2.0)], {})
