"""What is written beside a committed offset can be read again, and nothing else is taken for it."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sluiceway._decisions.commit_metadata import LIMIT, NOTHING, Note, Run, Told, decode, encode

LOG = "h3kVtIXYTgSuKcLZ0wpZ0A 3"
NOTES = st.builds(Note, st.integers(1, 500), st.integers(0, 500), st.integers(0, 500))
RUNS = st.lists(st.tuples(st.integers(1, 10**7), st.booleans() | NOTES), max_size=40)
OFFSETS = st.integers(0, 2**63 - 1)


def known(offset: int, runs: list[Run] | tuple[Run, ...]) -> list[tuple[int, int, object]]:
    """Where something is known: from, to, what; what is alike and without a gap is one."""
    found: list[tuple[int, int, object]] = []
    for length, what in runs:
        if what is not False:
            if found and found[-1][1:] == (offset, what):
                found[-1] = (found[-1][0], offset + length, what)
            else:
                found.append((offset, offset + length, what))
        offset += length
    return found


@given(offset=OFFSETS, window=st.integers(0, 10**6), runs=RUNS)
def test_what_is_written_is_read(offset: int, window: int, runs: list[Run]) -> None:
    told = decode(encode(offset, LOG, window, runs), offset, LOG)
    assert told.window == window
    assert known(offset, told.runs) == known(offset, runs)


@given(runs=RUNS, short=st.integers(0, 400))
def test_it_is_as_long_as_it_may_be_or_not_at_all(runs: list[Run], short: int) -> None:
    whole = encode(7, LOG, 5, runs)
    assert whole is not None
    assert encode(7, LOG, 5, runs, limit=len(whole)) == whole
    assert encode(7, LOG, 5, runs, limit=len(whole) - 1 - short) is None


@pytest.mark.parametrize(
    ("stuck", "between"),
    [([False], 5_000), ([False, Note(2)], 5_000), ([Note(2, failures, 1) for failures in range(20)], 500)],
)
def test_a_thousand_that_are_stuck_fit_whatever_finished_between_them(stuck: list[Note | bool], between: int) -> None:
    chance = random.Random(1)
    runs: list[Run] = []
    for _ in range(1000):
        runs += [(1, chance.choice(stuck)), (chance.randint(1, between), True)]
    assert len(written(10**12, LOG, 1000, runs)) <= LIMIT


def test_the_text_is_short() -> None:
    for runs, most in ([], 24), ([(1, False), (1_000_000, True)], 30), ([(5, True), (1000, False)], 24):
        assert len(written(10**12, LOG, 1000, runs)) <= most


def written(offset: int, log: str, window: int, runs: list[Run]) -> str:
    text = encode(offset, log, window, runs)
    assert text is not None
    return text


FOREIGN = st.text(max_size=100) | st.text(string.ascii_letters + string.digits + "-_=", max_size=100).map(
    "sluiceway1:".__add__
)


@given(metadata=FOREIGN)
@example("")
@example("sluiceway1:")
@example("sluiceway1:=")
@example("sluiceway1:AAAAAAA")
@example("sluiceway1:ééé")
def test_what_others_wrote_tells_nothing(metadata: str) -> None:
    assert decode(metadata, 7, LOG) == NOTHING


def test_no_metadata_tells_nothing() -> None:
    assert decode(None, 7, LOG) == NOTHING == Told(0, ())


def test_a_later_version_tells_nothing() -> None:
    text = written(7, LOG, 5, [(1, True)])
    assert decode(text.replace("sluiceway1:", "sluiceway2:"), 7, LOG) == NOTHING


@pytest.mark.parametrize(("offset", "log"), [(8, LOG), (6, LOG), (7, "h3kVtIXYTgSuKcLZ0wpZ0A 4"), (7, "")])
def test_beside_another_offset_or_in_another_log_it_tells_nothing(offset: int, log: str) -> None:
    text = written(7, LOG, 5, [(1, False), (9, True)])
    assert decode(text, 7, LOG) == Told(5, ((1, False), (9, True)))
    assert decode(text, offset, log) == NOTHING


@given(data=st.data(), runs=RUNS.filter(bool))
def test_what_was_cut_or_changed_tells_nothing(data: st.DataObject, runs: list[Run]) -> None:
    text = written(7, LOG, 5, runs)
    at = data.draw(st.integers(0, len(text) - 1))
    assert decode(text[:at], 7, LOG) == NOTHING
    if text[at] != "=" and at < len(text.rstrip("=")) - 1:  # the last letter may have bits of no meaning
        other = data.draw(st.sampled_from(string.ascii_letters).filter(lambda letter: letter != text[at]))
        assert decode(text[:at] + other + text[at + 1 :], 7, LOG) == NOTHING
