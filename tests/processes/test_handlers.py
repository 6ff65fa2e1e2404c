"""Handlers in worker processes: what they say of their message acts as if they had said it here."""

from __future__ import annotations

import os
from typing import Any

import pytest

from sluiceway import App, Batch, Message, Pipeline, Retry
from sluiceway.errors import HandlerTimeout
from sluiceway.middleware.timeout import Timeout
from sluiceway.telemetry import MessageFinished, MessageStarted, Telemetry

from ..runtime.recording import Broker, bodies, running
from . import handlers
from .handlers import Told

ONCE: dict[str, Any] = {"executor": "process", "concurrency": 1, "retry": Retry(attempts=1)}


def dead(broker: Broker, id: str) -> dict[str, str]:
    """What the dead letter of a message says."""
    (letter,) = next(one for one in broker.dead if one.id == id).outputs
    return {name.removeprefix("sluiceway-dead-"): value for name, value in letter.headers.items()}


async def test_they_run_in_as_many_other_processes_as_concurrency_says(told: Told) -> None:
    broker = Broker(*["meet 2"] * 2, *["ok"] * 20)
    async with running(Pipeline(broker.open, handlers.act, executor="process", concurrency=2), broker):
        await broker.settled(22)
    pids = {pid for pid, _ in told.all("start")}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert len(broker.acked) == 22


@pytest.mark.parametrize("handler", [handlers.act, handlers.act_async])
async def test_what_a_handler_says_settles_its_message(handler: Any, told: Told) -> None:
    broker = Broker("ok", "reject bad", "later 1000", "fail said so", "configure", "wrong-batcher")
    async with running(Pipeline(broker.open, handler, **ONCE), broker):
        await broker.until(lambda: len(broker.ended) == 6)
    assert broker.acked == ["m1"]
    assert [(one.outcome, one.delay, one.counted) for one in broker.ended if one.id == "m3"] == [("retry", 1000, False)]
    assert dead(broker, "m2")["error"] == "bad"
    assert dead(broker, "m4") | {"type": "sluiceway.errors.MessageFailed", "error": "said so"} == dead(broker, "m4")
    assert dead(broker, "m5")["error"] == "configured"
    assert "there is no batcher 'nowhere'" in dead(broker, "m6")["error"]


async def test_configure_comes_back(told: Told) -> None:
    broker = Broker("configure")
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=1, retry=Retry(base_delay=0.01))
    async with running(pipeline, broker):
        await broker.settled(1)
    assert broker.outcomes("m1") == ["dead_letter"]


async def test_a_release_comes_back_as_one(told: Told) -> None:
    broker = Broker("release later")
    async with running(Pipeline(broker.open, handlers.act, **ONCE), broker):
        await broker.until(lambda: broker.ended)
    assert {(one.outcome, one.counted) for one in broker.ended} == {("release", False)}


async def test_what_it_publishes_goes_out_with_the_settle(told: Told) -> None:
    broker = Broker("publish")
    pipeline = Pipeline(broker.open, handlers.act, **ONCE, publish_headers=lambda: {"trace": "t", "h": "not this"})
    async with running(pipeline, broker):
        await broker.settled(1)
    (outgoing,) = broker.ended[0].outputs
    assert (outgoing.topic, outgoing.body, outgoing.key, outgoing.delay) == ("out", b'{"a":1}', "k", 2.0)
    assert outgoing.headers == {"h": "v", "trace": "t"}


async def test_a_traceback_comes_back_with_its_cause(told: Told) -> None:
    broker = Broker("chain")
    seen: list[BaseException] = []

    async def watch(message: Message[Any], call_next: Any) -> Any:
        try:
            return await call_next(message)
        except ValueError as error:
            seen.append(error)
            raise

    async with running(Pipeline(broker.open, handlers.act, **ONCE), broker):
        await broker.settled(1)
    said = dead(broker, "m1")
    assert (said["type"], said["error"]) == ("ValueError", "outer")
    assert 'handlers.py", line' in said["traceback"]
    assert "KeyError: 'inner'\n\nThe above exception was the direct cause of" in said["traceback"]
    broker = Broker("chain")
    async with running(Pipeline(broker.open, handlers.act, **ONCE, middleware=[watch]), broker):
        await broker.settled(1)
    assert repr(seen[0].__cause__) == "KeyError('inner')"


