"""Run an app in a test: its consumers, its pipelines, its options; only the broker is one in memory that watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ..app import App
from ..batch import Batch
from ..codec import encode, make_decoder
from ..errors import AppError
from ..manager import ConsumerManager
from ..message import Outgoing, make_outgoing
from ..signatures import NO_CONTEXT
from ..transport import Transport
from ..transports.memory import MemoryTransport
from .faults import Faults, FaultyTransport
from .observing import as_app, instead
from .record import Delivery, Recorder
from .wrapping import innermost

MOMENT = 0.2  # seconds in which a broker that is not in this process says what it has handed over
SLOWEST = 1.0  # seconds between two looks at what tells nobody that it changed


class Harness:
    """An app under test, and what its broker saw. `running` makes it.

    - `app`, `manager`: the app, and the manager of its pipelines.
    - `deliveries`: how each delivery ended, in that order.
    - `batches`: the batches whose handler was called, in that order, each with its `info`, messages and `values`.
    """

    def __init__(self, app: App, names: Sequence[str], recorder: Recorder) -> None:
        self.app = app
        self.manager: ConsumerManager = app.manager
        self._names = names
        self._recorder = recorder
        self._in_memory = isinstance(innermost(recorder), MemoryTransport)
        self._failure: BaseException | None = None
        self._serving: asyncio.Task[None] | None = None
        self._started = asyncio.Event()
        self._killed = asyncio.Event()
        self._stop = asyncio.Event()

    @property
    def deliveries(self) -> list[Delivery]:
        return list(self._recorder.deliveries)

    @property
    def batches(self) -> list[Batch[Any]]:
        return list(self._recorder.batches)

    def of(self, id: str) -> list[Delivery]:
        """How each delivery of one message ended, in that order."""
        return [one for one in self._recorder.deliveries if one.message.id == id]

    def dead_letters(self, topic: str | None = None) -> list[Delivery]:
        """The deliveries that ended as dead letters, of messages of `topic` or of all."""
        dead = [one for one in self._recorder.deliveries if one.outcome == "dead_letter" and not one.lost]
        return [one for one in dead if topic in (None, one.message.topic)]

    def published(self, topic: str | None = None) -> list[Outgoing]:
        """What the app published, to `topic` or to all, in order: by `app.publish` and, with their settles, by
        `message.publish`. Neither dead letters nor what the harness published."""
        return [one for one in self._recorder.published if topic in (None, one.topic)]

    def payloads(self, topic: str, type: Any = Any) -> list[Any]:
        """What the app published to `topic`, decoded to `type`. Raises DecodeError."""
        decode = make_decoder(type)
        return [one.body if decode is None else decode(one.body) for one in self.published(topic)]

    async def publish(
        self,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
    ) -> str:
        """Publish as somebody else would; returns the message's id. Faults never hit it. Raises as `app.publish`."""
        outgoing = make_outgoing(topic, encode(payload), key=key, headers=headers, delay=delay)
        await self._recorder.wrapped.publish((outgoing,))
        return outgoing.id

    async def publish_many(
        self, topic: str, payloads: Iterable[Any], *, key: Callable[[Any], str | None] | None = None
    ) -> list[str]:
        """Publish many at once, in order; returns their ids. `key` makes the key of each payload."""
        outgoing = [make_outgoing(topic, encode(one), key=key(one) if key else None) for one in payloads]
        await self._recorder.wrapped.publish(outgoing)
        return [one.id for one in outgoing]

    async def idle(self) -> None:
        """Return when nothing waits at the broker, delayed retries included, and nothing is in hand.

        Follow-up messages that handlers publish are waited for too. In virtual time the longest backoff takes no time,
        in real time it takes what it takes. Raises what made the app stop.
        """
        settled = None
        while True:
            await self.until(self._quiet)
            if await self._waiting():
                settled = None
                await self._change(SLOWEST)
            elif self._quiet() and (self._in_memory or settled == len(self._recorder.deliveries)):
                return
            else:  # another broker may have handed over what has not arrived here yet: look again
                settled = len(self._recorder.deliveries)
                await asyncio.sleep(MOMENT)

    async def until(self, true: Callable[[], object]) -> None:
        """Return once `true()` holds, looked at whenever a message came or was settled, and each second besides.

        Raises what made the app stop.
        """
        patience = 0.001
        while not true():
            patience = 0.001 if await self._change(patience) else min(2 * patience, SLOWEST)

    def flush(self, name: str | None = None) -> None:
        """Emit the forming batches, of one consumer or of all, as they are."""
        for one in [name] if name is not None else self.app.consumers:
            self.manager.flush(one)

    async def crash(self) -> None:
        """Let the process of the app die here and another one start in its place; returns when that runs.

        What was in hand comes back as suspects. What runs is cancelled, which stands for its end: nothing of it reaches
        the broker any more. Called inside a handler, or by what a handler calls, it does not return: that is where the
        process died. A handler on a thread cannot be ended and runs on. The lifespan is entered anew.
        Raises Unsupported over a broker that cannot do that; the in-memory one can.
        """
        self._recorder.kill()  # here and now: the very next step could settle something
        self._started.clear()
        self._killed.set()
        await self._until_started()

    # -- running -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Run the app; returns when it runs. Raises what its start raises."""
        self._serving = asyncio.create_task(self._serve(), name="app under test")
        try:
            await self._until_started()
        except asyncio.CancelledError:
            self._serving.cancel()
            raise

    async def end(self) -> None:
        """Drain the app and wait for its end. Raises what made it stop."""
        self._stop.set()
        if self._serving is not None:
            await asyncio.wait((self._serving,))
            self._raise_failure()

    async def _serve(self) -> None:
        """Run the app until `end`, and anew after each crash: what a process manager does."""
        while True:
            life = asyncio.create_task(self._live(), name="a life of the app under test")
            killed = asyncio.create_task(self._killed.wait())
            try:
                await asyncio.wait((life, killed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                killed.cancel()
                if not life.done():
                    life.cancel()
                    await asyncio.sleep(0)  # now it would drain: a process that dies does not
                    life.cancel()
                    await asyncio.wait((life,))
            if not self._killed.is_set():
                return
            self._killed.clear()
            self._failure = None  # what a dying life raised is nobody's
            self._recorder.dying = False

    async def _live(self) -> None:
        try:
            async with self.app.running(*self._names):
                if not self._killed.is_set():  # it may die while it starts
                    self._started.set()
                await self._stop.wait()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # an exit, raised in a task, would end the test's loop and not the test
            self._failure = error

    async def _until_started(self) -> None:
        assert self._serving is not None
        started = asyncio.create_task(self._started.wait())
        try:
            await asyncio.wait((started, self._serving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            started.cancel()
        if not self._started.is_set():
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _quiet(self) -> bool:
        if self._recorder.held or not self._started.is_set():
            return False
        return not any(one.held or one.running or one.state == "starting" for one in self.manager.stats())

    async def _waiting(self) -> bool:
        """Whether something waits at the broker, or may: a pipeline that has no source at present cannot say."""
        for one in self.manager.stats():
            backlog = await self.manager.backlog(one.consumer)
            if backlog is not None:
                if backlog.messages:
                    return True
            elif self.app.transport.features.backlog and one.state not in ("stopped", "failed"):
                return True
        return False

    async def _change(self, seconds: float) -> bool:
        """Wait for a change at the broker, `seconds` at most; whether there was one. Raises what made the app stop."""
        if self._serving is not None and self._serving.done():
            self._raise_failure()
            raise AppError("the app under test has ended")
        self._recorder.changed.clear()
        try:
            await asyncio.wait_for(self._recorder.changed.wait(), seconds)
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def running(
    target: Any,
    *names: str,
    context: Any = NO_CONTEXT,
    broker: Transport | None = None,
    faults: Faults | None = None,
) -> AsyncIterator[Harness]:
    """Run an app (all its consumers, or those named), or one consumer, over a broker in memory.

    Everything else is as in production: pipelines, options, retries, dead letters. `context` is handed to the handlers
    in place of what the app's lifespan yields, which is not entered then. `broker`: another transport to run over.
    `faults`: what goes wrong between app and broker; pipelines are restarted without limit then. Whatever the app
    publishes goes to the test's broker. When the body ends the app drains, and has its own broker again.

    Raises AppError when the app is connected already, and what a pipeline or a handler that exits raised.
    """
    recorder = Recorder(broker or MemoryTransport())
    async with harnessed(as_app(target), names, recorder, context=context, faults=faults) as harness:
        yield harness


@asynccontextmanager
async def harnessed(
    app: App, names: Sequence[str], recorder: Recorder, *, context: Any, faults: Faults | None = None
) -> AsyncIterator[Harness]:
    """Run `app` over `recorder` while the body runs."""
    harness = Harness(app, names, recorder)
    transport = recorder if faults is None else FaultyTransport(recorder, faults, crash=harness.crash)
    with instead(app, transport, recorder, context, restarts=None if faults is None else 1_000_000):
        try:
            await harness.start()
            yield harness
        except BaseException:
            await asyncio.gather(harness.end(), return_exceptions=True)  # what the body raised says more
            raise
        else:
            await harness.end()
        finally:
            await app.aclose()
