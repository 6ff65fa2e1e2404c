"""Topology and control: which stages there are, what runs, and that what was stopped has ended."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from sluiceway import App, AppError, Batch, Consumer, Message, OptionError, Pipeline, PipelineFailed
from sluiceway.topology import BatcherStage, Stage, Topology
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker, bodies, running
from .test_manager import Flaky

pytestmark = pytest.mark.virtual_time


async def nothing(message: Message[Any]) -> None: ...


def app_with(*names: str, transport: MemoryTransport | None = None) -> App:
    app = App(transport or MemoryTransport())
    for name in names:
        app.consumer(f"topic.{name}", name=name)(nothing)
    return app


# -- topology --------------------------------------------------------------------------------------------------------


def test_the_defaults_are_one_source_and_ten_processors_and_no_batcher() -> None:
    pipeline = Pipeline(Broker().open, nothing)
    assert pipeline.topology() == Topology(
        pipeline="nothing",
        topics=("source",),
        group="default",
        sources=Stage(name="nothing: source", concurrency=1),
        processors=Stage(name="nothing: processor", concurrency=10),
        batchers=(),
    )


def test_every_stage_is_listed_with_its_concurrency_and_batchers_in_the_order_of_declaration() -> None:
    app = App(MemoryTransport(), group="shop")

    @app.consumer("orders", concurrency=13, sources=3)
    async def orders(message: Message[Any]) -> None: ...

    @orders.batch("s3", concurrency=12)
    async def s3(batch: Batch[Any]) -> None: ...

    @orders.batch("db", concurrency=2)
    async def db(batch: Batch[Any]) -> None: ...

    @app.consumer("refunds", group="other")
    class Refunds(Consumer[int]):
        async def handle_batch(self, batch: Batch[int]) -> None: ...

    first, second = app.manager.topology()
    assert (first.pipeline, first.topics, first.group) == ("orders", ("orders",), "shop")
    assert (first.sources.concurrency, first.processors.concurrency) == (3, 13)
    assert first.batchers == (
        BatcherStage(batcher="s3", batch_processors=Stage(name="orders: batcher s3", concurrency=12)),
        BatcherStage(batcher="db", batch_processors=Stage(name="orders: batcher db", concurrency=2)),
    )
    assert (second.pipeline, second.group, [one.batcher for one in second.batchers]) == (
        "Refunds",
        "other",
        ["default"],
    )


async def test_stages_are_named_as_their_tasks_are() -> None:
    broker = Broker(*bodies(8))
    names: set[str] = set()

    def note() -> None:
        names.update(task.get_name() for task in asyncio.all_tasks())

    async def handle(message: Message[bytes]) -> None:
        note()

    async def book(batch: Batch[Any]) -> None:
        note()

    pipeline = Pipeline(broker.open, handle, batch=book, batch_size=4, sources=2)
    async with running(pipeline, broker):
        await broker.settled(8)
        await asyncio.sleep(1)
        note()
    topology = pipeline.topology()
    for stage in (topology.sources, topology.processors, topology.batchers[0].batch_processors):
        assert any(name.startswith(stage.name) for name in names), stage.name
    assert {"handle: source 1", "handle: source 2"} <= names


async def test_threads_are_named_as_processors_too() -> None:
    names: set[str] = set()

    def handle(message: Message[Any]) -> None:
        names.add(threading.current_thread().name)

    broker = Broker("a")
    pipeline = Pipeline(broker.open, handle, concurrency=2)
    async with running(pipeline, broker):
        await broker.settled(1)
    assert all(name.startswith(pipeline.topology().processors.name) for name in names)


def test_a_wrong_number_of_sources_is_refused_at_definition() -> None:
    with pytest.raises(OptionError, match="nothing: sources must be a whole number, 1 or more; got 0"):
        Pipeline(Broker().open, nothing, sources=0)
    with pytest.raises(OptionError, match=r"open_source takes nothing or \(info\)"):
        Pipeline(lambda one, two: Broker().open(), nothing)  # type: ignore[arg-type,misc]


# -- what runs -------------------------------------------------------------------------------------------------------


async def test_the_names_of_what_runs_are_exact_while_pipelines_start_and_stop() -> None:
    transport = Flaky()
    app = app_with("a", "b", transport=transport)
    assert app.manager.all_running() == []
    async with app.running("b") as manager:
        assert manager.all_running() == ["b"]
        transport.ensuring.clear()
        start = asyncio.create_task(manager.start("a"))
        await asyncio.sleep(1)
        assert manager.all_running() == ["b"]
        transport.ensuring.set()
        await start
        assert manager.all_running() == ["a", "b"]
        await manager.stop("b")
        assert manager.all_running() == ["a"]
        await manager.stop("a")
        assert manager.all_running() == []
    assert app.manager.all_running() == []


async def test_one_that_drains_still_runs_and_one_that_was_stopped_has_ended_on_return() -> None:
    app = App(MemoryTransport())

    @app.consumer("work")
    async def work(message: Message[int]) -> None:
        await asyncio.sleep(10)

    async with app.running() as manager:
        await app.publish("work", 1)
        await asyncio.sleep(1)
        stop = asyncio.create_task(manager.stop("work"))
        await asyncio.sleep(1)
        assert manager.all_running() == ["work"]
        await stop
        assert manager.all_running() == []
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("work")]


async def test_one_that_was_given_up_does_not_run() -> None:
    transport = Flaky()
    app = App(transport, max_restarts=0, give_up="continue")
    app.consumer("a", name="a")(nothing)
    async with app.running() as manager:
        transport.opened[0].receive = None  # type: ignore[method-assign,assignment]
        transport.opened[0].resize(0)
        await asyncio.sleep(10)
        assert manager.all_running() == []


# -- a pipeline as a context -----------------------------------------------------------------------------------------


async def test_a_pipeline_runs_while_the_body_runs_and_has_drained_and_ended_after_it() -> None:
    broker = Broker(*bodies(3))

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    async with Pipeline(broker.open, handle).running() as pipeline:
        assert broker.sources
        await asyncio.sleep(0.5)
        stats = pipeline.stats()
        assert stats is not None
        assert stats.running == 3
    assert len(broker.acked) == 3
    broker.check()


async def test_it_runs_again_but_not_twice_at_once() -> None:
    broker = Broker("a")
    pipeline = Pipeline(broker.open, nothing)
    for number in range(1, 3):
        async with pipeline.running():
            with pytest.raises(AppError, match="nothing: this pipeline is running already"):
                await pipeline.run()
            await broker.settled(number)
        broker.put("b")
    broker.check()


async def test_an_error_in_the_body_drains_too_and_is_raised() -> None:
    broker = Broker("a")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1)

    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with Pipeline(broker.open, handle).running():
            await asyncio.sleep(0.5)
            raise ZeroDivisionError
    assert broker.acked == ["m1"]
    broker.check()


async def test_a_pipeline_that_cannot_start_never_enters_the_body() -> None:
    async def open_source() -> Any:
        raise ConnectionError("no such feed")

    with pytest.raises(PipelineFailed, match="no such feed"):
        async with Pipeline(open_source, nothing, max_restarts=0).running():
            raise AssertionError("not reached")


async def test_what_a_handler_that_exits_raised_comes_out_at_the_end() -> None:
    broker = Broker("a")

    async def handle(message: Message[bytes]) -> None:
        raise SystemExit(3)

    error: BaseException | None = None
    try:
        async with Pipeline(broker.open, handle).running():
            await asyncio.sleep(10)
    except SystemExit as caught:
        error = caught
    assert isinstance(error, SystemExit)
    broker.check()


async def test_cancelled_in_the_body_it_drains_and_cancelled_again_it_ends_at_once_and_loses_nothing() -> None:
    broker = Broker("a")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(1000)

    async def main() -> None:
        async with Pipeline(broker.open, handle, shutdown_timeout=500).running():
            await asyncio.sleep(1e6)

    task = asyncio.create_task(main())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(10)
    assert not task.done()
    task.cancel()
    await asyncio.wait((task,), timeout=10)
    assert task.cancelled()
    assert [entry.id for entry in broker.waiting] == ["m1"]
    broker.check()


@pytest.mark.parametrize(("cancels", "acked", "left"), [(1, ["m1", "m2"], []), (2, [], ["m1", "m2"])])
async def test_a_cancel_of_run_drains_and_a_second_one_ends_it_at_once_and_loses_nothing(
    cancels: int, acked: list[str], left: list[str]
) -> None:
    broker = Broker("a", "b")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(10)

    task = asyncio.create_task(Pipeline(broker.open, handle).run())
    await asyncio.sleep(1)
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(1)
    await asyncio.wait((task,))
    assert task.cancelled()
    assert (sorted(broker.acked), sorted(entry.id for entry in broker.waiting)) == (acked, left)
    broker.check()


async def test_a_task_group_supervises_pipelines_and_drains_them_when_another_task_fails() -> None:
    broker = Broker("a", "b")

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(10)

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Pipeline(broker.open, handle).run())
            await asyncio.sleep(1)
            raise ZeroDivisionError
    assert caught.group_contains(ZeroDivisionError)
    assert sorted(broker.acked) == ["m1", "m2"]
    broker.check()
