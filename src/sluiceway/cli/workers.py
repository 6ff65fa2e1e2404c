"""`run --workers N`: plain processes, started again when they die, told to drain when we are, ending when we end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from .._decisions.backoff import reconnect_delay
from .events import ConsumerStatus, Event, Started, Status, Stopped, WorkerChanged, decode, together
from .exits import GAVE_UP, NO_READER, OK, USAGE, forget_stdout
from .lifeline import VARIABLE
from .screen import Screen
from .serve import CLOSING, is_echo, signals_to

log = logging.getLogger("sluiceway.workers")

LONGEST_LINE = 1 << 20
GIVE_UP_STARTING = 3  # deaths in a row before a worker has opened its sources
GIVE_UP_EARLY = 10  # deaths in a row within `EARLY` seconds of starting
EARLY = 5.0


class RespawnRule:
    """Whether and when a worker that died is started again. Pure: it takes what it must know.

    A worker that dies while starting three times in a row, or ten times in a row soon after, is not started again. The
    first is started again nearly at once, the later ones after a growing, capped delay.
    """

    def __init__(self) -> None:
        self.starting = 0
        self.early = 0

    def died(self, *, started: bool, lived: float, draw: float) -> float | None:
        """Seconds until the next start; None: give up."""
        self.starting = 0 if started else self.starting + 1
        self.early = 0 if lived >= EARLY else self.early + 1
        if self.starting >= GIVE_UP_STARTING or self.early >= GIVE_UP_EARLY:
            return None
        return reconnect_delay(max(0, self.early - 1), draw, base=0.1)


class Totals(Struct):
    """What the processes of one slot did that have ended, by consumer."""

    rows: dict[str, ConsumerStatus] = msgspec.field(default_factory=dict)

    def add(self, rows: Sequence[ConsumerStatus]) -> None:
        """Keep the counts of a process that ended; nothing is in its hand any more."""
        for one in rows:
            kept = msgspec.structs.replace(
                one, state="stopped", reason=None, rate=0.0, in_hand=0, window=0, waiting=None
            )
            before = self.rows.get(one.consumer)
            self.rows[one.consumer] = kept if before is None else together((before, kept))


class Slot:
    """One of the N places for a worker, over all the processes that fill it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rule = RespawnRule()
        self.totals = Totals()
        self.process: asyncio.subprocess.Process | None = None
        self.began = 0.0
        self.started = False
        self.status: Status | None = None
        self.stopped: list[Stopped] = []
        self.reason: str | None = None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def take(self, event: Event) -> None:
        """A report of the process that fills the slot."""
        if isinstance(event, Started):
            self.started = True
        elif isinstance(event, Status):
            self.status = event
        elif isinstance(event, Stopped):
            self.stopped.append(event)
            self.reason = event.reason

    def how(self, code: int) -> str:
        """How the process ended, in words."""
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        why = f" ({self.reason})" if self.reason else ""
        return f"ended with exit code {code}{why}"

    def empty(self) -> None:
        """The process has ended: its counts stay."""
        if self.status is not None:
            self.totals.add(self.status.consumers)
        self.process, self.status, self.started, self.reason = None, None, False, None


