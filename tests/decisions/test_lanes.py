"""Lanes: one message of a key at a time, in the order of arrival, also when some go back to the broker; and batches."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sluiceway._decisions.lanes import Lanes, Turns
from sluiceway.message import QUEUED, RUNNING, SETTLED, Message

KEYS = st.sampled_from([None, "a", "b"])


def message(number: int, key: str | None = "a") -> Message[Any]:
    return Message("t", b"", str(number), key=key)


class LanesMachine(RuleBasedStateMachine):
    """Lanes beside a simple model, used as the runtime uses them.

    The model knows per key which deliveries are in hand, in order of arrival, and which of them are on their way back.
    A key may start one delivery when none of it runs and no earlier one is on its way back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes()
        self.count = 0
        self.number: dict[int, int] = {}
        self.started: list[Message[Any]] = []  # running, or on its way to a processor
        self.overtaken: list[Message[Any]] = []  # of these, those that an earlier one of their key went back behind
        self.batched: defaultdict[str, list[Message[Any]]] = defaultdict(list)  # handler returned, in a batch, in order
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
            behind = [other for other in self.back if other.key == one.key]
            assert all(self.number[id(other)] > self.number[id(one)] for other in behind)
        assert one not in self.started
        self.started.append(one)

    def follow(self, key: str | None, following: Message[Any] | None) -> None:
        """What the runtime does with the answer of `finish`, and what the model expects that answer to be."""
        while following is not None and following.state != QUEUED:
            following = self.lanes.finish(following)
        waiting = self.waiting[key] if key is not None else []
        free = key is not None and not self.busy(key)
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
    @rule(data=st.data())
    def enter_its_handler(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.started)).state = RUNNING

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def join_a_batch(self, data: st.DataObject) -> None:
        """The handler returns, which opens the lane; one that was overtaken goes back, and all that came since."""
        one = data.draw(st.sampled_from(self.started))
        self.started.remove(one)
        one.state = RUNNING
        assert self.lanes.is_overtaken(one) == (one in self.overtaken)
        if one in self.overtaken:
            self.overtaken.remove(one)
            self.goes_back(one)
            assert self.lanes.returned(one, batched=True) is None  # as the processor says of every message
        else:
            if one.key is not None:
                self.batched[one.key].append(one)
            self.follow(one.key, self.lanes.returned(one, batched=True))

    @precondition(lambda self: any(self.batched.values()))
    @rule(data=st.data())
    def end_in_its_batch(self, data: st.DataObject) -> None:
        """An ack or a dead letter: the lane is open already."""
        one = data.draw(st.sampled_from([lane[0] for lane in self.batched.values() if lane]))
        assert one.key is not None
        self.batched[one.key].remove(one)
        one.state = SETTLED
        assert self.lanes.finish(one) is None

    @precondition(lambda self: any(self.batched.values()))
    @rule(data=st.data(), entered=st.booleans())
    def go_back_from_its_batch(self, data: st.DataObject, entered: bool) -> None:
        one = data.draw(st.sampled_from([one for lane in self.batched.values() for one in lane]))
        assert one.key is not None
        lane = self.batched[one.key]
        behind = lane[lane.index(one) + 1 :]
        del lane[lane.index(one) :]
        for running in [other for other in self.started if other.key == one.key]:
            if running.state == QUEUED and not entered:
                self.started.remove(running)
                behind.append(running)
            elif running not in self.overtaken:
                self.overtaken.append(running)
        behind += [other for other in self.waiting[one.key] if other.state == QUEUED]
        self.waiting[one.key].clear()
        assert self.lanes.shut(one, entered=entered) == behind
        for other in (one, *behind):
            self.send_back(other)

    @precondition(lambda self: any(self.is_shut(key) for key in "ab"))
    @rule(key=st.sampled_from("ab"))
    def turn_away_at_a_shut_lane(self, key: str) -> None:
        """A message that is prepared before it enters must not find the lane open again by then."""
        self.count += 1
        one = message(self.count, key)
        self.number[id(one)] = self.count
        self.keep.append(one)
        if self.is_shut(key):
            assert self.lanes.shut_out([one]) == [one]
            self.send_back(one)
        else:
            assert self.lanes.shut_out([one]) == []

    @rule(key=KEYS)
    def turn_back_before_it_enters(self, key: str | None) -> None:
        self.count += 1
        one = message(self.count, key)
        self.number[id(one)] = self.count
        self.keep.append(one)
        self.lanes.turn_back([one])
        if key is not None:
            self.send_back(one)

    @precondition(lambda self: self.started)
    @rule(data=st.data(), settled_first=st.booleans())
    def succeed(self, data: st.DataObject, settled_first: bool) -> None:
        """The handler returns, which opens the lane; or it has acked its message before."""
        one = data.draw(st.sampled_from(self.started))
        self.started.remove(one)
        one.state = SETTLED
        if one in self.overtaken:
            self.overtaken.remove(one)
        if settled_first:
            self.follow(one.key, self.lanes.finish(one))
        else:
            self.returned.append(one)
            self.follow(one.key, self.lanes.returned(one, batched=False))

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
        if one in self.overtaken:
            self.overtaken.remove(one)
        self.goes_back(one)

    def goes_back(self, one: Message[Any]) -> None:
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
            numbers = [self.number[id(one)] for one in (*self.batched[key], *running, *self.waiting[key])]
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
        while self.started or self.back or any(self.batched.values()):
            if self.back:
                one = self.back.pop()
            elif any(self.batched.values()):
                one = next(lane.pop() for lane in self.batched.values() if lane)
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


