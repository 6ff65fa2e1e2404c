"""One worker process as its pipeline sees it: started, spoken to, listened to, killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from subprocess import DEVNULL, Popen
from typing import Any, Literal

from ..message import Message
from .worker_words import Failure, Unpacker, job_of, pack

READ = 1 << 18

_numbers = itertools.count(1)


class Worker:
    """One process, from its start to its end.

    `sent` are the messages that it has, by number, in the order in which it handles them; `running` is the number of
    the one whose handler was entered. `on_word` is called with each word that it says, also with what it said before it
    died.
    """

    def __init__(self, on_word: Callable[[Worker, tuple[Any, ...]], None]) -> None:
        self.sent: dict[int, Message[Any]] = {}
        self.running: int | None = None
        self.seen: tuple[int | None, float] = (None, 0.0)  # what the last sweep saw running, and since when
        self.ready = False
        self.recalled: Literal["release", "spread"] | None = None  # what becomes of what it gives back, when asked to
        self.doomed: tuple[int, BaseException] | None = None  # what it is cut off for, and what that message fails with
        self.broken: Failure | None = None  # why it could not start or end well
        self.began = 0.0
        self._on_word = on_word
        self._process: Popen[bytes] | None = None
        self._killed = False
        self._ending = False
        self._line: socket.socket | None = None
        self._unpacker = Unpacker()
        self._unsent = bytearray()
        self._loop = asyncio.get_running_loop()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def waiting(self) -> int:
        """How many messages it has that it has not entered."""
        return len(self.sent) - (self.running is not None)

    async def live(self, order: bytes) -> int:
        """Start the process, listen to it, and return its exit code when it has ended and all it said is heard.

        Raises OSError when it cannot be started.
        """
        line, theirs = socket.socketpair()
        line.setblocking(False)
        try:
            with theirs:
                self._process = _spawn(theirs.fileno())
            ended = self._loop.create_future()
            threading.Thread(target=self._wait, args=(ended,), name=f"worker {self.pid}: end", daemon=True).start()
            if self._killed:
                self.kill()
            self._line = line
            self._loop.add_reader(line, self._read)
            self.send("open", order)
            if self._ending:
                self.end()
            code: int = await ended
            self._read_rest(line)
            return code
        finally:
            self._line = None
            self._loop.remove_reader(line)
            self._loop.remove_writer(line)
            line.close()

    def give(self, messages: Sequence[Message[Any]]) -> None:
        """Send messages to be handled after what it has."""
        jobs = []
        for message in messages:
            number = next(_numbers)
            self.sent[number] = message
            jobs.append(job_of(number, message))
        self.send("run", jobs)

    def send(self, *word: Any) -> None:
        """Say something; what does not fit into the line now goes when it does. A dead worker hears nothing."""
        if self._line is not None:
            self._unsent += pack(*word)
            self._flush()

    def end(self) -> None:
        """Let the process leave its lifespan and end, when it has done what it has."""
        self._ending = True
        self.send("end")

    def kill(self) -> None:
        """End the process at once. Idempotent."""
        self._killed = True
        if self._process is not None:
            self._process.kill()

    def _wait(self, ended: asyncio.Future[int]) -> None:
        """Wait for the end, on a thread. asyncio would do so too, but loses the exit code of one killed as it dies."""
        assert self._process is not None
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(_set, ended, code)

    def _flush(self) -> None:
        assert self._line is not None
        try:
            while self._unsent:
                del self._unsent[: self._line.send(self._unsent)]
        except BlockingIOError:
            self._loop.add_writer(self._line, self._flush)
            return
        except OSError:  # it died; its end tells what it left
            self._unsent.clear()
        self._loop.remove_writer(self._line)

    def _read(self) -> None:
        assert self._line is not None
        try:
            data = self._line.recv(READ)
        except BlockingIOError:
            return
        except OSError:  # reset: it died with something unread
            data = b""
        if data:
            self._hear(data)
        else:
            self._loop.remove_reader(self._line)
            self.kill()  # it died; or it lost its line, and is of no use any more

    def _read_rest(self, line: socket.socket) -> None:
        """What it said before its end. Not until the line ends: a process that a handler forked may hold it."""
        with contextlib.suppress(OSError):
            while data := line.recv(READ):
                self._hear(data)

    def _hear(self, data: bytes) -> None:
        for word in self._unpacker.feed(data):
            self._on_word(self, word)


def _set(ended: asyncio.Future[int], code: int) -> None:
    if not ended.done():
        ended.set_result(code)


def _spawn(descriptor: int) -> Popen[bytes]:
    """A fresh interpreter, never a fork: SQLite's locks and our threads do not survive one.

    It does not import the program that we run, so a program needs no `if __name__ == "__main__"` for it. In a process
    group of its own no Ctrl-C reaches it. What handlers print goes where ours goes.
    """
    path = list(map(str, sys.path))
    code = f"import sys; sys.path[:] = {path!r}; from {__package__}.worker_main import main; main({descriptor})"
    return Popen(
        [sys.executable, "-c", code],
        stdin=DEVNULL, stdout=_descriptor(sys.stdout), stderr=_descriptor(sys.stderr),
        pass_fds=(descriptor,), process_group=0,
    )  # fmt: skip


def _descriptor(stream: Any) -> int | None:
    """Where a stream of ours goes, if the system knows of it."""
    try:
        stream.flush()
        number: int = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    return number


def how_ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