class Workers:
    """N worker processes of one app. `first`: what the first screen says; `patience`: seconds that a drain may take."""

    def __init__(self, command: Sequence[str], count: int, screen: Screen, first: Started, patience: float) -> None:
        self._command = command
        self._screen = screen
        self._first = first
        self._patience = patience + CLOSING
        self._slots = [Slot(number) for number in range(1, count + 1)]
        self._piped = not screen.workers_write_themselves
        self._asked: int | None = None
        self._repeated: int | None = None
        self._signals_now: set[int] = set()  # in this turn of the loop
        self._said: set[str] = set()  # how workers ended
        self._stopping = asyncio.Event()
        self._told = False
        self._code = OK
        self._reason: str | None = None
        self._began = time.monotonic()
        self._no_reader = False

    async def run(self) -> int:
        """Run until every worker has ended; returns the exit code."""
        with signals_to(self._on_signal):
            status = asyncio.create_task(self._show_status())
            reaper = asyncio.create_task(self._kill_what_hangs())
            try:
                async with asyncio.TaskGroup() as group:
                    for slot in self._slots:
                        group.create_task(self._keep(slot), name=f"worker {slot.number}")
            finally:
                status.cancel()
                reaper.cancel()
            code = self._exit_code()
            self._tell(self._status())
            self._tell(self._stopped(code))
        return code

    def _exit_code(self) -> int:
        if self._repeated is not None:
            return 128 + self._repeated
        return NO_READER if self._no_reader and self._code == OK else self._code

    # -- one worker ----------------------------------------------------------------------------------------------

    async def _keep(self, slot: Slot) -> None:
        """Keep a slot filled until its worker ends well, we stop, or it is given up."""
        while not self._stopping.is_set():
            code = await self._live(slot)
            if self._stopping.is_set():
                self._judge_drain(slot, code)
                return
            if code == OK:
                slot.empty()
                log.info("worker %d has ended well; it is not started again", slot.number)
                return
            lived, how = time.monotonic() - slot.began, slot.how(code)
            delay = slot.rule.died(started=slot.started, lived=lived, draw=random.random())
            slot.empty()
            if delay is None or code == USAGE:
                self._give_up(slot, code, how)
                return
            if how in self._said:
                how = f"{how.partition(' (')[0]}, as before"
            self._said.add(how)
            log.warning("worker %d %s; another starts in %.2f s", slot.number, how, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _live(self, slot: Slot) -> int:
        """Start a worker and wait for its end; returns its exit code."""
        ours, theirs = socket.socketpair()
        with theirs:
            slot.began = time.monotonic()
            slot.process = await self._spawn(slot, theirs)
        process = slot.process
        self._tell(WorkerChanged(worker=slot.number, pid=process.pid, state="started"))
        if self._asked is not None:  # while it was started
            self._send(slot, self._asked)
        reader, writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE)
        reading = [asyncio.create_task(self._reports(slot, reader))]
        reading += [
            asyncio.create_task(self._echo(slot, stream))
            for stream in (process.stdout, process.stderr)
            if stream is not None
        ]
        code = await process.wait()
        await asyncio.wait(reading, timeout=1.0)  # what a process of the handlers' own keeps open is not waited for
        for task in reading:
            task.cancel()
        writer.close()
        if code or not self._stopping.is_set():
            self._tell(WorkerChanged(worker=slot.number, pid=process.pid, state="ended", code=code))
        return code

    async def _spawn(self, slot: Slot, line: socket.socket) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        unbuffered = {"PYTHONUNBUFFERED": "1"} if self._piped else {}  # or what handlers print comes late
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe if self._piped else sys.stderr.fileno() if self._screen.owns_stdout else None,
            stderr=pipe if self._piped else None,
            limit=LONGEST_LINE,
            pass_fds=(line.fileno(),),
            env={**os.environ, **unbuffered, VARIABLE: f"{slot.number}:{line.fileno()}:{int(self._piped)}"},
            process_group=0,  # Ctrl-C reaches only us; we pass it on, once
        )

    async def _reports(self, slot: Slot, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                try:
                    event = decode(line)
                except msgspec.DecodeError:
                    if line.endswith(b"\n"):  # else the last one of a process that was killed while it wrote
                        log.warning("worker %d sent what is no report: %.200r", slot.number, line)
                    continue
                slot.take(event)
                self._tell_when_all_started()

    async def _echo(self, slot: Slot, stream: asyncio.StreamReader) -> None:
        while line := await _next_line(stream):
            self._screen.line(slot.number, line.decode(errors="replace").rstrip("\r\n"))

    def _judge_drain(self, slot: Slot, code: int) -> None:
        """We stop: what a worker's exit code adds to ours."""
        never_opened = not slot.started and code in (-signal.SIGINT, -signal.SIGTERM)
        if code and not never_opened and self._repeated is None and self._code == OK:
            self._code = code if code > 0 else GAVE_UP
            self._reason = f"worker {slot.number} {slot.how(code)} while it drained"
        slot.empty()

    def _give_up(self, slot: Slot, code: int, how: str) -> None:
        self._code = code if code > 0 else GAVE_UP
        self._reason = f"worker {slot.number} {how}; it is given up"
        if self._slots[1:]:
            log.error("worker %d is given up, and the others drain", slot.number)
        self._stopping.set()
        for one in self._slots:
            self._send(one, signal.SIGTERM)
        self._asked = signal.SIGTERM

    # -- all of them ---------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if is_echo(number, self._signals_now):
            return
        name = signal.Signals(number).name
        if self._asked is None:
            self._asked = number
            log.info("%s: the workers drain; once more cancels what they run", name)
        else:
            self._repeated = number
            log.warning("%s again: the workers cancel what they run", name)
        self._stopping.set()
        for slot in self._slots:
            self._send(slot, number)

    def _send(self, slot: Slot, number: int) -> None:
        if slot.process is not None and slot.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                slot.process.send_signal(number)

    async def _kill_what_hangs(self) -> None:
        """A worker whose loop is blocked does not hear us: after its time to drain it is killed."""
        await self._stopping.wait()
        await asyncio.sleep(self._patience)
        for slot in self._slots:
            if slot.process is not None and slot.process.returncode is None:
                log.error("worker %d does not end; it is killed, and what it held comes back", slot.number)
                self._send(slot, signal.SIGKILL)

    # -- telling -------------------------------------------------------------------------------------------------

    def _tell_when_all_started(self) -> None:
        if not self._told and all(slot.started for slot in self._slots):
            self._told = True
            self._tell(msgspec.structs.replace(self._first, workers=tuple(slot.pid for slot in self._slots)))

    async def _show_status(self) -> None:
        while True:
            await asyncio.sleep(self._screen.interval)
            if self._told:
                self._tell(self._status())

    def _status(self) -> Status:
        rows: dict[str, list[ConsumerStatus]] = {}
        for slot in self._slots:
            now = slot.status.consumers if slot.status is not None else ()
            for one in (*slot.totals.rows.values(), *now):
                rows.setdefault(one.consumer, []).append(one)
        return Status(
            seconds=round(time.monotonic() - self._began, 3),
            consumers=tuple(map(together, rows.values())),
            workers=tuple(slot.pid for slot in self._slots if slot.process is not None),
        )

    def _stopped(self, code: int) -> Stopped:
        rows = self._status().consumers
        drains = [one for slot in self._slots for one in slot.stopped]
        return Stopped(
            code=code,
            reason=self._reason,
            seconds=round(time.monotonic() - self._began, 3),
            drain_seconds=max((one.drain_seconds for one in drains), default=0.0),
            handled=sum(one.handled for one in rows),
            failed=sum(one.failed for one in rows),
            retried=sum(one.retried for one in rows),
            dead_lettered=sum(one.dead_lettered for one in rows),
            drain_released=sum(one.drain_released for one in drains),
            cancelled=sum(one.cancelled for one in drains),
            unsettled=sum(one.unsettled for one in drains),
            opened=self._told,
        )

    def _tell(self, event: Event) -> None:
        try:
            self._screen.show(event)
        except BrokenPipeError:
            log.warning("nobody reads the events any more: the workers drain")
            self._no_reader = True
            forget_stdout()
            if self._asked is None:
                self._on_signal(signal.SIGTERM)


async def _next_line(stream: asyncio.StreamReader) -> bytes:
    """The next line; of one that is too long, what fits. Empty at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)