def test_what_is_in_batches_counts_for_the_share_of_a_hot_key() -> None:
    lanes = Lanes()
    first, second, third = message(1), message(2), message(3)
    lanes.enter([first], 1)
    assert lanes.returned(first, batched=True) is None
    assert lanes.enter([second], 1) == ([], [second])
    assert lanes.finish(first) is None
    assert lanes.enter([third], 1) == ([], [third])  # it may not pass the second
    assert lanes.finish(second) is None
    assert lanes.finish(third) is None
    assert lanes.enter([second], 1) == ([second], [])


def test_one_that_is_released_as_a_success_keeps_its_lane_shut_until_the_broker_has_it() -> None:
    lanes = Lanes()
    first, second = message(1), message(2)
    lanes.enter([first])
    assert lanes.shut(first) == []
    assert lanes.returned(first, batched=False) is None
    assert lanes.enter([second]) == ([], [second])


class TurnsMachine(RuleBasedStateMachine):
    """Turns beside a list of the batches that have not ended, in the order in which they were emitted."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()
        self.count = 0
        self.batches: dict[int, set[str]] = {}

    def free(self, batch: int) -> bool:
        earlier = [keys for other, keys in self.batches.items() if other < batch]
        return not any(keys & self.batches[batch] for keys in earlier)

    @rule(keys=st.sets(st.sampled_from("abcd")))
    def emit(self, keys: set[str]) -> None:
        self.count += 1
        self.batches[self.count] = keys
        self.turns.enter(self.count, keys)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from([one for one in self.batches if self.free(one)]))
        del self.batches[batch]
        self.turns.end(batch)
        self.turns.end(batch)

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), key=st.sampled_from("abcd"))
    def leave(self, data: st.DataObject, key: str) -> None:
        batch = data.draw(st.sampled_from(list(self.batches)))
        self.batches[batch].discard(key)
        self.turns.leave(batch, [key])

    @invariant()
    def those_may_run_that_share_no_key_with_an_earlier_one(self) -> None:
        for batch in self.batches:
            assert self.turns.is_free(batch) == self.free(batch)

    @invariant()
    def one_may_always_run(self) -> None:
        assert not self.batches or any(map(self.turns.is_free, self.batches))

    def teardown(self) -> None:
        for batch in self.batches:
            self.turns.end(batch)
        assert self.turns._batches == {}
        assert self.turns._keys == {}


TurnsMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestBatchesThatShareAKeyRunInTheOrderInWhichTheyWereEmitted = TurnsMachine.TestCase


def test_what_ended_on_its_way_here_takes_no_place_in_its_lane() -> None:
    lanes = Lanes()
    gone, later = Message[Any]("t", b"", "1", "k", state=SETTLED), Message[Any]("t", b"", "2", "k")
    assert lanes.enter([gone, later]) == ([later], [])
