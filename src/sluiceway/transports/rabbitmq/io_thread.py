"""The thread that all connections of a transport live on, so that no handler can keep a heartbeat waiting."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _QuietThread(logging.Filter):
    """Keeps what pika logs on one thread out of the user's logs: it tells each lost connection many times, and we once.
    pika elsewhere in the process, and its debug and info records, are left as they are."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self._thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread or record.levelno < logging.WARNING

    def __enter__(self) -> None:
        for logger in _loggers():
            logger.addFilter(self)

    def __exit__(self, *_: object) -> None:
        for logger in _loggers():
            logger.removeFilter(self)


def _loggers() -> list[logging.Logger]:
    """pika's. A filter holds for one logger alone, not for those below it."""
    known = logging.root.manager.loggerDict.items()
    return [one for name, one in list(known) if name.startswith("pika") and isinstance(one, logging.Logger)]


class IOThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sluiceway-rabbitmq", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        quiet = _QuietThread(threading.get_ident())
        try:
            with quiet:
                self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call it there, soon, after all that was called before. Does nothing once the thread has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(function, *arguments)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it there and return what it returns. A cancel goes through."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    async def stop(self) -> None:
        """End what runs there, and the thread."""
        if self._thread.is_alive():
            await self.run(self._cancel_all())
            self.loop.call_soon_threadsafe(self.loop.stop)
            await asyncio.to_thread(self._thread.join)

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
