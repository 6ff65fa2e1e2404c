"""A worker process that dies costs the one message that it ran an attempt, and its neighbours nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sluiceway import App, HandlerTimeout, Message, Pipeline, PipelineFailed, Retry
from sluiceway._runtime.spec import RemoteHandler
from sluiceway._runtime.worker import Worker
from sluiceway._runtime.worker_pool import WorkerPool

from ..runtime.recording import Broker, bodies, running
from . import handlers
from .conftest import children, runs, until, until_gone
from .handlers import Told

ROOT = Path(__file__).resolve().parents[2]
PROCESSES: dict[str, Any] = {"executor": "process", "concurrency": 2}


@pytest.mark.parametrize("how", ["exit 0", "exit 9", "crash", "die"])
async def test_poison_is_dead_lettered_after_its_attempts_and_innocents_are_not_blamed(how: str, told: Told) -> None:
    good = [b"%d" % number for number in range(60)]
    broker = Broker(*good[:30], how, *good[30:])
    retry = Retry(attempts=3, base_delay=0.01)
    async with running(Pipeline(broker.open, handlers.act, **PROCESSES, retry=retry), broker):
        await broker.settled(61)
    (letter,) = broker.dead
    assert letter.id == "m31"
    said = letter.outputs[0].headers
    assert said["sluiceway-dead-type"] == "sluiceway.errors.KilledItsProcess"
    assert said["sluiceway-dead-error"].endswith("while it ran this message")
    assert said["sluiceway-dead-attempts"] == "3"
    assert len(broker.acked) == 60
    assert [one.id for one in broker.ended if one.outcome == "retry"] == ["m31", "m31"]
    assert not [one for one in broker.ended if one.outcome == "release"]
    starts = [what for _, what in told.all("start")]
    assert starts.count(how) == 3
    assert len({pid for pid, what in told.all("start") if what == how}) == 3
    assert len(starts) == 63, "what waited behind the poison was not entered, so nothing ran twice"


async def test_a_kill_from_outside_costs_the_running_message_one_attempt_and_no_other_anything(told: Told) -> None:
    broker = Broker(*["spin 0.001"] * 40, "sleep 1.0", *["spin 0.001"] * 40)
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=1, retry=Retry(base_delay=0.01))
    async with running(pipeline, broker):
        await until(lambda: any(what == "sleep 1.0" for _, what in told.all("start")))
        (victim,) = {pid for pid, _ in told.all("start")}
        os.kill(victim, signal.SIGKILL)
        await broker.settled(81)
    assert broker.dead == []
    assert [(one.id, one.counted) for one in broker.ended if one.outcome != "ack"] == [("m41", True)]


async def test_an_idle_worker_that_is_killed_blames_nobody(told: Told) -> None:
    broker = Broker("ok")
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=1)
    async with running(pipeline, broker):
        await broker.settled(1)
        ((victim, _),) = told.all("start")
        os.kill(victim, signal.SIGKILL)
        until_gone(victim)
        broker.put("ok")
        await broker.settled(2)
    assert broker.acked == ["m1", "m2"]
    assert {one.outcome for one in broker.ended} == {"ack"}


async def test_all_workers_killed_at_once_lose_nothing(told: Told) -> None:
    broker = Broker(*["spin 0.002"] * 300)
    pipeline = Pipeline(broker.open, handlers.act, **PROCESSES, retry=Retry(attempts=20, base_delay=0.01))
    async with running(pipeline, broker):
        for kills in range(1, 4):
            await until(lambda kills=kills: len(broker.acked) >= 60 * kills)
            for pid in {pid for pid, _ in told.all("start") if runs(pid)}:
                os.kill(pid, signal.SIGKILL)
        await broker.settled(300)
    assert len(broker.acked) == 300
    assert len([one for one in broker.ended if one.outcome == "retry"]) <= 6, "one for each worker that was killed"


async def test_a_plain_function_that_runs_over_its_timeout_is_killed_and_replaced(told: Told) -> None:
    broker = Broker("sleep 60", *["ok"] * 20)
    pipeline = Pipeline(
        broker.open, handlers.act, executor="process", concurrency=1, timeout=0.3, retry=Retry(attempts=1)
    )
    async with running(pipeline, broker):
        await broker.settled(21)
    (letter,) = broker.dead
    assert letter.id == "m1"
    assert letter.outputs[0].headers["sluiceway-dead-type"] == "sluiceway.errors.HandlerTimeout"
    assert letter.outputs[0].headers["sluiceway-dead-error"].endswith("message m1 ran over 0.3 s")
    (hung,) = (pid for pid, what in told.all("start") if what == "sleep 60")
    assert not runs(hung)


async def test_a_timeout_does_not_count_the_start_of_a_worker(told: Told) -> None:
    broker = Broker("ok")
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=1, timeout=0.05)
    async with running(pipeline, broker):
        await broker.settled(1)
    assert broker.acked == ["m1"]


async def test_a_coroutine_that_runs_over_its_timeout_is_cancelled_and_its_worker_lives_on(told: Told) -> None:
    broker = Broker("wait 60", "ok")
    pipeline = Pipeline(
        broker.open, handlers.act_async, executor="process", concurrency=1, timeout=0.3, retry=Retry(attempts=1)
    )
    async with running(pipeline, broker):
        await broker.settled(2)
    assert broker.dead[0].outputs[0].headers["sluiceway-dead-type"] == "sluiceway.errors.HandlerTimeout"
    ((cancelled, _),) = told.all("cancelled")
    assert cancelled == told.all("end")[0][0]


async def test_a_coroutine_that_ignores_its_cancellation_is_killed(told: Told) -> None:
    broker = Broker("ignore", "ok")
    pipeline = Pipeline(
        broker.open, handlers.act_async, executor="process", concurrency=1, timeout=0.1, retry=Retry(attempts=1)
    )
    async with running(pipeline, broker):
        await broker.settled(2)
    assert broker.dead[0].outputs[0].headers["sluiceway-dead-type"] == "sluiceway.errors.HandlerTimeout"
    assert told.all("ignored")[0][0] != told.all("end")[0][0]
    assert broker.acked == ["m2"]


async def test_a_worker_killed_under_middleware_fails_its_message(told: Told) -> None:
    broker = Broker("die", "ok", "sleep 60")

    async def through(message: Message[Any], call_next: Any) -> Any:
        return await call_next(message)

    pipeline = Pipeline(
        broker.open, handlers.act, **PROCESSES, middleware=[through], timeout=0.5, retry=Retry(attempts=1)
    )
    async with running(pipeline, broker):
        await broker.settled(3)
    types = {one.id: one.outputs[0].headers["sluiceway-dead-type"].rpartition(".")[2] for one in broker.dead}
    assert types == {"m1": "KilledItsProcess", "m3": "HandlerTimeout"}
    assert broker.acked == ["m2"]


async def test_a_lifespan_that_fails_in_workers_crashes_the_pipeline_and_says_why(
    told: Told, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARENT", str(os.getpid()))
    app = App("memory://", consumers=[handlers.plain], lifespan=handlers.lifespan_that_fails_in_workers, max_restarts=0)
    await app.publish("t", 1)
    with pytest.raises(PipelineFailed, match="3 worker processes in a row could not start"):
        await asyncio.wait_for(app.run(stop=asyncio.Event()), 30)
    assert "ConnectionError: no database here" in caplog.text
    assert told.all("plain") == []


async def test_a_handler_that_its_worker_does_not_find_crashes_the_pipeline(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker("ok")
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=1, max_restarts=0)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(ROOT))])
    with pytest.raises(PipelineFailed, match="No module named 'tests"):
        await pipeline.run()
    assert len(broker.waiting) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_worker_ignores_signals_that_are_meant_for_its_pipeline(number: signal.Signals, told: Told) -> None:
    broker = Broker("sleep 0.4")
    async with running(Pipeline(broker.open, handlers.act, executor="process", concurrency=1), broker):
        await until(lambda: told.all("start"))
        os.kill(told.all("start")[0][0], number)
        await broker.settled(1)
    assert broker.acked == ["m1"]
    assert len(told.all("start")) == len(told.all("end")) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_when_their_pipeline_does_however_that_ends(number: signal.Signals, told: Told) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.processes.handlers"], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while len(told.all("plain")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = {pid for pid, _ in told.all("plain")}
        os.killpg(program.pid, number)
        if number != signal.SIGKILL:
            time.sleep(0.2)
            assert any(map(runs, workers)), "it drains: what runs may go on"
            os.killpg(program.pid, number)  # once more cuts it off
        program.wait(10)
        until_gone(*workers)
    finally:
        program.kill()
        program.wait()


class Bug(BaseException):
    """What no stage expects."""


async def test_a_crash_of_the_pipeline_leaves_no_worker_and_loses_nothing(told: Told) -> None:
    broker = Broker(*bodies(20), "sleep 0.3")
    calls = 0

    async def settle(acks: Any, others: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Bug

    broker.on_settle = settle
    async with running(Pipeline(broker.open, handlers.act, **PROCESSES), broker):
        await broker.settled(21)
        first = {pid for pid, _ in told.all("start")} - children()
        assert first, "the workers of the pipeline that crashed"
        assert not any(map(runs, first))
    assert len(broker.sources) == 2


async def test_what_a_worker_said_before_it_died_is_heard_to_the_end(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluiceway._runtime.worker.READ", 16)  # bytes, so that one read is not enough
    broker = Broker(*["spin 0.002"] * 50)
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=1, retry=Retry(attempts=1))
    async with running(pipeline, broker):
        await broker.settled(50)
        broker.put(*["spin 0.002"] * 8, "die")
        await until(lambda: len(told.all("start")) > 50)
        time.sleep(1.0)  # noqa: ASYNC251 - the loop hears nothing until all is over
        await broker.settled(59)
    assert [one.id for one in broker.dead] == ["m59"]
    assert len(told.all("start")) == 59


class User:
    """Of a pool: it notes what it is told."""

    def __init__(self) -> None:
        self.over: list[tuple[str, str]] = []
        self.unclaimed: list[str] = []

    def claim(self, message: Message[Any]) -> bool:
        return True

    def unclaim(self, message: Message[Any]) -> None:
        self.unclaimed.append(message.id)

    def entered(self, worker: Worker, message: Message[Any]) -> None: ...

    def ended(self, message: Message[Any], more: Any, error: BaseException | None) -> None:
        self.over.append((message.id, type(error).__name__))

    def given_back(self, messages: list[Message[Any]]) -> None: ...

    def changed(self) -> None: ...

    def crashed(self, error: BaseException) -> None:
        raise error


@pytest.mark.parametrize("ended_in_time", [True, False])
async def test_what_came_in_between_when_a_worker_was_killed_for_another_message_is_not_blamed(
    ended_in_time: bool,
) -> None:
    user = User()
    pool = WorkerPool("c", RemoteHandler(b"", is_async=False), 1, user, ahead=None, timeout=None)
    worker = Worker(pool._on_word)
    worker.ready = True
    worker.sent = {number: Message("t", b"", f"m{number}") for number in (1, 2, 3)}
    pool._on_word(worker, ("entered", 1))
    pool.cut_off(worker, HandlerTimeout("over"))
    if ended_in_time:
        pool._on_word(worker, ("ended", 1, 2, 0.001, None, None))
    pool._closed = True  # no other is started
    pool._died(worker, "was killed by SIGKILL")
    assert user.over == [("m1", "NoneType" if ended_in_time else "HandlerTimeout")]
    assert user.unclaimed == ["m2", "m3"]
    assert [message.id for message in pool.ready] == ["m2", "m3"]
