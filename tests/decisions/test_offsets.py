"""How far an offset may be committed, and what is known above it, whatever the order in which records finish."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluiceway._decisions.commit_metadata import LIMIT, Note, Told, decode
from sluiceway._decisions.offsets import Commit, Offsets

LOG = "orders 0"


def successor(commit: Commit | None) -> Offsets:
    """What the next owner of the partition begins with."""
    assert commit is not None
    return Offsets(commit.offset, decode(commit.metadata, commit.offset, LOG))


def taken(offsets: Sequence[int], start: int = 0) -> Offsets:
    made = Offsets(start)
    assert list(made.take(offsets)) == list(offsets)
    return made


def test_nothing_is_committed_past_a_record_that_is_not_finished() -> None:
    offsets = taken([5, 6, 7, 8], start=5)
    offsets.finish([6, 8])
    assert offsets.watermark == 5
    offsets.finish([5])
    assert offsets.watermark == 7
    assert offsets.finished_above == 1
    offsets.finish([7])
    assert (offsets.watermark, offsets.finished_above, len(offsets)) == (9, 0, 0)


def test_gaps_between_offsets_hold_up_nothing() -> None:
    offsets = taken([3, 10, 11, 40])
    offsets.finish([3])
    assert offsets.watermark == 10
    offsets.finish([10, 11, 40])
    assert offsets.watermark == offsets.position == 41


def test_offsets_without_a_record_at_the_end_of_the_log_can_be_committed_too() -> None:
    offsets = taken([0, 1])
    offsets.reach(4)
    assert (offsets.watermark, offsets.position, offsets.finished_above) == (0, 4, 0)
    offsets.finish([0, 1])
    assert offsets.watermark == 4
    offsets.reach(2)
    assert (offsets.watermark, offsets.position) == (4, 4)
    with pytest.raises(ValueError, match="3 came where 4"):
        offsets.take([3])


def test_while_something_is_read_again_the_end_of_the_log_stays_where_it_is() -> None:
    offsets = taken([0, 1])
    offsets.release([0])
    offsets.rewind()
    offsets.reach(4)
    assert (offsets.position, offsets.take([0, 1, 2])) == (0, [0, 2])


def test_before_the_first_record_the_watermark_is_the_start() -> None:
    offsets = Offsets(17)
    assert offsets.watermark == offsets.position == 17
    assert offsets.commit(LOG, 0) == (17, ANY)
    assert offsets.take([]) == []


def test_what_finishes_twice_or_never_came_changes_nothing() -> None:
    offsets = taken([1, 2])
    offsets.finish([2, 2, 99])
    offsets.finish([2])
    assert (offsets.watermark, len(offsets)) == (1, 1)
    assert list(offsets.take([99])) == [99]


def test_records_that_are_in_hand_or_finished_are_not_handed_out_again() -> None:
    offsets = taken([0, 1, 2, 3])
    offsets.finish([1])
    offsets.release([0, 3])
    assert offsets.rewind() == offsets.position == 0
    assert offsets.take([0, 1, 2]) == [0]
    assert offsets.take([3, 4]) == [3, 4]
    assert offsets.rewind() is None
    assert offsets.watermark == 0


def test_a_log_that_goes_back_by_itself_is_refused_and_changes_nothing() -> None:
    offsets = taken([500, 501])
    with pytest.raises(ValueError, match="offset 0 came where 502 or a later one was due"):
        offsets.take([0, 1])
    assert (offsets.position, offsets.watermark) == (502, 500)


def test_what_was_released_is_not_finished() -> None:
    offsets = taken([0, 1])
    offsets.release([0])
    offsets.finish([1])
    assert offsets.watermark == 0
    assert offsets.rewind() == 0
    offsets.finish([0])  # it has left the log
    assert offsets.rewind() is None
    assert offsets.watermark == 2


def test_a_new_owner_skips_what_is_finished_above_the_watermark() -> None:
    offsets = taken(range(10))
    offsets.finish([3, 4, 8])
    commit = offsets.commit(LOG, 0)
    after = successor(commit)
    assert after.take([0, 1, 2, 3]) == [0, 1, 2]
    middle = successor(after.commit(LOG, 0))  # which has not read all that it was told of
    assert middle.take(range(12)) == [0, 1, 2, 5, 6, 7, 9, 10, 11]
    assert middle.finished_above == 3


def test_an_owner_that_left_in_good_order_puts_nobody_under_suspicion() -> None:
    offsets = taken(range(10))
    after = successor(offsets.commit(LOG, 0))
    assert [after.note(one).deliveries for one in after.take(range(20))] == [1] * 20


def test_after_a_death_the_first_of_its_window_were_handed_out_before_and_the_others_were_not() -> None:
    offsets = taken(range(10))
    offsets.finish([2, 5])
    after = successor(offsets.commit(LOG, 4))
    assert after.take([0, 1, 2]) == [0, 1]
    third = successor(after.commit(LOG, 0))  # it leaves in good order, and has not met all suspects
    wanted = third.take(range(2 + 10))
    assert wanted == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    assert [third.note(one).deliveries for one in wanted] == [3, 3, 2, 2, 1, 1, 1, 1, 1, 1]


def test_a_release_is_not_counted_and_the_next_hand_over_is() -> None:
    offsets = successor(taken([0, 1]).commit(LOG, 1))
    assert offsets.take([0, 1]) == [0, 1]
    offsets.release([0, 1])
    offsets.release([0])
    assert (offsets.note(0).deliveries, offsets.note(1).deliveries) == (1, 1)
    assert offsets.rewind() == 0
    offsets.take([0, 1])
    assert (offsets.note(0).deliveries, offsets.note(1).deliveries) == (2, 1)


def test_counts_that_are_written_outlive_the_owner_until_the_record_is_finished() -> None:
    offsets = taken(range(5))
    offsets.write(1, Note(deliveries=1, failures=1))
    offsets.write(3, Note(deliveries=3, suspicions=2))
    offsets.write(9, Note(failures=5))  # it has not come
    after = successor(offsets.commit(LOG, 0))
    after.take([0, 1])
    assert after.note(1) == Note(2, 1, 0)
    third = successor(after.commit(LOG, 0))
    third.take(range(10))
    assert (third.note(1), third.note(3), third.note(9)) == (Note(3, 1, 0), Note(4, 0, 2), Note())
    third.hand_out(1)
    third.hand_out(2)
    assert (third.note(1), third.note(2)) == (Note(4, 1, 0), Note())
    third.finish(range(10))
    third.write(3, Note(failures=1))
    assert third.commit(LOG, 0) == Offsets(10).commit(LOG, 0)


def test_counts_keep_their_record_where_offsets_have_gaps() -> None:
    log = [0, 3, 9, 10, 20]
    offsets = taken(log)
    for offset in (3, 10, 20):
        offsets.write(offset, Note(failures=offset))
    offsets.finish([9])
    after = successor(offsets.commit(LOG, 0))
    assert after.take(log) == [0, 3, 10, 20]
    assert [after.note(offset).failures for offset in log] == [0, 3, 0, 10, 20]


def test_what_does_not_fit_is_not_committed_until_it_does() -> None:
    offsets = taken(range(400))
    offsets.finish(range(1, 400, 2))
    assert offsets.commit(LOG, 0, limit=200) is None
    offsets.finish(range(100, 400))
    commit = offsets.commit(LOG, 0, limit=200)
    assert successor(commit).take(range(401)) == [*range(0, 100, 2), 400]


def test_records_between_gaps_that_wait_in_order_need_no_room() -> None:
    offsets = taken(range(0, 100_000, 37))
    offsets.finish([0])
    assert offsets.commit(LOG, 1000, limit=25)


def test_a_million_finished_behind_one_that_is_not_cost_no_memory_and_little_metadata() -> None:
    offsets = taken([0])
    for start in range(1, 1_000_000, 1_000):
        batch = range(start, start + 1_000)
        offsets.take(batch)
        offsets.finish(batch)
    assert (offsets.watermark, offsets.finished_above, len(offsets)) == (0, 1_000_000, 1)
    assert sum(sys.getsizeof(one) for one in vars(offsets).values()) < 200_000
    commit = offsets.commit(LOG, 1_000, limit=40)
    assert successor(commit).take([0, 1, 999_999, 1_000_000, 1_000_001]) == [0, 1_000_001]


LOGS = st.lists(st.integers(1, 3), min_size=1, max_size=80).map(
    lambda steps: [sum(steps[: end + 1]) for end in range(len(steps))]
)


@given(log=LOGS, seed=st.integers(0, 2**32))
def test_watermark_and_counts_are_those_of_plain_sets(log: list[int], seed: int) -> None:
    chance = random.Random(seed)
    offsets, came, finished = Offsets(log[0]), list[int](), set[int]()
    last = 0
    while len(finished) < len(log):
        if len(came) < len(log) and chance.random() < 0.4:
            batch = log[len(came) : len(came) + chance.randint(1, 9)]
            assert offsets.take(batch) == batch
            came += batch
        elif came:
            some = chance.sample(came, chance.randint(1, min(5, len(came))))
            offsets.finish(some)
            finished.update(some)
        left = [one for one in came if one not in finished]
        expected = left[0] if left else came[-1] + 1 if came else log[0]
        assert offsets.watermark == expected >= last
        assert len(offsets) == len(left)
        assert offsets.finished_above == sum(one > expected for one in finished)
        last = expected


class Owners:
    """A partition that goes from owner to owner, some of whom die. It checks what each of them is handed."""

    def __init__(self, log: list[int], chance: random.Random, window: int, limit: int) -> None:
        self.log, self.chance, self.window, self.limit = log, chance, window, limit
        self.finished: set[int] = set()
        self.commit = Commit(log[0], "")
        self.settled: set[int] = set()  # finished, and told by a commit
        self.in_hand: set[int] = set()
        self.deaths = dict.fromkeys(log, 0)
        self.begins()

    def begins(self) -> None:
        self.offsets = successor(self.commit)
        self.in_hand.clear()
        self.held: set[int] = set()  # handed out and not settled; never more than the window
        self.done: set[int] = set()  # of these
        self.commits(self.window)

    def reads(self) -> None:
        at = next((nth for nth, one in enumerate(self.log) if one >= self.offsets.position), len(self.log))
        batch: list[int] = []
        room = self.window - len(self.held)
        for one in self.log[at:]:
            room -= one not in self.settled
            if room < 0:
                break
            batch.append(one)
        wanted = set(self.offsets.take(batch))
        assert not wanted & (self.settled | self.in_hand), "handed out though it was settled or in hand"
        assert wanted >= set(batch) - self.settled - self.held, "kept back though it was not finished"
        for one in wanted:
            assert self.offsets.note(one).deliveries >= 1 + self.deaths[one], "a death that is not counted"
        self.in_hand |= wanted
        self.held |= wanted
        if any(self.offsets.note(one) != Note() for one in wanted) and not self.commits(self.window):
            self.in_hand -= wanted  # nobody may have them before that is committed
            self.offsets.release(wanted)

    def finishes(self) -> None:
        if self.in_hand:
            some = self.chance.sample(sorted(self.in_hand), self.chance.randint(1, min(6, len(self.in_hand))))
            self.offsets.finish(some)
            self.finished.update(some)
            self.done.update(some)
            self.in_hand.difference_update(some)

    def releases(self) -> None:
        if self.in_hand:
            some = self.chance.sample(sorted(self.in_hand), self.chance.randint(1, min(6, len(self.in_hand))))
            self.offsets.release(some)
            self.in_hand.difference_update(some)
            self.held.difference_update(some)
            self.offsets.rewind()

    def commits(self, window: int) -> bool:
        made = self.offsets.commit(LOG, window, limit=self.limit)
        if made is None:
            return False
        assert len(made.metadata) <= self.limit
        assert made.offset >= self.commit.offset
        assert all(one in self.finished for one in self.log if one < made.offset)
        self.commit = made
        self.settled |= self.done
        self.held -= self.done
        self.done.clear()
        return True

    def dies(self) -> None:
        for one in self.in_hand:
            self.deaths[one] += 1
        self.begins()

    def leaves(self) -> None:
        self.offsets.release(list(self.in_hand))
        self.in_hand.clear()
        self.commits(0)
        self.begins()


@given(log=LOGS, seed=st.integers(0, 2**32), window=st.integers(1, 30), limit=st.sampled_from([60, LIMIT]))
def test_whoever_dies_nothing_is_lost_and_what_was_settled_never_comes_again(
    log: list[int], seed: int, window: int, limit: int
) -> None:
    chance = random.Random(seed)
    owners = Owners(log, chance, window, limit)
    for _ in range(300):
        act = chance.choices(
            [owners.reads, owners.finishes, owners.releases, owners.commits, owners.dies, owners.leaves],
            [8, 12, 2, 6, 1, 1],
        )[0]
        if act == owners.commits:
            owners.commits(window)
        else:
            act()  # type: ignore[operator]
    for _ in range(10 * len(log)):
        owners.reads()
        owners.finishes()
        owners.commits(window)
    assert owners.finished == set(log)
    assert owners.commit.offset == log[-1] + 1


@given(log=LOGS, seed=st.integers(0, 2**32))
def test_where_all_leave_in_good_order_no_record_is_ever_a_suspect(log: list[int], seed: int) -> None:
    chance = random.Random(seed)
    owners = Owners(log, chance, 10, LIMIT)
    for _ in range(200):
        chance.choice([owners.reads, owners.finishes, owners.releases, owners.leaves])()
        assert all(owners.offsets.note(one) == Note() for one in owners.in_hand)


def test_what_is_told_of_another_offset_is_not_believed() -> None:
    offsets = taken(range(10))
    offsets.finish(range(3, 10))
    commit = offsets.commit(LOG, 5)
    assert decode(commit.metadata, commit.offset + 1, LOG) == Told()
