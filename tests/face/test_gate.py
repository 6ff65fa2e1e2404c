"""Gates by themselves: Pause, and what the others allow."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from sluiceway import App, CircuitBreaker, Message, OptionError, Pause, RateLimit
from sluiceway.gate import Watcher


class Pipeline:
    """What a pipeline does with a gate."""

    def __init__(self, pause: Pause) -> None:
        self.told = 0
        pause.on_change(self.changed)

    def changed(self) -> None:
        self.told += 1


def test_an_open_pause_allows_all_and_a_closed_one_nothing() -> None:
    pause = Pause()
    assert pause.allow(0.0, 10) == 10
    pause.close()
    assert pause.allow(0.0, 10) == 0
    assert pause.opens_at(0.0) is None
    pause.open()
    assert pause.allow(0.0, 10) == 10


def test_every_pipeline_that_shares_it_is_told_once_per_change() -> None:
    pause = Pause()
    one, other = Pipeline(pause), Pipeline(pause)
    for change in (pause.open, pause.close, pause.close, pause.open, pause.open):
        change()
    assert (one.told, other.told) == (2, 2)


def test_a_plain_function_is_told_too() -> None:
    told: list[bool] = []
    pause = Pause()
    pause.on_change(lambda: told.append(pause.closed))
    gc.collect()
    pause.close()
    assert told == [True]


def test_a_pipeline_that_ended_is_forgotten() -> None:
    pause = Pause()
    for _ in range(3):
        Pipeline(pause)
    gc.collect()
    alive = Pipeline(pause)
    pause.close()
    assert alive.told == 1
    assert len(pause._changes._calls) == 1


async def test_two_consumers_that_share_a_pause_stop_and_go_on_together() -> None:
    pause = Pause()
    app = App("memory://")
    seen: list[str] = []

    async def handle(message: Message[str]) -> None:
        seen.append(message.payload)

    app.consumer("a", name="a", gates=[pause])(handle)
    app.consumer("b", name="b", gates=[pause])(handle)
    async with app.running() as manager:
        await manager.idle(0.01)  # both wait in a receive
        pause.close()
        await app.publish("a", "first")
        await app.publish("b", "second")
        assert seen == []
        pause.open()
        await manager.idle(0.01)
    assert sorted(seen) == ["first", "second"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 1), "messages must be a whole number, 1 or more; got 0"),
        ((1.5, 1), "messages must be a whole number, 1 or more; got 1.5"),
        ((1, 0), "seconds must be more than 0; got 0"),
        ((1, True), "seconds must be more than 0; got True"),
        ((1, float("inf")), "seconds must be more than 0; got inf"),
        ((2, 1, 3), r"burst must be a whole number from 1 to messages \(2\); got 3"),
    ],
)
def test_what_a_rate_limit_does_not_allow_is_said(arguments: tuple[Any, ...], text: str) -> None:
    messages, seconds, *burst = arguments
    with pytest.raises(OptionError, match=text):
        RateLimit(messages, seconds, burst=burst[0] if burst else None)


def test_a_change_that_is_not_allowed_changes_nothing() -> None:
    limit = RateLimit(5, 10, burst=3)
    with pytest.raises(OptionError, match="burst must be"):
        limit.change(messages=2)
    assert (limit.messages, limit.seconds, limit.burst, limit.allowed) == (5, 10.0, 3, 3)


def test_it_is_a_gate_that_watches() -> None:
    assert isinstance(CircuitBreaker(), Watcher)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"failures": 0}, "failures must be a whole number, 1 or more; got 0"),
        ({"within": 0}, "within must be seconds, more than 0; got 0"),
        ({"reset_after": -1}, "reset_after must be seconds, more than 0; got -1"),
        ({"max_reset_after": 1}, r"max_reset_after must be seconds, reset_after \(30.0\) or more; got 1"),
        ({"on": ()}, r"on must be an exception type or a tuple of them; got \(\)"),
        ({"on": "Error"}, "on must be an exception type or a tuple of them; got 'Error'"),
        ({"on_state": 1}, r"on_state must be a function \(breaker\), or None; got 1"),
    ],
)
def test_what_a_circuit_breaker_does_not_allow_is_said(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=f"CircuitBreaker 'db': {text}"):
        CircuitBreaker("db", **options)


@pytest.mark.parametrize("name", [5, "", None])  # a number is meant as `failures`
def test_the_first_argument_of_a_circuit_breaker_is_its_name(name: Any) -> None:
    with pytest.raises(OptionError, match=f"name must be a non-empty string; got {name!r}"):
        CircuitBreaker(name)
