"""Quarantine: a message that was in hand when a process died runs alone, so that nobody is blamed for a neighbour."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from .._decisions.backoff import reconnect_delay
from ..errors import KilledItsProcess
from ..message import QUEUED, SETTLED, Message, Settlement
from ..source import Source
from ..telemetry import SuspectRuns, Telemetry
from .batchers import Batchers
from .failures import Failures
from .processors import Processors
from .settler import PipelineSettler
from .spec import PipelineSpec

log = logging.getLogger("sluiceway")


class SuspectQuarantine:
    """Runs suspects one by one while nothing else is in hand.

    What has not started goes back to the broker, what runs is waited for. The suspicion is written down before the
    message runs: if the process dies once more, it counts. Those with the fewest suspicions go first, so that the one
    that does kill has nobody left behind it.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        source: Source,
        settler: PipelineSettler,
        processors: Processors,
        batchers: Batchers,
        failures: Failures,
        telemetry: Telemetry,
    ) -> None:
        self.spec = spec
        self.source = source
        self.settler = settler
        self.processors = processors
        self.batchers = batchers
        self.failures = failures
        self.telemetry = telemetry
        self.take_unstarted: Callable[[], Sequence[Message[Any]]] = processors.take_unstarted
        self._stopping = False
        self._changed = asyncio.Event()

    def poke(self) -> None:
        """Something was settled, or a processor ran dry."""
        self._changed.set()

    def stop(self) -> None:
        """Start no further suspect; those that wait go back to the broker."""
        self._stopping = True
        self._changed.set()

    async def run(self, suspects: Sequence[Message[Any]]) -> None:
        """Return when all suspects are settled, or went back because of a drain."""
        log.warning(
            "%s: %d messages were in hand when a process died; each runs alone now, then the rest goes on",
            self.spec.name, len(suspects),
        )  # fmt: skip
        waiting = sorted(suspects, key=attrgetter("suspicions"))
        for message in self.take_unstarted():
            self.settler.settle(Settlement(message, "release", counted=False))
        await self._settled_but(waiting)
        for done, message in enumerate(waiting, 1):
            if self._stopping:
                break
            await self._run_alone(message)
            await self._settled_but(waiting[done:])
        for message in waiting:
            if message.state == QUEUED:
                self.settler.settle(Settlement(message, "release", counted=False))

    async def _run_alone(self, message: Message[Any]) -> None:
        rules = self.spec.rules
        ran_alone = message.suspicions > 0  # before that, a neighbour may have done it, whatever the attempts say
        if ran_alone and message.attempt >= rules.retry.attempts and rules.exhausted != "retry":
            text = f"the process died {message.suspicions} times while it ran this message alone"
            self.failures.killed_its_process(message, KilledItsProcess(text))
            return
        written = message.state == QUEUED and await self._write_down(message)
        if written is None:
            return  # a drain: it goes back with the others
        if not written:
            self.settler.forget((message,))
            return
        message.suspect = False
        if self.telemetry.wants(SuspectRuns):
            self.telemetry.emit(
                SuspectRuns(consumer=self.spec.name, topic=message.topic, id=message.id, attempt=message.attempt)
            )
        self.processors.put((message,))

    async def _write_down(self, message: Message[Any]) -> bool | None:
        """Write down a suspicion, again and again while the broker raises; None when a drain came before."""
        tries = 0
        while not self._stopping:
            try:
                return await self.source.suspect(message)
            except Exception as error:
                delay = reconnect_delay(tries, random.random())
                tries += 1
                log.warning(
                    "%s: writing down that message %s is suspected failed: %s; trying again in %.2f s",
                    self.spec.name, message.id, error, delay,
                )  # fmt: skip
                await asyncio.sleep(delay)
        return None

    async def _settled_but(self, waiting: Sequence[Message[Any]]) -> None:
        """Return when nothing is held but `waiting`, and nothing runs: also no handler that has settled early."""
        while self.processors.running or len(self.settler.held) > sum(one.state != SETTLED for one in waiting):
            self._changed.clear()
            self.batchers.emit_all("flush")
            await self._changed.wait()
