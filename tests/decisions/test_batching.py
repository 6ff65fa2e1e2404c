"""Forming batches: every message in one batch, in order, and gone in time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sluiceway._decisions.batching import Emitted, Forming
from sluiceway.message import BATCHED, Message

KEYS = st.sampled_from([None, "a", "b", ("c", 1)])


def message(number: int = 0, *, key: Any = None, flush: bool = False) -> Message[Any]:
    return Message("t", b"", str(number), batch_key=key, flush=flush)


class FormingMachine(RuleBasedStateMachine):
    """Forming beside a model that keeps, per key, a plain list and the time of its first message."""

    @initialize(size=st.integers(1, 5), timeout=st.floats(0.1, 10))
    def start(self, size: int, timeout: float) -> None:
        self.forming = Forming("default", size, timeout)
        self.now = 0.0
        self.added = 0
        self.model: dict[Any, list[Message[Any]]] = {}
        self.opened: dict[Any, float] = {}
        self.emitted: list[Message[Any]] = []

    @rule(key=KEYS, flush=st.booleans(), step=st.floats(0, 3))
    def add(self, key: Any, flush: bool, step: float) -> None:
        self.now += step
        self.added += 1
        one = message(self.added, key=key, flush=flush)
        expected = [*self.model.get(key, ()), one]
        change = self.forming.add(one, self.added)
        assert one.state == BATCHED
        assert one.value == self.added
        if change == "opened":
            assert key not in self.model
            assert self.forming.opened(key, self.now) == self.now + self.forming.timeout
            self.opened[key] = self.now
        self.model[key] = expected
        assert (change in ("full", "flush")) == (flush or len(expected) >= self.forming.size)
        assert (change == "flush") == flush
        if change in ("full", "flush"):
            self.check(self.forming.take(key, "size"), key, "size")

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
        if forming.add(one, value) == "full":
            batches.append(forming.take(one.batch_key, "size"))
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
    assert one.state != BATCHED
    assert forming.take_all("drain") == []


def test_a_batch_of_one_is_full_at_once_and_has_no_time() -> None:
    forming = Forming("default", 1, 1.0)
    assert forming.add(message(), None) == "full"
    forming.take(None, "size")
    assert forming.next_due() is None
