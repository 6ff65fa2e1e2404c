"""Virtual time for asyncio: when nothing is ready, the clock jumps to the next timer instead of waiting for it.

An hour of retries takes milliseconds, and always the same way. What happens outside the loop cannot be hurried: while
work there is known to be pending, on an executor or inside `external()`, the loop waits really, at real speed.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

GRACE = 0.25  # real seconds to wait for a thread nobody told us of, before a silent loop is called dead


class Deadlock(RuntimeError):
    """All tasks wait, no timer is set, nothing outside is known to be pending: nothing would ever happen again."""


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. `time()` starts at 0 seconds and moves only by jumps to timers.

    File descriptors and `call_soon_threadsafe` work as ever. Nothing tells the loop of work in plain threads and other
    processes: wrap the wait for it in `external()`. While it is pending, timers run at real speed.
    Raises Deadlock from what runs it, after `grace` real seconds in which nothing could happen any more.
    """

    def __init__(self, *, grace: float = GRACE) -> None:
        self._now = 0.0
        self._external = 0
        self._lock = threading.Lock()
        super().__init__(_JumpingSelector(self, selectors.DefaultSelector(), grace))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock on. Timers that are due by then run in the loop's next turn."""
        self._now += seconds

    @property
    def pending_outside(self) -> bool:
        """Whether work outside the loop is known to be pending."""
        return self._external > 0

    @contextmanager
    def external(self) -> Iterator[None]:
        """While inside, the loop waits really. From any thread; may be nested and entered by many at once."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """As ever; until the call has returned, the loop waits really."""
        future = super().run_in_executor(executor, func, *args)
        self._count(1)
        future.add_done_callback(lambda _: self._count(-1))
        return future

    def _count(self, change: int) -> None:
        with self._lock:
            self._external += change
        if not self._external and not self.is_closed():
            self.call_soon_threadsafe(_nothing)  # the loop may be in a real wait that has lost its reason


class _JumpingSelector(selectors.BaseSelector):
    """Asks the real selector what is ready and, when nothing is, lets the clock jump."""

    def __init__(self, loop: VirtualClockLoop, real: selectors.BaseSelector, grace: float) -> None:
        self._loop = loop
        self._real = real
        self._grace = grace

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self._loop.pending_outside:
            return self._wait(timeout)
        if timeout is None:
            return self._real.select(self._grace) or self._give_up()
        self._loop.advance(timeout)
        return ready

    def _wait(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        began = time.monotonic()
        ready = self._real.select(timeout)
        spent = time.monotonic() - began
        self._loop.advance(spent if ready or timeout is None else timeout)
        return ready

    def _give_up(self) -> list[tuple[selectors.SelectorKey, int]]:
        waiting = [f"\n  {task!r}" for task in asyncio.all_tasks(self._loop) if not task.done()]
        raise Deadlock(
            f"the event loop can never go on: at {self._loop.time():g} virtual seconds no timer is set, nothing is "
            "ready and no work outside is pending. If a thread or another process is to wake it, wait inside "
            f"sluiceway.testing.external(). {len(waiting)} waiting tasks:{''.join(waiting)}"
        )

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


@contextmanager
def external() -> Iterator[None]:
    """Say that what is awaited inside happens outside the loop: in a thread, another process, on the network.

    In virtual time the loop waits really meanwhile; on any other loop this does nothing.
    """
    loop = asyncio.get_running_loop()
    if isinstance(loop, VirtualClockLoop):
        with loop.external():
            yield
    else:
        yield


def run(main: Coroutine[Any, Any, T], *, grace: float = GRACE) -> T:
    """Like `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualClockLoop(grace=grace)) as runner:
        return runner.run(main)


def _nothing() -> None:
    pass
