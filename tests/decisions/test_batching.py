"""Forming batches: every message in one batch, in order, and gone in time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sluiceway._decisions.batching import Change, Emitted, Forming
from sluiceway.batch import Split
from sluiceway.errors import OptionError
from sluiceway.message import Message, Routing

KEYS = st.sampled_from([None, "a", "b", ("c", 1)])


def message(number: int = 0, *, key: Any = None, flush: bool = False) -> Message[Any]:
    routing = Routing(key=key, flush=flush) if flush or key is not None else None
    return Message("t", b"", str(number), routing=routing)


class FormingMachine(RuleBasedStateMachine):
    """Forming beside a model that keeps, per key, a plain list and the time of its first message."""

    @initialize(size=st.integers(1, 5), timeout=st.floats(0.1, 10))
    def start(self, size: int, timeout: float) -> None:
        self.forming = Forming("default", size, timeout)
        self.plain, self.nearly_full = self.forming.plain()
        self.now = 0.0
        self.added = 0
        self.model: dict[Any, list[Message[Any]]] = {}
        self.opened: dict[Any, float] = {}
        self.emitted: list[Message[Any]] = []

    @rule(key=KEYS, flush=st.booleans(), step=st.floats(0, 3), quickly=st.booleans())
    def add(self, key: Any, flush: bool, step: float, quickly: bool) -> None:
        self.now += step
        self.added += 1
        one = message(self.added, key=key, flush=flush)
        expected = [*self.model.get(key, ()), one]
        change: Change | None = None
        if quickly and self.plain and len(self.plain) < self.nearly_full and one.routing is None:
            one.value = self.added  # as a processor does
            self.plain.append(one)
        else:
            change = self.forming.add(one, self.added)
        assert change is None or change.key == key
        assert one.value == self.added
        kind = None if change is None else change.kind
        if kind == "opened":
            assert key not in self.model
            assert self.forming.opened(key, self.now) == self.now + self.forming.timeout
            self.opened[key] = self.now
        self.model[key] = expected
        assert (kind in ("size", "flush")) == (flush or len(expected) >= self.forming.size)
        assert (kind == "flush") == flush
        if kind == "size" or kind == "flush":
            self.check(self.forming.take(key, kind), key, kind)

    @rule(step=st.floats(0, 20))
    def take_due(self, step: float) -> None:
        self.now += step
        due = [key for key, at in self.opened.items() if at + self.forming.timeout <= self.now]
        batches = self.forming.take_due(self.now)
        assert [info.key for _, info in batches] == due
        for batch in batches:
            self.check(batch, batch[1].key, "timeout")

    @rule()
    def take_oldest(self) -> None:
        emitted = self.forming.take_oldest()
        if emitted is None:
            assert not self.model
        else:
            assert emitted[1].key == next(iter(self.model))
            self.check(emitted, emitted[1].key, "starved")

    @rule()
    def drain(self) -> None:
        for batch in self.forming.take_all("drain"):
            self.check(batch, batch[1].key, "drain")
        assert not self.model

    def check(self, emitted: Emitted, key: Any, trigger: str) -> None:
        messages, info = emitted
        assert messages == self.model.pop(key)
        assert 1 <= len(messages) == info.size <= self.forming.size
        assert (info.key, info.trigger, info.batcher) == (key, trigger, "default")
        self.opened.pop(key, None)
        self.emitted.extend(messages)

    @invariant()
    def every_message_is_in_one_place(self) -> None:
        if not hasattr(self, "forming"):
            return
        assert self.forming.count == sum(map(len, self.model.values()))
        assert self.forming.count + len(self.emitted) == self.added
        assert len(set(map(id, self.emitted))) == len(self.emitted)
        first = min(self.opened.values(), default=None)
        due = None if first is None else first + self.forming.timeout
        assert self.forming.next_due() == due
        assert self.forming.oldest_due() == (float("inf") if due is None else due)


TestEveryMessageIsInOneBatchInOrderAndGoesInTime = FormingMachine.TestCase


@given(values=st.lists(st.integers(0, 100), max_size=60), size=st.integers(1, 7))
def test_messages_are_split_by_the_key_of_what_their_handler_returned(values: list[int], size: int) -> None:
    forming = Forming("default", size, 1.0, lambda value: value % 3)
    batches = []
    for value in values:
        one = message(value)
        change = forming.add(one, value)
        if change is not None and change.kind == "size":
            batches.append(forming.take(change.key, "size"))
    batches += forming.take_all("drain")
    by_key: defaultdict[Any, list[int]] = defaultdict(list)
    for messages, info in batches:
        assert {one.value % 3 for one in messages} == {info.key}
        by_key[info.key] += [one.value for one in messages]
    assert by_key == {key: [value for value in values if value % 3 == key] for key in by_key}
    assert sum(map(len, by_key.values())) == len(values)


def test_a_key_given_by_the_handler_wins_over_the_batchers_key_function() -> None:
    forming = Forming("default", 10, 1.0, lambda value: "computed")
    forming.add(message(key="given"), "value")
    assert forming.take("given", "drain")[1].key == "given"


@pytest.mark.parametrize("key", [lambda value: [value], lambda value: 1 / 0], ids=["no hash", "raises"])
def test_a_key_that_fails_leaves_nothing_behind(key: Any) -> None:
    forming = Forming("default", 10, 1.0, key)
    one = message()
    with pytest.raises((TypeError, ZeroDivisionError)):
        forming.add(one, "value")
    assert forming.count == 0
    assert forming.take_all("drain") == []


def test_a_batch_of_one_is_full_at_once_and_has_no_time() -> None:
    forming = Forming("default", 1, 1.0)
    assert forming.add(message(), None) == (None, "size")
    assert forming.plain()[1] == 0
    forming.take(None, "size")
    assert forming.next_due() is None


def batches_of(forming: Forming, values: list[int], *, key: Any = None) -> list[list[int]]:
    """The values of the batches that are full after these."""
    batches = []
    for value in values:
        change = forming.add(message(value, key=key), value)
        if change is not None and change.kind != "opened":
            batches.append([one.value for one in forming.take(change.key, change.kind)[0]])
    return batches


def test_a_split_says_when_a_batch_is_full_and_the_message_that_fills_it_is_in_it() -> None:
    split = Split(0, lambda total, one: (total + one.value, total + one.value >= 16))
    assert batches_of(Forming("default", 100, 1.0, split=split), [40, 1]) == [
        [40],
        [1],
    ]  # it goes on with what the step returned: 40, which is full
    split = Split(0, lambda n, one: (0, True) if n + one.value > 15 else (n + 1, False))
    assert batches_of(Forming("default", 100, 1.0, split=split), [14, 1, 14]) == [[14, 1, 14]]


def test_each_key_has_an_accumulator_of_its_own() -> None:
    split = Split(0, lambda sum_, one: (0, True) if sum_ + one.value >= 16 else (sum_ + one.value, False))
    forming = Forming("default", 100, 1.0, lambda value: value % 2, split)
    assert batches_of(forming, [40, 1, 13, 2, 3]) == [[40], [1, 13, 3]]
    assert [one.value for one in forming.take(0, "drain")[0]] == [2]


@pytest.mark.parametrize("trigger", ["size", "timeout", "flush", "drain", "revoke", "starved"])
def test_after_any_other_end_of_a_batch_the_accumulator_begins_anew(trigger: Any) -> None:
    forming = Forming("default", 100, 1.0, split=Split(0, lambda n, _: (n + 1, n == 2)))
    assert batches_of(forming, [1, 2]) == []
    forming.take(None, trigger)
    assert batches_of(forming, [3, 4]) == []
    assert batches_of(forming, [5]) == [[3, 4, 5]]


def test_the_size_bounds_what_a_split_would_let_grow() -> None:
    forming = Forming("default", 2, 1.0, split=Split(None, lambda *_: (None, False)))
    assert batches_of(forming, [1, 2, 3]) == [[1, 2]]


def test_a_split_that_raises_leaves_the_message_out() -> None:
    forming = Forming("default", 10, 1.0, split=Split(0, lambda n, one: (n, 1 // one.value > n)))
    forming.add(message(), 2)
    with pytest.raises(ZeroDivisionError):
        forming.add(message(), 0)
    assert forming.count == 1


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=30), limit=st.integers(1, 100))
def test_by_bytes_a_batch_is_full_with_the_body_that_reaches_the_limit(sizes: list[int], limit: int) -> None:
    forming = Forming("default", 1_000, 1.0, split=Split.bytes(limit))
    batches = []
    for size in sizes:
        change = forming.add(Message("t", b"x" * size, "1"), None)
        if change is not None and change.kind == "split":
            batches.append(forming.take(change.key, "split")[0])
    for batch in batches:
        lengths = [len(one.body) for one in batch]
        assert sum(lengths) >= limit > sum(lengths[:-1])
    rest = forming.take_all("drain")
    assert sum(len(one.body) for messages, _ in rest for one in messages) < limit


@pytest.mark.parametrize("limit", [0, -1, 1.5])
def test_by_bytes_needs_a_limit_of_at_least_one(limit: Any) -> None:
    with pytest.raises(OptionError, match="limit must be 1 or more bytes"):
        Split.bytes(limit)
