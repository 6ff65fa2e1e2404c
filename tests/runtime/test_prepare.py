"""prepare: a hook that has all messages of one receive before their handlers run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import App, Batch, Consumer, Message, OptionError, Pipeline, Retry
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time

ONCE = Retry(attempts=1)
Messages = Sequence[Message[Any]]


def ids(messages: Messages) -> list[str]:
    return [message.id for message in messages]


async def test_it_has_all_messages_of_a_receive_decoded_before_their_handlers_run() -> None:
    app = App(MemoryTransport())
    log: list[Any] = []

    @app.consumer("work", concurrency=10)
    async def work(message: Message[int]) -> None:
        log.append(message.value)

    @work.prepare
    async def prepare(messages: Sequence[Message[int]]) -> None:
        log.append([message.payload for message in messages])
        await asyncio.sleep(1)
        for message in messages:
            message.value = f"row {message.payload}"

    await app.publish_many("work", range(5))
    async with app.running() as manager:
        await manager.idle()
    assert log == [[0, 1, 2, 3, 4], "row 0", "row 1", "row 2", "row 3", "row 4"]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_class_prepares_with_what_its_constructor_got(kind: str) -> None:
    app = App(MemoryTransport())
    prepared: list[int] = []
    handled: list[int] = []

    @app.consumer("work", concurrency=10)
    class Work(Consumer[int]):
        if kind == "async":

            async def prepare(self, messages: Sequence[Message[int]]) -> None:
                prepared.extend(message.payload for message in messages)

        else:

            def prepare(self, messages: Sequence[Message[int]]) -> None:
                assert threading.current_thread() is not threading.main_thread()
                prepared.extend(message.payload for message in messages)

        async def handle(self, message: Message[int]) -> None:
            assert message.payload in prepared
            handled.append(message.payload)

    await app.publish_many("work", range(5))
    async with app.running() as manager:
        await manager.idle()
    assert prepared == handled == list(range(5))


async def test_the_batch_gets_what_handlers_returned_and_not_what_prepare_left() -> None:
    broker = Broker(*bodies(3))
    got: list[Any] = []

    async def prepare(messages: Messages) -> None:
        for message in messages:
            message.value = "prepared"

    async def handle(message: Message[bytes]) -> bytes | None:
        return message.body if message.body != b"2" else None

    async def book(batch: Batch[Any]) -> None:
        got.extend(batch.values)

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=3, prepare=prepare)
    async with running(pipeline, broker):
        await broker.settled(3)
    assert got == [b"1", None, b"3"]


async def test_one_call_at_a_time_and_in_order_while_handlers_run() -> None:
    broker = Broker(*bodies(40))
    log: list[tuple[str, list[str]]] = []
    during = 0
    preparing = False

    async def prepare(messages: Messages) -> None:
        nonlocal preparing
        assert not preparing
        preparing = True
        log.append(("begin", ids(messages)))
        await asyncio.sleep(1)
        preparing = False

    async def handle(message: Message[bytes]) -> None:
        nonlocal during
        await asyncio.sleep(0.4)
        during += preparing

    async with running(Pipeline(broker.open, handle, prepare=prepare, concurrency=5, max_demand=20), broker):
        await broker.settled(40)
    assert [one for _, some in log for one in some] == [f"m{number}" for number in range(1, 41)]
    assert len(log) > 1
    assert during  # handlers end while the next receive is prepared


@pytest.mark.parametrize("error", [ValueError("no rows"), asyncio.CancelledError("inner")])
async def test_when_it_raises_all_messages_of_its_receive_fail_by_the_retry_rules(error: BaseException) -> None:
    broker = Broker(*bodies(5))
    handled: list[str] = []
    calls: list[int] = []

    async def prepare(messages: Messages) -> None:
        calls.append(len(messages))
        if len(calls) == 1:
            raise error

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)

    retry = Retry(attempts=2, base_delay=1, jitter=0)
    async with running(Pipeline(broker.open, handle, prepare=prepare, retry=retry), broker):
        await broker.settled(5)
    assert [one.outcome for one in broker.ended] == ["retry"] * 5 + ["ack"] * 5
    assert calls == [5, 5]
    assert sorted(handled) == sorted(f"m{number}" for number in range(1, 6))


async def test_its_dead_letters_say_why() -> None:
    broker = Broker(*bodies(2))

    async def broken(messages: Messages) -> None:
        raise ValueError("no rows")

    async def handle(message: Message[bytes]) -> None:
        raise AssertionError

    async with running(Pipeline(broker.open, handle, prepare=broken, retry=ONCE), broker):
        await broker.settled(2)
    assert [one.outputs[0].headers["sluiceway-dead-error"] for one in broker.dead] == ["no rows"] * 2


async def test_a_message_that_it_fails_is_not_handled_and_the_others_are() -> None:
    broker = Broker(*bodies(3))
    handled: list[str] = []

    async def prepare(messages: Messages) -> None:
        messages[1].fail("no such account")

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)

    async with running(Pipeline(broker.open, handle, prepare=prepare, retry=ONCE), broker):
        await broker.settled(3)
    assert handled == ["m1", "m3"]
    assert [one.id for one in broker.dead] == ["m2"]


async def test_a_message_that_it_fails_before_it_raises_keeps_its_own_error() -> None:
    broker = Broker(*bodies(2))

    async def prepare(messages: Messages) -> None:
        messages[0].fail("its own")
        raise ValueError("of all")

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, prepare=prepare, retry=ONCE), broker):
        await broker.settled(2)
    assert [one.outputs[0].headers["sluiceway-dead-error"] for one in broker.dead] == ["its own", "of all"]


async def test_what_cannot_be_decoded_fails_alone_and_is_not_seen() -> None:
    transport = MemoryTransport()
    app = App(transport)
    seen: list[int] = []

    @app.consumer("work", concurrency=10)
    async def work(message: Message[int]) -> None: ...

    @work.prepare
    async def prepare(messages: Sequence[Message[int]]) -> None:
        seen.extend(message.payload for message in messages)

    await app.publish_many("work", [1, "two", 3])
    async with app.running() as manager:
        await manager.idle()
    assert seen == [1, 3]
    assert [one.body async for one in transport.browse("work.default.dead")] == [b'"two"']


async def test_a_payload_is_decoded_once_and_stays_what_prepare_made_of_it() -> None:
    app = App(MemoryTransport())
    handled: list[dict[str, int]] = []

    @app.consumer("work")
    async def work(message: Message[dict[str, int]]) -> None:
        handled.append(message.payload)

    @work.prepare
    async def prepare(messages: Sequence[Message[dict[str, int]]]) -> None:
        for message in messages:
            message.payload["row"] = 7

    await app.publish("work", {"id": 1})
    async with app.running() as manager:
        await manager.idle()
    assert handled == [{"id": 1, "row": 7}]


async def test_a_message_that_it_acks_is_settled_once_and_not_handled() -> None:
    for order_by in (None, "key"):
        broker = Broker()
        broker.put("1", "2", "3", key="k")
        handled: list[str] = []

        async def prepare(messages: Messages) -> None:
            await messages[0].ack()

        async def handle(message: Message[bytes], handled: list[str] = handled) -> None:
            handled.append(message.id)

        pipeline = Pipeline(broker.open, handle, prepare=prepare, order_by=order_by)  # type: ignore[arg-type]
        async with running(pipeline, broker):
            await broker.settled(3)
        assert handled == ["m2", "m3"]
        assert broker.acked == ["m1", "m2", "m3"]


@pytest.mark.parametrize("ignores", [False, True])
async def test_one_that_runs_over_the_timeout_fails_its_messages_and_the_intake_goes_on(ignores: bool) -> None:
    broker = Broker("stuck", limit=10)
    release = asyncio.Event()

    async def prepare(messages: Messages) -> None:
        while messages[0].body == b"stuck" and not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                if not ignores:
                    raise

    async def handle(message: Message[bytes]) -> None: ...

    options: Any = {"timeout": 5.0, "retry": ONCE, "max_demand": 10, "concurrency": 10}
    async with running(Pipeline(broker.open, handle, prepare=prepare, **options), broker):
        await broker.settled(1)
        assert asyncio.get_running_loop().time() == pytest.approx(10 if ignores else 5, abs=0.1)
        broker.put("fine")
        await broker.settled(2)
        release.set()
        await asyncio.sleep(1)
    (dead,) = broker.dead
    assert dead.outputs[0].headers["sluiceway-dead-type"] == "sluiceway.errors.HandlerTimeout"
    assert broker.acked == ["m2"]


async def test_one_that_swallows_its_cancellation_and_returns_has_succeeded() -> None:
    broker = Broker("1")

    async def prepare(messages: Messages) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            pass

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, prepare=prepare, timeout=5.0), broker):
        await broker.settled(1)
    assert broker.acked == ["m1"]


async def test_a_drain_hands_back_what_is_being_prepared_and_cuts_it_off_when_its_time_is_up() -> None:
    broker = Broker(*bodies(3))
    cleaned = False

    async def prepare(messages: Messages) -> None:
        nonlocal cleaned
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.5)
            cleaned = True

    async def handle(message: Message[bytes]) -> None:
        raise AssertionError

    pipeline = Pipeline(broker.open, handle, prepare=prepare, shutdown_timeout=5)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
    assert cleaned
    assert [one.outcome for one in broker.ended] == ["release"] * 3
    assert asyncio.get_running_loop().time() < 8


async def test_what_a_drain_handed_back_is_not_handled_when_its_prepare_ends() -> None:
    broker = Broker(*bodies(20))

    async def prepare(messages: Messages) -> None:
        await asyncio.sleep(2)

    async def handle(message: Message[bytes]) -> None:
        raise AssertionError

    pipeline = Pipeline(broker.open, handle, prepare=prepare, concurrency=20)
    async with running(pipeline, broker):
        await asyncio.sleep(1)
    assert [one.outcome for one in broker.ended] == ["release"] * 20


async def test_messages_taken_away_meanwhile_are_not_handled_and_do_not_shut_their_lane() -> None:
    broker = Broker()
    broker.put("1", "2", key="k")
    handled: list[str] = []

    async def prepare(messages: Messages) -> None:
        if messages[0].id == "m1":
            supervisor = pipeline._supervisor
            assert supervisor is not None
            assert supervisor._flow is not None
            supervisor._flow.settler.forget(messages[:1])
            await broker.source.settle(messages[:1], ())  # whoever has it now handles it
            await asyncio.sleep(1)

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)

    pipeline = Pipeline(broker.open, handle, prepare=prepare, order_by="key")
    async with running(pipeline, broker):
        await broker.settled(2)
    assert handled == ["m2"]


async def test_the_order_of_a_key_holds_when_it_fails() -> None:
    broker = Broker()
    handled: list[tuple[str, bytes]] = []
    for number in range(30):
        broker.put(str(number), key="ab"[number % 2])
    calls = 0

    async def prepare(messages: Messages) -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.1)
        if calls % 3 == 1:
            raise ValueError("no rows")
        if calls % 3 == 2:
            messages[0].fail("no row")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.05)
        handled.append((message.key or "", message.body))

    retry = Retry(attempts=50, base_delay=0.2, jitter=0)
    pipeline = Pipeline(broker.open, handle, prepare=prepare, order_by="key", concurrency=4, retry=retry)
    async with running(pipeline, broker):
        await broker.settled(30)
    for index, key in enumerate("ab"):
        assert [body for one, body in handled if one == key] == [b"%d" % n for n in range(index, 30, 2)]


async def test_suspects_are_prepared_in_their_own_group() -> None:
    broker = Broker()
    broker.put("1", "2", suspect=True, deliveries=3, suspicions=1)
    prepared: list[list[str]] = []

    async def prepare(messages: Messages) -> None:
        prepared.append(ids(messages))

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, prepare=prepare), broker):
        await broker.settled(2)
    assert prepared == [["m1"], ["m2"]]
    assert broker.suspected == ["m1", "m2"]


async def test_what_it_returns_is_an_error_that_says_what_to_do() -> None:
    broker = Broker("1")

    async def prepare(messages: Messages) -> Any:
        return messages[:0]

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, prepare=prepare, retry=ONCE), broker):
        await broker.settled(1)
    text = broker.dead[0].outputs[0].headers["sluiceway-dead-error"]
    assert text.startswith("handle: prepare returned tuple; it returns nothing")


async def test_an_exit_stops_the_app_and_loses_nothing() -> None:
    broker = Broker("1", "2")

    async def prepare(messages: Messages) -> None:
        raise KeyboardInterrupt

    async def handle(message: Message[bytes]) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        await Pipeline(broker.open, handle, prepare=prepare).run()
    broker.check()
    assert len(broker.waiting) == 2


async def test_handlers_on_threads_are_prepared_for_too() -> None:
    broker = Broker(*bodies(5))
    handled: list[Any] = []

    async def prepare(messages: Messages) -> None:
        for message in messages:
            message.value = int(message.payload)
        messages[4].fail("not this one")

    def handle(message: Message[bytes]) -> None:
        handled.append((message.payload, message.value))

    async with running(Pipeline(broker.open, handle, prepare=prepare, payload=bytes, retry=ONCE), broker):
        await broker.settled(5)
    assert sorted(handled) == [(b"%d" % number, number) for number in range(1, 5)]
    assert [one.id for one in broker.dead] == ["m5"]


def test_one_that_takes_too_much_is_an_error_at_definition() -> None:
    app = App(MemoryTransport())

    @app.consumer("work")
    async def work(message: Message[int]) -> None: ...

    with pytest.raises(OptionError, match=r"prepare takes \(messages\) or \(messages, context\)"):

        @work.prepare
        async def prepare(one: Any, two: Any, three: Any) -> None: ...
