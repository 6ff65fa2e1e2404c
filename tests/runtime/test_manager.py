"""The app and its manager: start, stop, list, restart, give up, lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sluiceway import App, AppError, ConnectError, Message, OptionError, PipelineFailed
from sluiceway.source import Source, Subscription
from sluiceway.telemetry import PipelineCrashed, PipelineStarted
from sluiceway.transport import Finding
from sluiceway.transports.memory import MemoryTransport

pytestmark = pytest.mark.virtual_time


class Flaky(MemoryTransport):
    """Memory that cannot do what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.subscribe_error: BaseException | None = None
        self.ensure_error: BaseException | None = None
        self.ensured: list[list[str]] = []
        self.findings: list[Finding] = []
        self.opened: list[Source] = []
        self.closed: list[Source] = []
        self.ensuring = asyncio.Event()
        self.ensuring.set()

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        self.ensured.append([topic for one in subscriptions for topic in one.topics])
        await self.ensuring.wait()
        if self.ensure_error is not None:
            raise self.ensure_error
        return [*await super().ensure(subscriptions, create=create), *self.findings]

    async def subscribe(self, subscription: Subscription) -> Any:
        if self.subscribe_error is not None:
            raise self.subscribe_error
        source = await super().subscribe(subscription)
        self.opened.append(source)
        close = source.aclose

        async def aclose(**options: Any) -> None:
            self.closed.append(source)
            await close(**options)

        source.aclose = aclose  # type: ignore[method-assign]
        return source


class Two:
    """An app with two consumers, `a` and `b`."""

    def __init__(self, **options: Any) -> None:
        self.transport = Flaky()
        self.app = App(self.transport, **options)
        self.handled: list[tuple[str, Any]] = []

        @self.app.consumer("a")
        async def a(message: Message[Any]) -> None:
            self.handled.append(("a", message.payload))
            if message.payload == "crash":
                raise SystemExit(3)

        @self.app.consumer("b")
        async def b(message: Message[Any]) -> None:
            self.handled.append(("b", message.payload))

    def states(self) -> dict[str, str]:
        return {one.consumer: one.state for one in self.app.manager.stats()}

    def check(self) -> None:
        assert len(self.transport.opened) == len(self.transport.closed)
        assert self.transport.held("default") == 0


async def test_consumers_stop_start_and_restart_at_run_time() -> None:
    two = Two()
    async with two.app.running() as manager:
        assert two.states() == {"a": "running", "b": "running"}
        drained = await manager.stop("a")
        assert drained is not None
        assert (drained.released, drained.cancelled, drained.unsettled) == (0, 0, 0)
        assert await manager.stop("a") is None
        assert two.states() == {"a": "stopped", "b": "running"}
        await two.app.publish("a", 1)
        await two.app.publish("b", 2)
        await manager.idle()
        assert two.handled == [("b", 2)]
        await manager.start("a")
        await manager.start("a")
        await manager.idle()
        assert two.handled == [("b", 2), ("a", 1)]
        await manager.restart("b")
        await two.app.publish("b", 3)
        await manager.idle()
        assert two.handled[-1] == ("b", 3)
    assert two.states() == {"a": "stopped", "b": "stopped"}
    two.check()


async def test_only_the_named_consumers_run() -> None:
    two = Two()
    async with two.app.running("b"):
        assert two.states() == {"a": "stopped", "b": "running"}


async def test_an_unknown_consumer_is_an_error_that_names_the_nearest() -> None:
    two = Two()
    with pytest.raises(OptionError, match="there is no consumer 'aa'; did you mean 'a'"):
        async with two.app.running("aa"):
            pass


async def test_two_starts_at_once_start_one_pipeline() -> None:
    two = Two()
    async with two.app.running("b") as manager:
        two.transport.ensuring.clear()
        starts = [asyncio.create_task(manager.start("a")) for _ in range(3)]
        await asyncio.sleep(1)
        two.transport.ensuring.set()
        await asyncio.gather(*starts)
        assert len(two.transport.opened) == 2
    two.check()