async def test_the_log_has_the_traceback(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker("chain")
    async with running(Pipeline(broker.open, handlers.act, **ONCE), broker):
        await broker.settled(1)
    (record,) = (one for one in caplog.records if "failed at attempt" in one.message)
    assert 'raise ValueError("outer") from error' in record.message


async def test_a_publish_that_is_awaited_there_is_told_how_to_write_it(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Broker("a")
    async with running(Pipeline(broker.open, handlers.publish_and_wait, **ONCE), broker):
        await broker.settled(1)
    assert "message.publish(...) is not awaited" in caplog.text
    assert "message.publish(...) is not awaited" in dead(broker, "m1")["traceback"]


async def test_an_exception_is_of_its_own_class_also_when_pickle_cannot_make_it(told: Told) -> None:
    broker = Broker("picky")
    retry = Retry(attempts=5, never=(handlers.Picky,))
    async with running(Pipeline(broker.open, handlers.act, executor="process", concurrency=1, retry=retry), broker):
        await broker.settled(1)
    said = dead(broker, "m1")
    assert said["type"] == "tests.processes.handlers.Picky"
    assert said["error"] == "7: no"
    assert said["attempts"] == "1"


async def test_an_exception_that_cannot_cross_keeps_its_name_text_and_traceback(told: Told) -> None:
    broker = Broker("closed")
    async with running(Pipeline(broker.open, handlers.act, **ONCE), broker):
        await broker.settled(1)
    said = dead(broker, "m1")
    assert said["type"] == "tests.processes.handlers.Closed"
    assert said["error"] == "closed"
    assert "raise Closed" in said["traceback"]


async def test_a_body_that_is_not_the_payload_is_a_dead_letter_without_a_retry(told: Told) -> None:
    broker = Broker("no json", '{"n": 1}')
    pipeline = Pipeline(broker.open, handlers.typed, executor="process", concurrency=1)
    async with running(pipeline, broker):
        await broker.settled(2)
    assert dead(broker, "m1")["type"] == "sluiceway.errors.DecodeError"
    assert broker.acked == ["m2"]


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (handlers.act, "message.ack() does not work in a worker process"),
        (handlers.act_async, "a message is settled when its handler has returned"),
    ],
)
async def test_an_early_ack_says_that_it_cannot_be(handler: Any, why: str, told: Told) -> None:
    broker = Broker("ack")
    async with running(Pipeline(broker.open, handler, **ONCE), broker):
        await broker.settled(1)
    assert why in dead(broker, "m1")["error"]


async def test_an_exit_in_a_worker_stops_the_pipeline(told: Told) -> None:
    broker = Broker("exit-app 3")
    with pytest.raises(SystemExit) as left:
        await Pipeline(broker.open, handlers.act, executor="process", concurrency=1).run()
    assert left.value.code == 3
    assert broker.outcomes("m1") == ["retry"]
    broker.check()


async def test_batches_get_values_keys_and_payloads(told: Told) -> None:
    broker = Broker("a1", "b1", "a2", "b2")
    got: list[Any] = []

    async def book(batch: Batch[str]) -> None:
        got.append((batch.key, batch.values, [message.payload for message in batch]))

    pipeline = Pipeline(
        broker.open, handlers.route, batch=book, batch_size=2, batch_timeout=5, executor="process", concurrency=1
    )
    async with running(pipeline, broker):
        await broker.settled(4)
    assert sorted(got) == [(b"a", ["A1", "A2"], [b"a1", b"a2"]), (b"b", ["B1", "B2"], [b"b1", b"b2"])]


async def test_a_value_that_cannot_be_pickled_fails_its_message_only_where_a_batch_needs_it(told: Told) -> None:
    async def book(batch: Batch[str]) -> None: ...

    broker = Broker("unpicklable")
    async with running(Pipeline(broker.open, handlers.route, batch=book, **ONCE), broker):
        await broker.settled(1)
    assert "a function, or the batch key None cannot be pickled for the batch handler" in dead(broker, "m1")["error"]
    broker = Broker("unpicklable")
    async with running(Pipeline(broker.open, handlers.route, **ONCE), broker):
        await broker.settled(1)
    assert broker.acked == ["m1"]


async def test_a_message_is_there_as_it_is_here(told: Told) -> None:
    broker = Broker()
    key = b"\xff".decode(errors="surrogateescape")
    broker.put("x", key=key, failures=2, deliveries=3)
    async with running(Pipeline(broker.open, handlers.tell_attempt, **ONCE | {"retry": Retry(attempts=9)}), broker):
        await broker.settled(1)
    assert [what for _, what in told.all("attempt")] == [f"m1 3 {key!r} {{}} source"]


