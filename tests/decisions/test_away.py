"""What is away, and what waits behind it."""

from __future__ import annotations

import random

import pytest

from sluiceway._decisions.away import Away


def test_what_comes_behind_one_that_is_away_may_not_be_handed_out() -> None:
    away: Away[str] = Away()
    assert away.comes("k", 1, "a")
    away.goes("a", 10.0)
    assert not away.comes("k", 2, "b")
    assert away.comes("other", 2, "c")


def test_what_is_parked_is_called_when_the_one_before_it_has_come() -> None:
    away: Away[str] = Away()
    away.comes("k", 1, "a")
    away.goes("a", 10.0)
    for place, token in ((3, "c"), (2, "b")):
        away.comes("k", place, token)
        away.parks(token, 40.0, behind_held=False)
    assert (away.calls(5.0), away.parked) == ([], 2)
    assert away.comes("k", 1, "a again")
    assert away.calls(10.0) == ["b", "c"]
    assert not away.comes("k", 3, "c again")  # b was called and has not come
    assert away.comes("k", 2, "b again")


@pytest.mark.parametrize("goes_back", ["before", "after"])
def test_what_came_twice_and_is_settled_once_holds_nobody_up(goes_back: str) -> None:
    away: Away[str] = Away()
    assert away.comes("k", 1, "a")
    assert away.comes("k", 1, "a too")
    if goes_back == "before":
        away.goes("a too", 5.0)
    away.ends("a")
    if goes_back == "after":
        away.goes("a too", 5.0)
    assert away.comes("k", 2, "b"), "the first one does not come any more"
    away.parks("b", 40.0, behind_held=True)
    assert away.calls(6.0) == ["b"]
    away.comes("k", 2, "b again")
    away.ends("b again")
    assert away.calls(7.0) == []
    assert not away._lanes
    assert not away._where


def test_what_was_parked_behind_one_that_is_held_waits_until_that_is_settled() -> None:
    away: Away[str] = Away()
    for place, token in enumerate("abc"):
        away.comes("k", place, token)
    away.parks("c", 40.0, behind_held=True)
    away.ends("a")
    assert away.calls(1.0) == []
    away.ends("b")
    assert away.calls(1.0) == ["c"]


def test_two_parked_in_any_order_wait_for_what_is_held_and_not_for_each_other() -> None:
    away: Away[str] = Away()
    for place, token in enumerate("abc"):
        away.comes("k", place, token)
    away.goes("a", 2.0)
    away.parks("c", 40.0, behind_held=True)
    away.parks("b", 40.0, behind_held=True)
    assert away.calls(1.0) == []
    away.comes("k", 0, "a again")
    assert away.calls(2.0) == ["b", "c"]


def test_what_comes_by_itself_in_a_moment_is_not_called() -> None:
    away: Away[str] = Away()
    away.comes("k", 1, "a")
    away.comes("k", 2, "b")
    away.parks("b", 10.0, behind_held=True)
    away.ends("a")
    assert away.calls(9.5) == []
    assert away.parked == 0
    assert away.comes("k", 2, "b again")


def test_no_more_are_called_at_once_than_said_and_the_others_follow() -> None:
    away: Away[int] = Away(most=2)
    away.comes("k", 0, 0)
    away.goes(0, 5.0)
    for place in range(1, 6):
        away.comes("k", place, place)
        away.parks(place, 40.0, behind_held=False)
    away.comes("k", 0, 10)
    assert away.calls(5.0) == [1, 2]
    assert away.calls(5.0) == []
    assert away.comes("k", 1, 11)
    assert away.comes("k", 2, 12)
    assert away.calls(5.0) == [3, 4]
    assert away.parked == 1


def test_a_token_that_is_not_known_changes_nothing() -> None:
    away: Away[str] = Away()
    away.ends("x")
    away.goes("x", 1.0)
    away.parks("x", 1.0, behind_held=True)
    assert away.comes("k", 1, "a")
    away.goes("a", 1.0)
    away.ends("a")  # as when a settlement is sent again
    assert not away.comes("k", 2, "b")


def test_what_came_again_while_its_last_delivery_was_in_hand_stays_in_hand() -> None:
    away: Away[str] = Away()
    away.comes("k", 1, "a")
    away.comes("k", 1, "a again")
    away.goes("a", 9.0)
    assert away.comes("k", 2, "b")


def test_what_never_comes_is_overdue_and_nothing_waits_for_it_when_it_is_forgotten() -> None:
    away: Away[str] = Away()
    away.expect("k", 1, 10.0)
    assert not away.comes("k", 2, "b")
    away.parks("b", 40.0, behind_held=False)
    assert away.overdue(10.0) == []
    assert away.overdue(11.0) == [("k", 1)]
    assert away.coming(11.0) == 1
    away.forgets("k", 1)
    assert away.calls(12.0) == ["b"]


def test_a_message_is_parked_until_the_one_in_its_way_is_due() -> None:
    away: Away[str] = Away()
    away.expect("k", 1, 3600.0)
    away.comes("k", 2, "b")
    assert away.next_due("b", 30.0) == 3600.0
    assert away.next_due("x", 30.0) == 30.0


def test_keys_that_are_done_leave_nothing_behind() -> None:
    away: Away[int] = Away()
    for place in range(100):
        away.comes(place % 7, place, place)
        away.goes(place, 1.0)
        away.comes(place % 7, place, 100 + place)
        away.ends(100 + place)
        away.calls(2.0)
    assert not away._lanes
    assert not away._where
    assert away.all_parked() == []


@pytest.mark.parametrize("seed", range(30))
def test_each_key_is_handled_in_order_though_what_went_back_comes_at_any_time(seed: int) -> None:
    chance = random.Random(seed)
    away: Away[int] = Away(most=3)
    fresh = list(range(60))  # places that the broker hands over in order; the key is the place modulo 3
    back: list[int] = []  # places that it hands over when it likes
    parked: dict[int, int] = {}
    held: dict[int, int] = {}  # what the source handed out, by token, in order
    done: list[int] = []
    token = 0
    for now in range(5000):
        if (fresh or back) and chance.random() < 0.6:
            again = bool(back) and (not fresh or chance.random() < 0.3)
            place = back.pop(chance.randrange(len(back))) if again else fresh.pop(0)
            token += 1
            if away.comes(place % 3, place, token):
                held[token] = place
            else:
                away.parks(token, now + 1e6, behind_held=False)
                parked[token] = place
        if held and chance.random() < 0.5:
            one, place = next(iter(held.items()))
            del held[one]
            if chance.random() < 0.3:  # it fails, and what is behind it in hand is parked
                away.goes(one, float(now))
                for other in [other for other, at in held.items() if at % 3 == place % 3]:
                    away.parks(other, now + 1e6, behind_held=True)
                    parked[other] = held.pop(other)
                back.append(place)
            else:
                away.ends(one)
                done.append(place)
        back += [parked.pop(called) for called in away.calls(float(now))]
    for key in range(3):
        assert [place for place in done if place % 3 == key] == list(range(key, 60, 3))
    assert (away.parked, away.overdue(1e9)) == (0, [])


def test_all_that_are_away_tell_when_they_come() -> None:
    away: Away[str] = Away()
    for place, token in enumerate("abc"):
        away.comes("k", place, token)
    away.goes("b", 5.0)
    away.parks("c", 7.0, behind_held=True)
    assert away.dues() == [(1, 5.0), (2, 7.0)]
    assert (away.first_due("k", 1.0), away.first_due("k", 6.0), away.first_due("other", 1.0)) == (5.0, 6.0, 1.0)