async def test_a_start_while_the_app_stops_is_refused_and_leaves_nothing_running() -> None:
    two = Two()
    async with two.app.running("b") as manager:
        two.transport.ensuring.clear()
        start = asyncio.create_task(manager.start("a"))
        await asyncio.sleep(1)
    two.transport.ensuring.set()
    with pytest.raises(AppError):
        await start
    assert two.states() == {"a": "stopped", "b": "stopped"}
    two.check()


async def test_the_manager_works_only_while_the_app_runs() -> None:
    two = Two()
    with pytest.raises(AppError, match="the app is not running"):
        await two.app.manager.start("a")
    async with two.app.running():
        with pytest.raises(AppError, match="running already"):
            async with two.app.running():
                pass
        assert two.states() == {"a": "running", "b": "running"}
    two.check()


async def test_an_app_runs_again_after_it_stopped() -> None:
    two = Two()
    for number in range(3):
        async with two.app.running() as manager:
            await two.app.publish("a", number)
            await manager.idle()
    assert two.handled == [("a", 0), ("a", 1), ("a", 2)]
    two.check()


async def test_an_exit_in_one_consumer_drains_the_others_and_is_raised_by_run() -> None:
    two = Two()
    run = asyncio.create_task(_caught(two.app.run()))
    await asyncio.sleep(1)
    await two.app.publish("a", "crash")
    error = await run
    assert isinstance(error, SystemExit)
    assert error.code == 3
    assert two.states() == {"a": "stopped", "b": "stopped"}
    two.check()


async def test_a_pipeline_restarts_after_a_crash_with_backoff() -> None:
    two = Two()
    events: list[Any] = []
    two.app.telemetry.attach(events.append, PipelineCrashed, PipelineStarted)
    async with two.app.running("a") as manager:
        _crash(two.transport.opened[-1])
        await asyncio.sleep(10)
        assert two.states()["a"] == "running"
        assert manager.stats()[0].restarts == 1
        await two.app.publish("a", 1)
        await manager.idle()
    assert two.handled == [("a", 1)]
    assert [type(one).__name__ for one in events] == ["PipelineStarted", "PipelineCrashed", "PipelineStarted"]
    assert 0 < events[1].delay < 1
    two.check()


async def test_a_pipeline_that_is_given_up_drains_the_others_and_fails_the_run() -> None:
    two = Two(max_restarts=0)
    run = asyncio.create_task(_caught(two.app.run()))
    await asyncio.sleep(1)
    _crash(two.transport.opened[0])
    error = await run
    assert isinstance(error, PipelineFailed)
    assert "a: crashed more often than 0 restarts in 60 s allow; last: ConnectError: gone" in str(error)
    assert two.states() == {"a": "failed", "b": "stopped"}
    two.check()


async def test_the_app_goes_on_without_a_given_up_pipeline_when_told_to() -> None:
    two = Two(max_restarts=0, give_up="continue")
    async with two.app.running() as manager:
        _crash(two.transport.opened[0])
        await asyncio.sleep(1)
        assert two.states() == {"a": "failed", "b": "running"}
        await two.app.publish("b", 1)
        await manager.idle()
        await manager.start("a")
        assert two.states() == {"a": "running", "b": "running"}
    assert two.handled == [("b", 1)]
    two.check()


async def test_an_error_in_ensure_stops_the_start_and_closes_what_was_open() -> None:
    two = Two()
    two.transport.findings = [Finding("error", "queue a is a classic one"), Finding("error", "no queue b")]
    with pytest.raises(AppError, match="queue a is a classic one; no queue b"):
        async with two.app.running():
            raise AssertionError("not reached")
    two.transport.findings = []
    two.transport.ensure_error = ConnectError("no broker")
    with pytest.raises(ConnectError):
        async with two.app.running():
            raise AssertionError("not reached")
    two.check()


