"""Pause: the gate that a person opens and closes."""

from __future__ import annotations

import gc

from sluiceway import App, Message, Pause


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
    assert len(pause._calls) == 1


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
