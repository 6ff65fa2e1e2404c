"""A worker process: it handles what its pipeline sends, one message at a time, until it is told to end.

It reads on a thread of its own, so that it hears its pipeline while a handler runs. When the line ends, the process of
the pipeline is gone, and this one ends at once.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue
from time import perf_counter
from types import FrameType
from typing import Any

from ..errors import AppError, RoutingError
from ..message import Message
from .spec import OpenedHandler, OpenHandler
from .thread_calls import returned_awaitable
from .worker_words import PROTOCOL, Failure, Job, More, Unpacker, failure_of, fields_of, message_of, pack

ORPHANED = 1  # the exit code of a worker whose pipeline is gone
BROKEN = 3  # and of one whose app or lifespan raised, which it has told
READ = 1 << 16


def main(descriptor: int) -> None:
    """Be a worker on the other end of this socket. The first word is `("open", pickled OpenHandler)`."""
    for one in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the pipeline says when to end; children of ours start with the default
        signal.signal(one, _ignore)
    line = socket.socket(fileno=descriptor)
    line.set_inheritable(False)
    worker = Worker(line)
    threading.Thread(target=worker.read, name="sluiceway: line", daemon=True).start()
    try:
        asyncio.run(worker.serve())
    except BaseException as error:
        worker.send("broken", failure_of(error))
        sys.exit(BROKEN)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


class WorkerSettler:
    """What a message can ask of its pipeline from here."""

    def __init__(self, opened: OpenedHandler) -> None:
        self._opened = opened

    async def settle_now(self, messages: Sequence[Message[Any]]) -> None:
        raise AppError(
            f"{self._opened.consumer}: message.ack() does not work in a worker process; "
            "a message is settled when its handler has returned"
        )

    def encode(self, payload: Any) -> bytes:
        return self._opened.encode(payload)

    def with_headers(self, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
        return headers  # the pipeline adds its own when it takes them up

    def check_batcher(self, name: str) -> None:
        known = self._opened.batchers
        if name not in known:
            listed = ", ".join(map(repr, known)) or "none"
            raise RoutingError(f"{self._opened.consumer}: there is no batcher {name!r}; its batchers: {listed}")


class Worker:
    """One worker: `read` runs on a thread, a coroutine handler in the loop, a plain function on another thread."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._sending = threading.Lock()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._orders: SimpleQueue[bytes] = SimpleQueue()
        self._task: asyncio.Task[Any] | None = None
        self._running: int | None = None  # what runs in the loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: asyncio.Event | None = None  # set for an async handler, which waits in the loop

    def send(self, *word: Any) -> None:
        data = pack(*word)
        with self._sending:
            self._line.sendall(data)

    # -- the reading thread --------------------------------------------------------------------------------------

    def read(self) -> None:
        unpacker = Unpacker()
        try:
            while data := self._line.recv(READ):
                for word in unpacker.feed(data):
                    self._take(word)
        finally:
            os._exit(ORPHANED)  # whatever runs: nobody would hear of it

    def _take(self, word: tuple[Any, ...]) -> None:
        match word:
            case ("run", jobs):
                for job in jobs:
                    self._jobs.put(job)
                self._wake()
            case ("recall",):
                self.send("returned", self._given_back())
            case ("cancel", number):
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._cancel, number)
            case ("end",):
                self._jobs.put(None)
                self._wake()
            case ("open", order):
                self._orders.put(order)

    def _given_back(self) -> list[int]:
        numbers: list[int] = []
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return numbers
            if job is None:
                self._jobs.put(None)  # the end stays
                return numbers
            numbers.append(job[0])

    def _wake(self) -> None:
        if self._loop is not None and self._arrived is not None:
            self._loop.call_soon_threadsafe(self._arrived.set)

    # -- the handler ---------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Open the handler, handle until told to end, close it. Raises what the app or its lifespan raises."""
        order = await asyncio.to_thread(self._orders.get)
        open_handler: OpenHandler = pickle.loads(order)
        async with open_handler() as opened:
            self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
            if opened.is_async:
                self._arrived = asyncio.Event()
                self.send("ready")
                await self._handle_in_loop(opened)
            else:
                self.send("ready")
                await asyncio.to_thread(self._handle, opened)

    def _handle(self, opened: OpenedHandler) -> None:
        settler = WorkerSettler(opened)
        job = self._jobs.get()
        while job is not None:
            self.send("entered", job[0])
            while job is not None:
                message, started, value, failure = message_of(job), perf_counter(), None, None
                try:
                    self._begin(opened, settler, message)
                    value = opened.handle(message)
                    if inspect.isawaitable(value):
                        raise returned_awaitable(opened.handle, value)
                except BaseException as error:
                    failure = failure_of(error)
                job = self._ended(opened, job, started, message, value, failure)
            job = self._jobs.get()

    async def _handle_in_loop(self, opened: OpenedHandler) -> None:
        settler = WorkerSettler(opened)
        while (job := await self._next_job()) is not None:
            self.send("entered", job[0])
            while job is not None:
                message, started, value, failure = message_of(job), perf_counter(), None, None
                self._running = job[0]
                try:
                    self._begin(opened, settler, message)
                    value = await opened.handle(message)
                except BaseException as error:
                    failure = failure_of(error)
                self._running = None
                self._forget_cancel()
                job = self._ended(opened, job, started, message, value, failure)
                await asyncio.sleep(0)  # tasks of the lifespan live, and cancels of the next one are heard

    @staticmethod
    def _begin(opened: OpenedHandler, settler: WorkerSettler, message: Message[Any]) -> None:
        message.settler = settler
        message.payload = message.body if opened.decode is None else opened.decode(message.body)

    def _ended(
        self,
        opened: OpenedHandler,
        job: Job,
        started: float,
        message: Message[Any],
        value: Any,
        failure: Failure | None,
    ) -> Job | None:
        """Tell how a handler ended, and in the same word what is entered next; returns that."""
        seconds = perf_counter() - started
        more: bytes | None = None
        if failure is None and message.error is not None:
            failure = failure_of(message.error)
        try:
            more = _more(opened, message, value, failed=failure is not None)
        except Exception as error:
            failure = failure_of(error)
        following: Job | None = None
        try:
            following = self._jobs.get_nowait()
            if following is None:  # the end comes after all that was sent before it
                self._jobs.put(None)
        except Empty:
            pass
        self.send("ended", job[0], None if following is None else following[0], seconds, more, failure)
        return following

    async def _next_job(self) -> Job | None:
        assert self._arrived is not None
        while True:
            self._arrived.clear()
            try:
                return self._jobs.get_nowait()
            except Empty:
                await self._arrived.wait()

    def _cancel(self, number: int) -> None:
        if self._running == number and self._task is not None:
            self._task.cancel()

    def _forget_cancel(self) -> None:
        assert self._task is not None
        while self._task.cancelling():
            self._task.uncancel()


def _more(opened: OpenedHandler, message: Message[Any], value: Any, *, failed: bool) -> bytes | None:
    """What is to be told of a message beside whether it failed; None: nothing. Raises TypeError for what cannot be."""
    batched = bool(opened.batchers) and not failed
    if message.outputs is None and not batched:  # which `configure` sets too
        return None
    outputs = None if message.outputs is None else [fields_of(one) for one in message.outputs]
    more = More(value if batched else None, message.routing if batched else None, outputs, message.ending)
    try:
        return pickle.dumps(more, PROTOCOL)
    except Exception as error:
        raise TypeError(
            f"{opened.consumer}: what the handler returned, a {type(value).__name__}, or the batch key "
            f"{message.routing and message.routing.key!r} cannot be pickled for the batch handler: {error}"
        ) from error