async def test_hooks_see_the_payload(told: Told) -> None:
    app = App("memory://")
    seen: list[Any] = []
    declared = app.consumer("t", executor="process", concurrency=1, retry=Retry(attempts=1))(handlers.typed)

    @declared.handle_error
    async def look(message: Message[handlers.Number], error: BaseException) -> None:
        seen.append((message.payload, type(error)))

    async with app.running() as manager:
        await app.publish("t", {"n": -1})
        await manager.idle(0.02)
    assert seen == [(handlers.Number(-1), ValueError)]


async def test_the_lifespan_runs_in_each_worker_and_ends_with_the_drain(told: Told) -> None:
    app = App("memory://", lifespan=handlers.lifespan, consumers=[handlers.with_context])
    async with app.running() as manager:
        await app.publish_many("t", range(6))
        await manager.idle(0.02)
        workers = {pid for pid, _ in told.all("context")}
        assert not told.all("leave")
    assert {what.split(" ", 1)[1] for _, what in told.all("context")} == {f"made in {pid}" for pid in workers}
    entered, left = ({pid for pid, _ in told.all(event)} for event in ("enter", "leave"))
    assert workers | {os.getpid()} <= entered == left, "also of one that came up when there was nothing left to do"


async def test_a_class_handles_there_and_books_here(told: Told) -> None:
    app = App("memory://", lifespan=handlers.lifespan, consumers=[handlers.Numbers])
    async with app.running() as manager:
        await app.publish_many("numbers", [{"n": 1}, {"n": 2}])
        await manager.idle(0.02)
    ((worker, context), _) = told.all("handle")
    assert context == f"made in {worker}" != f"made in {os.getpid()}"
    assert told.all("batch") == [(os.getpid(), "[2, 4] [1, 2]")]


async def test_middleware_runs_here_round_the_handler_there(told: Told) -> None:
    broker = Broker("ok", "skip", "chain", "publish")
    log: list[str] = []

    async def watch(message: Message[bytes], call_next: Any) -> Any:
        if message.payload == b"skip":
            return None
        message.publish("from-middleware", 1)
        try:
            return await call_next(message)
        finally:
            log.append(message.body.decode())

    async with running(Pipeline(broker.open, handlers.act, **ONCE, middleware=[watch]), broker):
        await broker.settled(4)
    assert log == ["ok", "chain", "publish"]
    assert {what for _, what in told.all("start")} == {"ok", "chain", "publish"}
    assert [one.id for one in broker.dead] == ["m3"]
    topics = [one.topic for ended in broker.ended if ended.id == "m4" for one in ended.outputs]
    assert topics == ["from-middleware", "out"]


async def test_a_middleware_that_calls_again_hears_nothing_of_the_call_that_was_cut_off(told: Told) -> None:
    async def twice(message: Message[Any], call_next: Any) -> Any:
        try:
            return await call_next(message)
        except HandlerTimeout:
            return await call_next(message)

    broker = Broker("sleep 30")
    pipeline = Pipeline(broker.open, handlers.act, **ONCE, middleware=[twice, Timeout(2.0)])
    async with running(pipeline, broker):
        await broker.until(lambda: broker.ended)
    assert broker.outcomes("m1") == ["dead_letter"]
    assert dead(broker, "m1")["type"] == "sluiceway.errors.HandlerTimeout"
    assert len(told.all("start")) == 2


async def test_order_by_key_holds_over_processes(told: Told) -> None:
    broker = Broker()
    for number in range(40):
        broker.put(f"sleep 0.00{number % 3}", key="ab"[number % 2])
    pipeline = Pipeline(broker.open, handlers.act, executor="process", concurrency=2, order_by="key")
    async with running(pipeline, broker):
        await broker.settled(40)
    for first in (1, 2):
        mine = [f"m{number}" for number in range(first, 41, 2)]
        assert [one for one in broker.acked if one in mine] == mine


async def test_each_message_is_told_as_it_starts_and_finishes(told: Told) -> None:
    broker = Broker(*bodies(5), "fail no")
    telemetry = Telemetry()
    events: list[Any] = []
    telemetry.attach(events.append, MessageStarted, MessageFinished)
    async with running(Pipeline(broker.open, handlers.act, **ONCE, telemetry=telemetry), broker):
        await broker.settled(6)
    ids = [f"m{number}" for number in range(1, 7)]
    assert [one.id for one in events if isinstance(one, MessageStarted)] == ids
    finished = [one for one in events if isinstance(one, MessageFinished)]
    assert [one.id for one in finished] == ids
    assert [one.error is None for one in finished] == [True] * 5 + [False]