async def test_what_all_consumers_need_is_made_in_one_call_before_any_of_them_starts() -> None:
    two = Two()
    two.transport.ensuring.clear()
    running = two.app.running()
    starting = asyncio.create_task(running.__aenter__())
    await asyncio.sleep(1)
    assert two.transport.ensured == [["a", "b"]]
    assert not two.transport.opened
    two.transport.ensuring.set()
    manager = await starting
    await manager.restart("b")
    await running.__aexit__(None, None, None)
    assert two.transport.ensured == [["a", "b"], ["b"]]
    two.check()


async def test_sources_open_side_by_side() -> None:
    two = Two()
    both = asyncio.Barrier(2)
    subscribe = two.transport.subscribe

    async def together(subscription: Subscription) -> Any:
        await both.wait()
        return await subscribe(subscription)

    two.transport.subscribe = together  # type: ignore[method-assign]
    async with two.app.running():
        assert two.states() == {"a": "running", "b": "running"}
    two.check()


async def test_a_subscribe_that_fails_is_tried_again_and_then_given_up() -> None:
    two = Two(max_restarts=2)
    two.transport.subscribe_error = ConnectError("no broker")
    with pytest.raises(PipelineFailed, match="ConnectError: no broker"):
        async with two.app.running():
            raise AssertionError("not reached")
    two = Two(max_restarts=5)
    two.transport.subscribe_error = ConnectError("no broker")
    asyncio.get_running_loop().call_later(0.2, setattr, two.transport, "subscribe_error", None)
    async with two.app.running():
        assert two.states() == {"a": "running", "b": "running"}
    two.check()


class TestLifespan:
    def app(self, log: list[str], *, fail: str = "") -> App:
        @asynccontextmanager
        async def lifespan() -> AsyncIterator[list[str]]:
            log.append("enter")
            if fail == "enter":
                raise RuntimeError("enter")
            try:
                yield log
            finally:
                log.append("leave")
                if fail == "leave":
                    raise RuntimeError("leave")

        app = App(MemoryTransport(), lifespan=lifespan)

        @app.consumer("work")
        async def work(message: Message[int], context: list[str]) -> None:
            await asyncio.sleep(1)
            context.append("handled")

        return app

    async def test_it_is_entered_before_the_first_message_and_left_after_the_last_settle(self) -> None:
        log: list[str] = []
        app = self.app(log)
        await app.publish("work", 1)
        async with app.running():
            await asyncio.sleep(0.5)
        assert log == ["enter", "handled", "leave"]

    async def test_an_error_on_entering_starts_nothing(self) -> None:
        log: list[str] = []
        app = self.app(log, fail="enter")
        await app.publish("work", 1)
        with pytest.raises(RuntimeError, match="enter"):
            await app.run()
        assert log == ["enter"]

    async def test_an_error_on_leaving_is_raised_after_the_drain(self) -> None:
        log: list[str] = []
        app = self.app(log, fail="leave")
        await app.publish("work", 1)
        with pytest.raises(RuntimeError, match="leave"):
            async with app.running():
                await asyncio.sleep(0.5)
        assert log == ["enter", "handled", "leave"]

    async def test_an_error_in_the_body_drains_too(self) -> None:
        log: list[str] = []
        app = self.app(log)
        await app.publish("work", 1)
        with pytest.raises(TimeoutError):
            async with app.running(), asyncio.timeout(0.5):
                await asyncio.sleep(10)
        assert log == ["enter", "handled", "leave"]


async def test_a_paused_consumer_handles_nothing_until_it_is_resumed() -> None:
    two = Two()
    async with two.app.running() as manager:
        manager.pause("a")
        await two.app.publish("a", 1)
        await asyncio.sleep(100)
        assert two.states()["a"] == "paused"
        assert two.handled == []
        manager.resume("a")
        await manager.idle()
    assert two.handled == [("a", 1)]
    two.check()


def _crash(source: Any) -> None:
    """The source's receive raises what it cannot mend."""

    async def receive(demand: int) -> Any:
        raise ConnectError("gone")

    source.receive = receive
    source.resize(0)  # so that a receive that waits returns


async def _caught(work: Any) -> BaseException | None:
    """What `work` raises; a task that raised SystemExit would end the test's loop."""
    try:
        await work
    except BaseException as error:
        return error
    return None
