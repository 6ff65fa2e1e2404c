"""A pool of worker processes: it keeps them fed, knows what each has, and loses nothing when one dies."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from .._decisions.ahead import Ahead
from .._decisions.backoff import reconnect_delay
from ..errors import HandlerTimeout, KilledItsProcess
from ..message import Message
from .chance import draw
from .processors import NEARLY, SWEEPS
from .spec import RemoteHandler
from .worker import Worker, how_ended
from .worker_words import NOTHING, Failure, More, error_of

log = logging.getLogger("sluiceway")

GRACE = 1.0  # seconds that a cancelled coroutine has to clean up before its process is killed
FAILED_STARTS = 3  # in a row, after which the pipeline crashes: more would fail too


class PoolUser(Protocol):
    """What a pool tells of messages. Each that is put is told of once: by `ended`, or by `given_back`."""

    def claim(self, message: Message[Any]) -> bool:
        """A message is about to be sent to a worker; False: it is of no interest any more, and dropped."""
        ...

    def unclaim(self, message: Message[Any]) -> None:
        """It came back: its handler was not entered."""
        ...

    def entered(self, worker: Worker, message: Message[Any]) -> None:
        """A worker enters the handler."""
        ...

    def ended(self, message: Message[Any], more: More, error: BaseException | None) -> None:
        """The handler ended, its worker died under it, or it was cut off."""
        ...

    def given_back(self, messages: list[Message[Any]]) -> None:
        """What workers had not entered when all was taken back."""
        ...

    def changed(self) -> None:
        """A worker began, ended or has nothing to do."""
        ...

    def crashed(self, error: BaseException) -> None:
        """No worker can be started."""
        ...


class WorkerPool:
    """Up to `size` worker processes, each with one handler at a time, started when there is work for them.

    A worker gets a few messages `ahead` of the one that it runs, as many as it handles in a moment, and says which one
    it enters before it does. So the death of a worker is put down to one message, which ends with KilledItsProcess;
    those that wait behind it go to another worker. What runs over `timeout` seconds is cancelled, where it is a
    coroutine that heeds that, or its worker is killed.
    """

    def __init__(
        self,
        name: str,
        remote: RemoteHandler,
        size: int,
        user: PoolUser,
        *,
        ahead: Ahead | None,
        timeout: float | None,
    ) -> None:
        self.name = name
        self.workers: list[Worker] = []
        self.ready: deque[Message[Any]] = deque()
        self._remote = remote
        self._size = size
        self._user = user
        self._ahead = ahead
        self._living: set[asyncio.Task[None]] = set()
        self._cut_off = False
        self._closed = False
        self._failed_starts = 0
        self._deaths = 0  # in a row, without a message handled between them
        self._next_start: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._sweep: asyncio.TimerHandle | None = None
        if timeout is not None:
            self._sweep = self._loop.call_later(timeout / SWEEPS, self._sweep_workers, timeout)

    @property
    def waiting(self) -> int:
        """Messages whose handler was not entered, here and in workers."""
        return len(self.ready) + sum(worker.waiting for worker in self.workers)

    @property
    def running(self) -> int:
        return sum(worker.running is not None for worker in self.workers)

    @property
    def idle(self) -> bool:
        """Whether a worker has nothing to do, or one more may be started."""
        return len(self.workers) < self._size or not all(worker.sent for worker in self.workers)

    def put(self, messages: Sequence[Message[Any]]) -> None:
        self.ready.extend(messages)
        self._start()
        self._feed()

    def take_back(self) -> list[Message[Any]]:
        """Take back what waits here. What waits in workers is called back, and told of by `given_back`."""
        taken = list(self.ready)
        self.ready.clear()
        for worker in self.workers:
            if worker.waiting:
                self._recall(worker)
                worker.recalled = "release"
        return taken

    def cut_off(self, worker: Worker, error: BaseException) -> None:
        """Cancel or kill what a worker runs; its message ends with `error`."""
        assert worker.running is not None
        worker.doomed = (worker.running, error)
        if self._remote.is_async:
            worker.send("cancel", worker.running)
            self._loop.call_later(GRACE, self._kill_doomed, worker, worker.running)
        else:
            worker.kill()

    def cut_off_all(self, error: BaseException) -> int:
        """Cut off all that runs, for good; returns how many. What comes back from now on is given back."""
        self._cut_off = True
        running = [worker for worker in self.workers if worker.running is not None]
        for worker in running:
            self.cut_off(worker, error)
        return len(running)

    def drop(self, message: Message[Any], error: BaseException) -> None:
        """Nobody waits for a message any more: a worker that has it is killed."""
        if message in self.ready:
            self.ready.remove(message)
            return
        for worker in self.workers:
            for number, sent in worker.sent.items():
                if sent is message:
                    worker.doomed = (number, error)
                    worker.kill()

    async def end(self) -> None:
        """Let the workers leave their lifespans and end; return when they have. Nothing may be in hand."""
        self._closed = True
        for worker in self.workers:
            worker.end()
        if self._living:
            await asyncio.wait(self._living)

    def close(self) -> set[asyncio.Task[None]]:
        """Kill all; returns what has yet to end."""
        self._closed = self._cut_off = True
        for timer in (self._next_start, self._sweep):
            if timer is not None:
                timer.cancel()
        for worker in self.workers:
            worker.kill()
        return self._living

    # -- workers -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start as many workers as there is work for."""
        wanted = min(self._size, len(self.ready) + sum(len(worker.sent) for worker in self.workers))
        while len(self.workers) < wanted and self._next_start is None and not self._closed:
            worker = Worker(self._on_word)
            self.workers.append(worker)
            task = self._loop.create_task(self._live(worker), name=f"{self.name}: worker process")
            self._living.add(task)
            task.add_done_callback(self._lived)

    def _start_later(self, delay: float) -> None:
        if self._next_start is None:
            self._next_start = self._loop.call_later(delay, self._start_now)

    def _start_now(self) -> None:
        self._next_start = None
        self._start()

    async def _live(self, worker: Worker) -> None:
        try:
            how = how_ended(await worker.live(self._remote.pickled))
        except OSError as error:
            how = f"cannot be started: {error}"
        self.workers.remove(worker)
        self._died(worker, how)

    def _lived(self, task: asyncio.Task[None]) -> None:
        self._living.discard(task)
        crash = None if task.cancelled() else task.exception()
        if crash is not None:
            self._user.crashed(crash)
        self._user.changed()

    def _died(self, worker: Worker, how: str) -> None:
        """A worker has ended, as it was told or by itself: nothing that it had is lost, and one at most is to blame."""
        running = None if worker.running is None else worker.sent.pop(worker.running)
        waiting = list(worker.sent.values())
        doomed = None if worker.doomed is None or worker.doomed[0] != worker.running else worker.doomed[1]
        if running is not None and worker.doomed is not None and doomed is None:
            waiting.insert(0, running)  # what it was cut off for ended just then, and this one came in between
            running = None
        self._say_death(worker, how if worker.broken is None else f"{how}: {_tell(worker.broken)}")
        if running is not None:
            text = f"worker process {worker.pid} {how} while it ran this message"
            self._user.ended(running, NOTHING, doomed or KilledItsProcess(text))
        self._take(worker, waiting)

    def _say_death(self, worker: Worker, how: str) -> None:
        """Say that a worker has ended, and set the time at which another may start."""
        if self._closed:
            if worker.broken is not None:
                log.error("%s: worker process %d %s", self.name, worker.pid, how)
            return
        delay = 0.0
        if worker.doomed is None:
            delay = reconnect_delay(self._deaths, draw())
            self._deaths += 1
        self._start_later(delay)
        if not worker.ready:
            self._failed_starts += 1
            how += ", before it was ready"
        log.warning("%s: worker process %d %s; another starts in %.2f s", self.name, worker.pid, how, delay)
        if not worker.ready and self._failed_starts == FAILED_STARTS:
            error = RuntimeError(f"{FAILED_STARTS} worker processes in a row could not start; the last {how}")
            error.__cause__ = None if worker.broken is None else error_of(worker.broken)
            self._user.crashed(error)

    def _kill_doomed(self, worker: Worker, number: int) -> None:
        if worker.running == number:
            worker.kill()

    def _sweep_workers(self, timeout: float) -> None:
        """Cut off what runs over `timeout`."""
        now = self._loop.time()
        for worker in self.workers:
            seen, since = worker.seen
            if worker.running != seen:
                worker.seen = (worker.running, now)
            elif seen is not None and worker.doomed is None and now - since >= timeout * NEARLY:
                text = f"{self.name}: message {worker.sent[seen].id} ran over {timeout} s"
                self.cut_off(worker, HandlerTimeout(text))
        self._sweep = self._loop.call_later(timeout / SWEEPS, self._sweep_workers, timeout)

    # -- messages ------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Send messages to the workers that have room, the next one always to the one that has least."""
        limit = 1 if self._ahead is None else self._ahead.limit
        loads = {
            worker: len(worker.sent)
            for worker in self.workers
            if len(worker.sent) <= limit // 2  # not one for one: several go in one write
            and worker.ready and worker.recalled is None and worker.doomed is None
        }  # fmt: skip
        given: dict[Worker, list[Message[Any]]] = {}
        while self.ready and loads:
            worker = min(loads, key=loads.__getitem__)
            if loads[worker] >= limit:
                break
            message = self.ready.popleft()
            if self._user.claim(message):
                given.setdefault(worker, []).append(message)
                loads[worker] += 1
        for worker, messages in given.items():
            worker.give(messages)
        if not self.ready and 0 in loads.values():
            self._spread()

    def _spread(self) -> None:
        """A worker has nothing to do: call back what waits behind the message of another."""
        most = max(self.workers, key=lambda worker: worker.waiting)
        if most.waiting and most.running is not None:
            self._recall(most)

    def _recall(self, worker: Worker) -> None:
        if worker.recalled is None:
            worker.recalled = "spread"
            worker.send("recall")

    def _take(self, worker: Worker, messages: list[Message[Any]]) -> None:
        """Take what a worker had and did not enter."""
        for message in messages:
            self._user.unclaim(message)
        release, worker.recalled = worker.recalled == "release" or self._cut_off, None
        if release:
            self._user.given_back(messages)
        else:
            self.ready.extendleft(reversed(messages))
            self._start()
            self._feed()

    def _on_word(self, worker: Worker, word: tuple[Any, ...]) -> None:
        try:
            self._take_word(worker, word)
        except Exception as error:  # in a callback of the loop, where nobody else would hear of it
            self._user.crashed(error)

    def _take_word(self, worker: Worker, word: tuple[Any, ...]) -> None:
        match word:
            case ("ended", number, entered, seconds, more, failure):
                self._failed_starts = self._deaths = 0
                if self._ahead is not None:
                    self._ahead.saw(seconds)
                worker.running = entered
                self._ended(worker, number, more, failure)
                if entered is not None:
                    self._user.entered(worker, worker.sent[entered])
                self._feed()
                self._user.changed()
            case ("entered", number):
                worker.running = number
                self._user.entered(worker, worker.sent[number])
            case ("returned", numbers):
                self._take(worker, [worker.sent.pop(number) for number in numbers])
                self._user.changed()
            case ("ready",):
                worker.ready, self._failed_starts = True, 0
                self._feed()
            case ("broken", failure):
                worker.broken = failure

    def _ended(self, worker: Worker, number: int, more: bytes | None, failure: Failure | None) -> None:
        message = worker.sent.pop(number)
        told, error = NOTHING, None
        try:
            if failure is not None:
                error = error_of(failure)
            if more is not None:
                told = pickle.loads(more)
        except Exception as raised:
            error = raised
        if worker.doomed is not None and worker.doomed[0] == number and self._remote.is_async:
            if isinstance(error, asyncio.CancelledError):
                error = worker.doomed[1]
            worker.doomed = None  # it heard its cancellation, so its process lives on
        self._user.ended(message, told, error)


def _tell(failure: Failure) -> str:
    return f"{failure.name}: {failure.text}\n{failure.traceback}".rstrip()
