"""Lanes: one message of a key at a time, in the order of arrival, also when some go back to the broker."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sluiceway._decisions.lanes import Lanes
from sluiceway.message import QUEUED, RUNNING, SETTLED, Message

KEYS = st.sampled_from([None, "a", "b"])


def message(number: int, key: str | None = "a") -> Message[Any]:
    return Message("t", b"", str(number), key=key)


class LanesMachine(RuleBasedStateMachine):
    """Lanes beside a simple model, used as the runtime uses them.

    The model knows per key which deliveries are in hand, in order of arrival, and which of them are on their way back.
    A key may start one delivery when none of it runs and none is on its way back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes()
        self.count = 0
        self.number: dict[int, int] = {}
        self.started: list[Message[Any]] = []  # running
        self.waiting: defaultdict[str, list[Message[Any]]] = defaultdict(list)
        self.back: list[Message[Any]] = []  # on their way back to the broker, their settle not yet returned
        self.returned: list[Message[Any]] = []  # handler returned, settle not yet returned
        self.keep: list[Message[Any]] = []  # so that no id() is used twice

    # -- what the model says --------------------------------------------------------------------------------------

    def busy(self, key: str) -> bool:
        return any(one.key == key for one in self.started)

    def is_shut(self, key: str) -> bool:
        return any(one.key == key for one in self.back)

    def start(self, one: Message[Any]) -> None:
        assert one.state == QUEUED
        if one.key is not None:
            assert not self.busy(one.key)
            assert not self.is_shut(one.key)
        assert one not in self.started
        one.state = RUNNING
        self.started.append(one)

    def follow(self, key: str | None, following: Message[Any] | None) -> None:
        """What the runtime does with the answer of `finish`, and what the model expects that answer to be."""
        while following is not None and following.state != QUEUED:
            following = self.lanes.finish(following)
        waiting = self.waiting[key] if key is not None else []
        free = key is not None and not self.busy(key) and not self.is_shut(key)
        expected = waiting.pop(0) if free and waiting else None
        assert following is expected
        if following is not None:
            self.start(following)

    def send_back(self, one: Message[Any]) -> None:
        one.state = SETTLED
        self.back.append(one)

    # -- what happens ---------------------------------------------------------------------------------------------

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4))
    def arrive(self, keys: list[str | None]) -> None:
        arrivals = []
        for key in keys:
            self.count += 1
            arrivals.append(message(self.count, key))
            self.number[id(arrivals[-1])] = self.count
        self.keep += arrivals
        start, back = self.lanes.enter(arrivals)
        for one in arrivals:
            if one.key is not None and self.is_shut(one.key):
                assert any(one is other for other in back)
                self.send_back(one)
            elif one.key is not None and self.busy(one.key):
                assert not any(one is other for other in (*start, *back))
                self.waiting[one.key].append(one)
            else:
                assert any(one is other for other in start)
                self.start(one)

    @precondition(lambda self: self.started)
    @rule(data=st.data(), settled_first=st.booleans())
    def succeed(self, data: st.DataObject, settled_first: bool) -> None:
        """The handler returns, which opens the lane; or, with batchers, only its settle does."""
        one = data.draw(st.sampled_from(self.started))
        self.started.remove(one)
        one.state = SETTLED
        if not settled_first:
            self.returned.append(one)
        self.follow(one.key, self.lanes.finish(one))

    @precondition(lambda self: self.returned)
    @rule(data=st.data())
    def its_ack_returns(self, data: st.DataObject) -> None:
        """A second `finish` for a lane that opened long ago changes nothing."""
        one = data.draw(st.sampled_from(self.returned))
        self.returned.remove(one)
        one.state = SETTLED
        assert self.lanes.finish(one) is None

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        """A retry or a release: what waits behind goes back too, in order."""
        one = data.draw(st.sampled_from(self.started))
        self.started.remove(one)
        behind = self.lanes.shut(one)
        if one.key is None:
            assert behind == []
            return
        self.send_back(one)
        assert behind == [other for other in self.waiting[one.key] if other.state == QUEUED]
        self.waiting[one.key].clear()
        for other in behind:
            self.send_back(other)

    @precondition(lambda self: self.back)
    @rule(data=st.data())
    def the_broker_has_it_back(self, data: st.DataObject) -> None:
        """In any order; it may come again, as a new delivery, before the others of its lane are settled."""
        one = data.draw(st.sampled_from(self.back))
        self.back.remove(one)
        one.state = SETTLED
        self.follow(one.key, self.lanes.finish(one))

    @precondition(lambda self: any(self.waiting.values()))
    @rule(data=st.data())
    def lose_the_lease_of_one_that_waits(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from([one for lane in self.waiting.values() for one in lane]))
        assert one.key is not None
        one.state = SETTLED
        assert self.lanes.finish(one) is None
        self.waiting[one.key].remove(one)

    @rule()
    def hand_back_all_that_waits(self) -> None:
        """A drain, a quarantine, a gate that stays closed."""
        taken = self.lanes.take_waiting()
        assert set(map(id, taken)) == {id(one) for lane in self.waiting.values() for one in lane}
        for lane in self.waiting.values():
            assert [one for one in taken if any(one is other for other in lane)] == lane
            lane.clear()
        for one in taken:
            assert self.lanes.shut(one) == []  # the runtime settles each as a release, which calls this
            self.send_back(one)

    # -- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def one_of_a_key_runs_and_those_behind_it_are_later(self) -> None:
        for key in ("a", "b"):
            running = [one for one in self.started if one.key == key]
            numbers = [self.number[id(one)] for one in (*running, *self.waiting[key])]
            assert len(running) <= 1
            assert numbers == sorted(numbers)

    @invariant()
    def nothing_waits_for_nothing(self) -> None:
        for key, lane in self.waiting.items():
            assert not lane or self.busy(key) or self.is_shut(key)

    @invariant()
    def what_waits_is_counted(self) -> None:
        assert self.lanes.waiting >= sum(map(len, self.waiting.values()))  # and those that lost their lease there

    def teardown(self) -> None:
        """When all that is in hand has ended, no lane is left."""
        while self.started or self.back:
            if self.back:
                one = self.back.pop()
            else:
                one = self.started.pop()
            one.state = SETTLED
            self.follow(one.key, self.lanes.finish(one))
        assert not any(self.waiting.values())
        assert self.lanes.waiting == 0
        assert self.lanes._lanes == {}


LanesMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestOneOfAKeyAtATimeInOrderOfArrivalNothingLostNothingStartedTwice = LanesMachine.TestCase


def test_messages_without_a_key_all_start() -> None:
    messages = [message(number, None) for number in range(3)]
    assert Lanes().enter(messages) == (messages, [])


def test_a_head_that_comes_back_before_its_siblings_are_settled_does_not_start() -> None:
    lanes = Lanes()
    first, second = message(1), message(2)
    assert lanes.enter([first, second]) == ([first], [])
    assert lanes.shut(first) == [second]
    assert lanes.finish(first) is None
    again = message(1)
    assert lanes.enter([again]) == ([], [again])
    assert lanes.finish(second) is None
    assert lanes.finish(again) is None
    once_more = message(1)
    assert lanes.enter([once_more]) == ([once_more], [])


def test_what_a_drain_hands_back_keeps_later_messages_of_its_key_from_starting() -> None:
    lanes = Lanes()
    first, second, third = message(1), message(2), message(3)
    lanes.enter([first, second])
    assert lanes.take_waiting() == [second]
    assert lanes.finish(first) is None
    assert lanes.enter([third]) == ([], [third])


def test_a_message_that_lost_its_lease_while_it_waited_does_not_shut_the_lane_for_ever() -> None:
    lanes = Lanes()
    first, second = message(1), message(2)
    lanes.enter([first, second])
    second.state = SETTLED  # as the settler's forget() leaves it
    assert lanes.finish(second) is None
    assert lanes.shut(first) == []
    assert lanes.finish(first) is None
    third = message(3)
    assert lanes.enter([third]) == ([third], [])


def test_a_hot_key_holds_no_more_than_its_share_and_what_is_beyond_goes_back_in_order() -> None:
    lanes = Lanes()
    hot = [message(number, "hot") for number in range(6)]
    other = message(9, "other")
    start, back = lanes.enter([*hot, other], 2)
    assert (start, back) == ([hot[0], other], hot[3:])
    assert lanes.finish(hot[0]) is hot[1]  # the lane flows on while the rest is on its way back
    late = message(7, "hot")
    assert lanes.enter([late], 2) == ([], [late])  # it may not pass those
    assert lanes.finish(hot[1]) is hot[2]
    assert lanes.finish(hot[2]) is None
    for one in (*hot[3:], late):
        assert lanes.finish(one) is None
    assert lanes.enter([hot[3]], 2) == ([hot[3]], [])
