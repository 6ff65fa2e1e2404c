"""The body of `running()`: it is cut off when what runs under it has failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from sluiceway import App, ConnectError, Message, Pipeline, PipelineFailed
from sluiceway.transports.memory import MemoryTransport

from .recording import Broker

pytestmark = pytest.mark.virtual_time

Running = Callable[[], AbstractAsyncContextManager[Any]]


async def ignore(message: Message[Any]) -> None: ...


def failing_pipeline(after: float = 1.0, error: Exception | None = None) -> Pipeline:
    """One that is given up after so many seconds."""
    broker = Broker()

    async def receive(demand: int) -> None:
        await asyncio.sleep(after)
        raise error or ConnectError("gone")

    broker.on_receive = receive
    return Pipeline(broker.open, ignore, max_restarts=0)


def failing_app(after: float = 1.0) -> App:
    transport = MemoryTransport()
    subscribe = transport.subscribe

    async def broken(subscription: Any) -> Any:
        source = await subscribe(subscription)

        async def receive(demand: int) -> Any:
            await asyncio.sleep(after)
            raise ConnectError("gone")

        source.receive = receive  # type: ignore[method-assign]
        return source

    transport.subscribe = broken  # type: ignore[method-assign]
    app = App(transport, max_restarts=0)
    app.consumer("work")(ignore)
    return app


def exiting_app() -> App:
    app = App(MemoryTransport())

    @app.consumer("work")
    async def work(message: Message[Any]) -> None:
        raise SystemExit(3)

    return app


both = pytest.mark.parametrize("make", [failing_pipeline, failing_app])


def now() -> float:
    return asyncio.get_running_loop().time()


@both
async def test_a_body_that_waits_for_ever_is_cancelled_and_the_failure_raised(make: Callable[[], Any]) -> None:
    began = now()
    with pytest.raises(PipelineFailed, match="gone"):
        async with make().running():
            await asyncio.Event().wait()
    assert now() - began == pytest.approx(1.0, abs=0.1)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(1)  # and nothing of the cancellation is left


@both
async def test_a_body_may_clean_up(make: Callable[[], Any]) -> None:
    log: list[str] = []

    async def body() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(5)
            log.append("cleaned up")
            raise

    with pytest.raises(PipelineFailed):
        async with make().running():
            await body()
    assert log == ["cleaned up"]


@both
async def test_a_body_that_swallows_its_cancellation_runs_to_its_end_and_then_the_failure_is_raised(
    make: Callable[[], Any],
) -> None:
    log: list[str] = []

    async def body() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append("swallowed")
        await asyncio.sleep(5)
        log.append("done")

    with pytest.raises(PipelineFailed):
        async with make().running():
            await body()
    assert log == ["swallowed", "done"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@both
async def test_what_the_body_raises_itself_comes_first(make: Callable[[], Any]) -> None:
    async def body() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        async with make().running():
            await body()


@both
async def test_a_body_that_ended_before_is_not_cancelled_when_the_drain_fails(make: Callable[[float], Any]) -> None:
    async with make(5.0).running():
        await asyncio.sleep(0.1)


@both
async def test_a_cancellation_from_elsewhere_stays_one(make: Callable[[], Any]) -> None:
    async def body() -> None:
        async with make().running():
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()


async def test_a_cancellation_that_comes_with_the_failure_goes_on_outside() -> None:
    async def body() -> None:
        async with failing_pipeline().running():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                outer.cancel()
                await asyncio.sleep(1)

    outer = asyncio.create_task(body())
    await asyncio.wait((outer,))
    assert outer.cancelled()


@pytest.mark.parametrize("who", ["inner", "outer"])
async def test_nested_each_raises_what_failed_under_it(who: str) -> None:
    times = {"inner": 100.0, "outer": 100.0} | {who: 1.0}
    caught: list[str] = []

    @asynccontextmanager
    async def noting(name: str) -> AsyncIterator[None]:
        try:
            yield
        except PipelineFailed:
            caught.append(name)
            raise
        except asyncio.CancelledError:
            caught.append(f"{name} was cancelled")
            raise

    with pytest.raises(PipelineFailed):
        async with (
            failing_app(times["outer"]).running(),
            noting("outer's body"),
            failing_pipeline(times["inner"]).running(),
            noting("inner's body"),
        ):
            await asyncio.Event().wait()
    assert caught == [
        "inner's body was cancelled", "outer's body" if who == "inner" else "outer's body was cancelled"
    ]  # fmt: skip


async def test_when_both_of_two_nested_ones_fail_at_once_the_outer_failure_is_raised() -> None:
    with pytest.raises(PipelineFailed, match="outer"):
        async with (
            failing_pipeline(error=ConnectError("outer")).running(),
            failing_pipeline(error=ConnectError("inner")).running(),
        ):
            await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_within_a_timeout_that_has_not_expired_no_timeout_is_raised() -> None:
    with pytest.raises(PipelineFailed):
        async with asyncio.timeout(100), failing_app().running():
            await asyncio.Event().wait()


async def test_a_timeout_inside_the_body_is_its_own() -> None:
    async with failing_app(10.0).running():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.Event().wait()


async def test_a_handler_that_exits_the_app_ends_the_body() -> None:
    app = exiting_app()
    await app.publish("work", 1)
    raised: BaseException | None = None
    try:
        async with app.running():
            await asyncio.Event().wait()
    except SystemExit as error:
        raised = error
    assert isinstance(raised, SystemExit)
    assert raised.code == 3


async def test_a_stop_leaves_the_body_alone() -> None:
    broker = Broker("1")
    pipeline = Pipeline(broker.open, ignore)
    async with pipeline.running():
        await broker.settled(1)
        pipeline.stop()
        await asyncio.sleep(10)


async def test_an_app_that_goes_on_without_a_pipeline_leaves_the_body_alone() -> None:
    app = failing_app()
    app.give_up = "continue"
    async with app.running() as manager:
        await asyncio.sleep(10)
        assert manager.stats()[0].state == "failed"
