"""Quarantine: messages that were in hand when a process died run apart, so that nobody is blamed for a neighbour."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from .._decisions.backoff import reconnect_delay
from .._decisions.suspicion import STEADY, died_alone, group_size, next_suspects, runs_alone
from ..errors import KilledItsProcess
from ..message import QUEUED, Message, Settlement
from ..source import Source
from ..telemetry import SuspectRuns, Telemetry
from .batchers import Batchers
from .chance import draw
from .failures import Failures
from .processors import Processors
from .settler import PipelineSettler
from .spec import PipelineSpec

log = logging.getLogger("sluiceway")


class SuspectQuarantine:
    """Runs suspects while nothing else is in hand: in groups after one death, one by one after more.

    What has not started goes back to the broker, what runs is waited for. Before a message runs alone its suspicion is
    written down: if the process dies once more, it counts.
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
        self.put: Callable[[Sequence[Message[Any]]], Awaitable[None]] = _nowhere  # the intake's
        self.take_unstarted: Callable[[], Sequence[Message[Any]]] = processors.take_unstarted
        self._stopping = False
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    def poke(self) -> None:
        """Something was settled, or a processor ran dry."""
        self._changed.set()

    def stop(self) -> None:
        """Start no further suspect; those that wait go back to the broker."""
        self._stopping = True
        self._changed.set()

    async def run(self, messages: Sequence[Message[Any]]) -> None:
        """Run some of the suspects among what was received, with nothing else in hand; return when they are settled.

        All others go back, so that the next receive brings them again.
        """
        if self.spec.ordered and len(self.settler.held) > len(messages):
            # Earlier ones of their keys may be in hand, and may fail: none may pass them. They end first.
            self._release(messages)
            await self._alone_with(())
            return
        messages = self._let_rest(messages)
        if not messages:
            return
        first = self._first_of_their_keys(messages) if self.spec.ordered else messages
        suspects = [message for message in first if message.suspect]
        group = group_size(self.spec.ceiling)
        chosen = next_suspects(suspects, group=group, ordered=self.spec.ordered) if suspects else list(first)
        self._release(self.take_unstarted())
        self._release([message for message in messages if message not in chosen])
        await self._alone_with(chosen)
        if self._stopping:
            self._release(chosen)
        elif suspects and runs_alone(chosen[0]):
            await self._run_alone(chosen[0])
        else:
            await self.put(chosen)
        await self._alone_with(())

    def _let_rest(self, messages: Sequence[Message[Any]]) -> Sequence[Message[Any]]:
        """Send those that a process died alone with back until this process has lived for a while; returns the rest."""
        seconds = self._since + STEADY - self._loop.time()
        resting = [one for one in messages if seconds > 0 and died_alone(one) and not self._is_over(one)]
        if not resting:
            return messages
        for message in resting:
            self.settler.settle(Settlement(message, "release", delay=seconds, counted=False))
        keys = {message.key for message in resting if message.key is not None} if self.spec.ordered else ()
        self._release([message for message in messages if message.key in keys])
        return [message for message in messages if message not in resting and message.key not in keys]

    def _is_over(self, message: Message[Any]) -> bool:
        """Whether the attempts are used up, the last of them alone: before that, a neighbour may have done it."""
        rules = self.spec.rules
        return message.suspicions > 0 and message.attempt >= rules.retry.attempts and rules.exhausted != "retry"

    def _first_of_their_keys(self, messages: Sequence[Message[Any]]) -> list[Message[Any]]:
        """Suspects and others do not run together: of each key only those of the first one's kind, up to the other."""
        first: list[Message[Any]] = []
        kinds: dict[str, bool | None] = {}
        for message in messages:
            if message.key is not None and kinds.setdefault(message.key, message.suspect) != message.suspect:
                kinds[message.key] = None
            else:
                first.append(message)
        return first

    def _release(self, messages: Sequence[Message[Any]]) -> None:
        for message in messages:
            self.settler.settle(Settlement(message, "release", counted=False))

    async def _run_alone(self, message: Message[Any]) -> None:
        if self._is_over(message):
            deaths = message.deliveries - 1 - message.failures
            text = f"its process died {deaths} times with this message in hand, the last time while it ran alone"
            self.failures.killed_its_process(message, KilledItsProcess(text))
            return
        written = message.state == QUEUED and await self._write_down(message)
        if written is None:  # a drain came before
            self._release((message,))
            return
        if not written:
            self.settler.forget((message,))
            return
        message.suspect = False
        if self.telemetry.wants(SuspectRuns):
            self.telemetry.emit(
                SuspectRuns(consumer=self.spec.name, topic=message.topic, id=message.id, attempt=message.attempt)
            )
        await self.put((message,))

    async def _write_down(self, message: Message[Any]) -> bool | None:
        """Write down a suspicion, again and again while the broker raises; None when a drain came before."""
        tries = 0
        while not self._stopping:
            try:
                return await self.source.suspect(message)
            except Exception as error:
                delay = reconnect_delay(tries, draw())
                tries += 1
                log.warning(
                    "%s: writing down that message %s is suspected failed: %s; trying again in %.2f s",
                    self.spec.name, message.id, error, delay,
                )  # fmt: skip
                await asyncio.sleep(delay)
        return None

    async def _alone_with(self, chosen: Sequence[Message[Any]]) -> None:
        """Return when nothing is held but `chosen`, and nothing runs: also no handler that has settled early.

        Or when a drain begins, which waits for what can still end: what the broker rejects may be held for ever.
        """
        held = self.settler.held
        overdue = self.settler.overdue  # they may never end; nobody waits for such a handler without order either
        while not self._stopping and (
            self.processors.running or len(held) - len(overdue) > sum(message in held for message in chosen)
        ):
            self._changed.clear()
            self.batchers.emit_all("flush")
            await self._changed.wait()


async def _nowhere(messages: Sequence[Message[Any]]) -> None:
    pass
