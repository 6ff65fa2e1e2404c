"""The intake: asks the source for messages when there is room, and never for more than that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

from .._decisions.suspicion import group_size
from .._decisions.window import Window
from ..errors import DecodeError
from ..message import Message
from ..source import Source
from ..telemetry import Received, Telemetry
from .batchers import Batchers
from .failures import Failures
from .processors import Processors, Queue
from .settler import PipelineSettler
from .spec import PipelineSpec

log = logging.getLogger("sluiceway.intake")

_suspect = attrgetter("suspect")

EMPTY = 0.001  # seconds to wait after a receive of nothing: a source may return at once, again and again


class Quarantine(Protocol):
    async def run(self, messages: Sequence[Message[Any]]) -> None: ...
    def stop(self) -> None: ...


class Intake:
    """One receive at a time.

    It asks when what has not started fell to half the window or a processor is idle, for as many as the window has
    room and the gates allow. A slot of the window is free when its settle returned.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        source: Source,
        window: Window,
        settler: PipelineSettler,
        processors: Processors,
        batchers: Batchers,
        failures: Failures,
        telemetry: Telemetry,
    ) -> None:
        self.spec = spec
        self.source = source
        self.window = window
        self.settler = settler
        self.processors = processors
        self.batchers = batchers
        self.failures = failures
        self.telemetry = telemetry
        self.queue: Queue = processors
        self.waiting_in_lanes = _none
        self.quarantine: Quarantine | None = None
        self.received = 0
        self.stopping = False
        self.asking = 0  # the demand of the receive that waits, 0 when none does
        self.release_unstarted: Callable[[], object] = _none
        self._apart = False  # the last receive had suspects
        self._paused = False
        self._long_closed: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        for gate in spec.gates:
            gate.on_change(self._gate_changed)
        settler.on_stuck = self._gate_changed

    async def run(self) -> None:
        """Receive until `stop()`."""
        while not self.stopping:
            demand = self._demand()
            if demand <= 0:
                await self._wait_for_room()
                continue
            self._resume()
            self.asking = demand
            messages = await self.source.receive(demand)
            self.asking = 0
            if messages:
                await self._admit(messages, demand)
                if len(messages) < demand:
                    await asyncio.sleep(0)  # the broker has no more: what it gave is handled before it is asked again
            elif not self.stopping:
                await asyncio.sleep(EMPTY)

    def stop(self) -> None:
        """Ask for nothing more; a receive that waits returns. Idempotent."""
        self.stopping = True
        if self._long_closed is not None:
            self._long_closed.cancel()
        self.source.stop()
        if self.quarantine is not None:
            self.quarantine.stop()
        self.poke()

    def poke(self) -> None:
        """Something changed that may make room: a settle returned, a processor ran dry, a gate opened."""
        room = self._room
        if room is not None and not room.done() and (self.stopping or self._demand() > 0 or self._starved()):
            room.set_result(None)

    def _demand(self) -> int:
        free = self.window.size - len(self.settler.held)
        unstarted = self.processors.unstarted + self.waiting_in_lanes()
        if free <= 0 or self.settler.stuck or not (self.processors.idle or unstarted <= self.window.size // 2):
            return 0
        if self._apart:
            free = min(
                free, group_size(self.spec.ceiling)
            )  # the next ones may be suspects too, and all that do not run now go back
        now = self._loop.time()
        for gate in self.spec.gates:
            free = gate.allow(now, free)
        return free

    async def _wait_for_room(self) -> None:
        if self._starved():
            self.batchers.emit_oldest()
        self._room = self._loop.create_future()
        timer = self._gate_timer()
        try:
            await self._room
        finally:
            self._room = None
            if timer is not None:
                timer.cancel()

    def _starved(self) -> bool:
        """Whether forming batches fill the window and nothing else goes on that would make room."""
        free = self.window.size - len(self.settler.held)
        return (
            free < min(self.spec.concurrency, self.window.size)
            and self.batchers.forming > 0
            and not (self.processors.running or self.processors.unstarted)
            and not (self.batchers.busy or self.settler.unsent)
        )

    async def _admit(self, messages: Sequence[Message[Any]], demand: int) -> None:
        self.received += len(messages)
        self.settler.held.update(messages)
        largest = max([len(message.body) for message in messages])  # a list: 26 ns less per message than a map
        self.window.saw_body(largest)
        now = self._loop.time()
        self.window.observe(now, self.settler.finished, starved=not self.processors.unstarted)
        for gate in self.spec.gates:
            gate.took(now, len(messages))
        if self.telemetry.wants(Received):
            self.telemetry.emit(Received(consumer=self.spec.name, demand=demand, count=len(messages)))
        if self.spec.max_payload is not None and largest > self.spec.max_payload:
            messages = await self._reject_oversized(messages, self.spec.max_payload)
        if self.quarantine is not None and any(map(_suspect, messages)):
            if not self._apart:
                log.warning("%s: a process died with messages in hand; they run apart from the others", self.spec.name)
            self._apart = True
            await self.quarantine.run(messages)
        else:
            self._apart = False
            self.queue.put(messages)

    async def _reject_oversized(self, messages: Sequence[Message[Any]], limit: int) -> list[Message[Any]]:
        kept = []
        for message in messages:
            if len(message.body) <= limit:
                kept.append(message)
                continue
            message.error = DecodeError(f"the body has {len(message.body)} bytes; max_payload allows {limit}")
            await self.failures.failed((message,))
        return kept

    @property
    def closed(self) -> bool:
        """Whether a gate is closed."""
        now = self._loop.time()
        return not all(gate.allow(now, 1) for gate in self.spec.gates)

    def _gate_timer(self) -> asyncio.TimerHandle | None:
        now = self._loop.time()
        times = [at for gate in self.spec.gates if (at := gate.opens_at(now)) is not None]
        return self._loop.call_at(min(times), self.poke) if times else None

    def _gate_changed(self) -> None:
        """A closed gate, or a settle that the broker rejects, also takes back the demand of a receive that waits.

        What has not started half a lease later goes back to the broker: another process may have an open gate.
        """
        if self.stopping:
            return
        if not (self.closed or self.settler.stuck):
            self._resume()
        elif not self._paused:
            self._paused = True
            self.source.resize(0)
            if self.source.lease is not None:
                self._long_closed = self._loop.call_later(self.source.lease / 2, self.release_unstarted)
        self.poke()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self.source.resize(self.window.ceiling)
            if self._long_closed is not None:
                self._long_closed.cancel()


def _none() -> int:
    return 0
