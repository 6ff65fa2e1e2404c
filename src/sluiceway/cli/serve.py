"""Running the app in this process: from opening the sources to how the drain went."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from msgspec import Struct

from ..errors import SluicewayError
from ..manager import ConsumerManager
from .counts import Counts
from .events import Event, Started, Status, Stopped
from .exits import GAVE_UP, INTERRUPTED, NO_READER, OK, code_of, code_of_exit, forget_stdout
from .find import Found, users_part
from .lifeline import Lifeline
from .screen import Screen
from .topology import describe, file_of

log = logging.getLogger("sluiceway")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSING = 15.0  # seconds beyond the app's shutdown_timeout in which a drain that was cut off ends
THREADS = "sluiceway: to_thread"
COST_SHARE = 20  # asking what waits takes at most one part in so many of the time


class Plan(Struct, frozen=True, kw_only=True):
    """What to run: consumers by name (none named: all), and whether to end when nothing waits."""

    names: tuple[str, ...] = ()
    until_empty: bool = False


class Server:
    """One run of an app in this process."""

    def __init__(self, found: Found, plan: Plan, screen: Screen, lifeline: Lifeline | None = None) -> None:
        self.found = found
        self.app = found.app
        self.plan = plan
        self.screen = screen
        self.names = plan.names or tuple(self.app.consumers)
        self.counts = Counts(self.app, self.names)
        self._lifeline = lifeline
        self._stop = asyncio.Event()
        self._open = asyncio.Event()
        self._no_reader = False
        self._asked: int | None = None  # the first signal
        self._hurried: int | None = None  # the second
        self._signals_now: set[int] = set()  # in this turn of the loop
        self._began = time.monotonic()
        self._reason: str | None = None

    async def run(self) -> int:
        """Run until a signal, the end of the queue or a failure; drain; tell. Returns the exit code."""
        loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(thread_name_prefix=THREADS)
        loop.set_default_executor(threads)
        self._task = asyncio.current_task()
        self._watch_parent(loop)
        with signals_to(self._on_signal):
            code = await self._outcome()
            if self._hurried is not None:
                code = 128 + self._hurried
            elif self._no_reader and code == OK:
                code = NO_READER
            self._tell(self._stopped(code))
        _leave_busy_threads(threads, code)
        return code

    # -- running -------------------------------------------------------------------------------------------------

    async def _outcome(self) -> int:
        """Run and drain; returns the exit code of how it ended."""
        try:
            await self._serve()
        except asyncio.CancelledError:
            if self._asked is None:
                raise
            self._reason = "stopped before it had started"
        except SystemExit as error:
            code = code_of_exit(error)
            self._reason = f"a handler exits the app: {error.code}" if code else None
            return code
        except KeyboardInterrupt:
            self._reason = "a handler raised KeyboardInterrupt"
            return INTERRUPTED
        except SluicewayError as error:
            self._reason = str(error)
            return code_of(error)
        except Exception as error:
            where = (type(error), error, users_part(error))
            log.error("the app failed outside of its handlers, in its lifespan perhaps", exc_info=where)
            self._reason = f"{type(error).__name__}: {error}"
            return GAVE_UP
        return OK

    async def _serve(self) -> None:
        async with self._telling(), self.app.running(*self.plan.names) as manager:
            self._open.set()
            consumers = tuple(describe(self.app, self.app.consumers[name]) for name in self.names)
            self._tell(
                Started(
                    app=self.found.reference,
                    how=self.found.how,
                    broker=self.app.broker,
                    file=file_of(self.app),
                    pid=os.getpid(),
                    consumers=consumers,
                )
            )
            async with self._stopping_when_empty(manager):
                await self._stop.wait()

    @asynccontextmanager
    async def _stopping_when_empty(self, manager: ConsumerManager) -> AsyncIterator[None]:
        """With --until-empty: stop when nothing waits. What made the app stop is raised by the body, in this task: a
        SystemExit that leaves any other task ends the loop at once, without a drain.
        """
        if not self.plan.until_empty:
            yield
            return

        async def watch() -> SluicewayError | None:
            try:
                await manager.idle()
                self.counts.emptied()
            except SluicewayError as error:  # what waits cannot be asked
                return error
            except (KeyboardInterrupt, SystemExit):
                return None
            finally:
                self._stop.set()
            return None

        task = asyncio.create_task(watch(), name="idle")
        try:
            yield
        finally:
            task.cancel()
        error = await asyncio.gather(task, return_exceptions=True)
        if isinstance(error[0], SluicewayError):
            raise error[0]

    # -- telling -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _telling(self) -> AsyncIterator[None]:
        """Show the status while the body runs, its drain included, and once more at its end."""
        tasks = [
            asyncio.create_task(self._show_status(), name="status"),
            asyncio.create_task(self._ask_what_waits(), name="backlog"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._open.is_set():
                self.counts.stopped_asking()
                self._show()

    async def _show_status(self) -> None:
        await self._open.wait()
        while True:
            await asyncio.sleep(self.screen.interval)
            self._show()

    def _show(self) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        self._tell(Status(seconds=seconds, consumers=self.counts.status(time.monotonic())))

    def _tell(self, event: Event) -> None:
        try:
            self.screen.show(event)
        except BrokenPipeError:
            self._reader_gone()

    def _reader_gone(self) -> None:
        """Nobody reads the events: end as a program does whose pipe broke, but lose nothing."""
        if not self._no_reader:
            log.warning("nobody reads the events any more: draining")
            forget_stdout()
        self._no_reader = True
        self._stop.set()

    async def _ask_what_waits(self) -> None:
        await self._open.wait()
        while True:
            began = time.monotonic()
            for name in self.names:
                try:
                    backlog = await self.app.manager.backlog(name)
                    self.counts.waiting[name] = None if backlog is None else backlog.messages
                except SluicewayError as error:
                    log.debug("%s: what waits is not known: %s", name, error)
                    self.counts.waiting[name] = None
            cost = time.monotonic() - began
            await asyncio.sleep(max(self.screen.interval, min(1.0, self.screen.interval * 4), COST_SHARE * cost))

    def _stopped(self, code: int) -> Stopped:
        now = time.monotonic()
        drains = self.app.manager.drained().values()
        return Stopped(
            code=code,
            reason=self._reason,
            seconds=round(now - self._began, 3),
            drain_seconds=round(max((one.seconds for one in drains), default=0.0), 3),
            handled=self.counts.total("ack"),
            failed=self.counts.failed.total(),
            retried=self.counts.total("retry"),
            dead_lettered=self.counts.total("dead_letter"),
            drain_released=sum(one.released for one in drains),
            cancelled=sum(one.cancelled for one in drains),
            unsettled=sum(one.unsettled for one in drains),
            opened=self._open.is_set(),
        )

    # -- being told ----------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if is_echo(number, self._signals_now):
            return
        name = signal.Signals(number).name
        if self._asked is None:
            self._asked = number
            said = self._lifeline is not None and self._lifeline.echoed  # by our parent, on a terminal
            level = logging.DEBUG if said else logging.INFO
            log.log(level, "%s: draining, up to %g s; once more cancels what runs", name, self.app.shutdown_timeout)
            self._end()
        elif self._hurried is None:
            self._hurried = number
            log.warning("%s again: running handlers are cancelled; once more leaves at once", name)
            self.app.manager.hurry()
        else:
            log.error("%s a third time: leaving at once; what is unsettled comes back", name)
            _leave(128 + number)

    def _end(self) -> None:
        self._stop.set()
        if not self._open.is_set() and self._task is not None:
            self._task.cancel()  # nothing is in hand yet, and connecting may take for ever

    def _watch_parent(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._lifeline is not None:
            self._lifeline.grace = self.app.shutdown_timeout + CLOSING
            self._lifeline.on_parent_gone = lambda: _call(loop, self._parent_gone)

    def _parent_gone(self) -> None:
        log.warning("the parent process is gone: draining")
        self._asked = self._asked or signal.SIGTERM
        self._end()


@contextlib.contextmanager
def signals_to(handler: Callable[[int], None]) -> Iterator[None]:
    """What asks to end goes to `handler`, in the running loop."""
    loop = asyncio.get_running_loop()
    for one in SIGNALS:
        loop.add_signal_handler(one, handler, one)
    try:
        yield
    finally:
        for one in SIGNALS:
            loop.remove_signal_handler(one)


def is_echo(number: int, heard: set[int]) -> bool:
    """Whether a signal came before in this turn of the loop: `timeout` sends it to us and to our process group at once,
    and that is no second one. `heard` is the caller's, and only for this.
    """
    if number in heard:
        return True
    heard.add(number)
    asyncio.get_running_loop().call_soon(heard.clear)
    return False


def run_in_loop(main: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine in a new loop, uvloop's where that is installed."""
    try:
        import uvloop
    except ImportError:
        factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop is closed: the process is ending anyway
        return


def _leave_busy_threads(threads: ThreadPoolExecutor, code: int) -> None:
    """What handlers gave to threads and still runs would keep the process for ever: leave without it, and say so."""
    threads.shutdown(wait=False, cancel_futures=True)
    mine = [one for one in threading.enumerate() if one.name.startswith(THREADS)]
    deadline = time.monotonic() + 1.0
    for thread in mine:
        thread.join(max(0.0, deadline - time.monotonic()))
    busy = sum(thread.is_alive() for thread in mine)
    if busy:
        log.warning("%d threads that handlers started still run; the process ends without them", busy)
        _leave(code)


def _leave(code: int) -> None:
    """End the process now, with what was written out."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
