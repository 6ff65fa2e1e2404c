"""A drain: what runs in a worker may finish, what was sent ahead goes back at once, and no worker is left."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sluiceway import Message, Pipeline

from ..runtime.recording import Broker, running
from . import handlers
from .conftest import runs, until
from .handlers import Told


async def sent_ahead(broker: Broker, told: Told) -> None:
    """Let a worker learn that messages are quick, and then run one that is not, with others behind it."""
    await broker.settled(50)
    broker.put("sleep 1.0", *["ok"] * 15)
    await until(lambda: any(what == "sleep 1.0" for _, what in told.all("start")))


async def test_what_was_sent_ahead_goes_back_at_once_and_what_runs_finishes(told: Told) -> None:
    broker = Broker(*["ok"] * 50)
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=1)
    async with running(pipeline, broker):
        await sent_ahead(broker, told)
        began = time.monotonic()
        pipeline.stop()
        await broker.until(lambda: len(broker.waiting) == 15)
        assert time.monotonic() - began < 0.9, "the message that runs was not waited for"
        assert not told.all("end")[50:]
    assert len(broker.acked) == 51
    assert {one.outcome for one in broker.ended} == {"ack", "release"}
    assert not any(one.counted for one in broker.ended if one.outcome == "release")
    assert len(told.all("start")) == 51


@pytest.mark.parametrize("handler", [handlers.act, handlers.act_async])
async def test_what_runs_at_the_deadline_is_cut_off_and_released_once_it_is_dead(handler: Any, told: Told) -> None:
    broker = Broker("wait 60" if handler is handlers.act_async else "sleep 60", "ok", "ok")
    pipeline = Pipeline(broker.open, handler, executor="process", concurrency=1, max_demand=3, shutdown_timeout=0.1)
    async with running(pipeline, broker):
        await until(lambda: told.all("start"))
        pid = told.all("start")[0][0]
    assert [(one.outcome, one.counted) for one in broker.ended] == [("release", False)] * 3
    assert broker.source.keep == []
    assert not runs(pid)
    assert not told.all("end")


async def test_a_coroutine_that_is_cut_off_may_clean_up(told: Told) -> None:
    broker = Broker("wait 60")
    pipeline = Pipeline(broker.open, handlers.act_async, executor="process", concurrency=1, shutdown_timeout=0.1)
    async with running(pipeline, broker):
        await until(lambda: told.all("start"))
    assert len(told.all("cancelled")) == 1


async def test_what_waits_for_a_worker_to_start_goes_back(told: Told) -> None:
    broker = Broker(*["ok"] * 10)
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=2)
    async with running(pipeline, broker):
        await broker.until(lambda: broker.held)
        pipeline.stop()
    assert broker.outcomes("m1") == ["release"]
    assert not told.all("start")


async def test_a_drain_under_middleware_kills_what_runs_at_the_deadline(told: Told) -> None:
    broker = Broker("sleep 60")

    async def through(message: Message[Any], call_next: Any) -> Any:
        return await call_next(message)

    pipeline = Pipeline(
        broker.open, handlers.act, executor="process", concurrency=1, shutdown_timeout=0.1, middleware=[through]
    )
    async with running(pipeline, broker):
        await until(lambda: told.all("start"))
        pid = told.all("start")[0][0]
    assert broker.outcomes("m1") == ["release"]
    assert not runs(pid)


async def test_messages_that_wait_behind_a_slow_one_go_to_a_worker_that_has_nothing_to_do(told: Told) -> None:
    broker = Broker(*["ok"] * 50)
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=2)
    async with running(pipeline, broker):
        await broker.settled(50)
        broker.put("sleep 1.0", *["ok"] * 40)
        await broker.until(lambda: len(broker.acked) == 90)
        assert not any(what == "sleep 1.0" for _, what in told.all("end")), "none waited for the slow one"
        await broker.settled(91)
    assert len(told.all("start")) == 91
