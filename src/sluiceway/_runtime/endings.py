"""How the messages of processors end, wherever their handlers run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ..message import RUNNING, Message
from .batchers import Batchers
from .failures import Failures
from .settler import PipelineSettler
from .spec import PipelineSpec
from .unset import nothing, nothing_with, raise_it


class Endings:
    """What all processors have: what they tell, and messages that fail beside them, in tasks of their own.

    Those are messages that failed before a processor had them, and those whose processor is elsewhere or given up.
    """

    def __init__(self, spec: PipelineSpec, settler: PipelineSettler, batchers: Batchers, failures: Failures) -> None:
        self.spec = spec
        self.settler = settler
        self.batchers = batchers
        self.failures = failures
        self.on_idle: Callable[[], None] = nothing
        self.on_finished: Callable[[Message[Any]], None] | None = None  # a handler returned and did not fail
        self.on_crash: Callable[[BaseException], None] = raise_it
        self.on_exhausted: Callable[[], None] = nothing
        self.on_abandoned: Callable[[Message[Any]], None] = nothing_with  # for lanes: its handler runs on, overdue
        self._failing: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def put(self, messages: Sequence[Message[Any]]) -> None:
        """Queue messages, in order."""
        raise NotImplementedError

    def put_checked(self, messages: Sequence[Message[Any]]) -> None:
        """Queue messages, in order; those whose `error` is set fail, and are not handled."""
        failed = [message for message in messages if message.error is not None]
        if failed:
            for message in failed:
                message.state = RUNNING  # from here on nobody takes it back
                message.settler = self.settler
            self._fail(failed)
            messages = [message for message in messages if message.error is None]
        if messages:
            self.put(messages)

    def _succeed(self, message: Message[Any], value: Any) -> None:
        """Act on what a handler that ran elsewhere returned. Raises what fails the message after all."""
        if not self.spec.batchers:
            self.settler.ack(message)
        else:
            change = self.batchers.take(message, value)
            if change is not None:
                self.batchers.changed(message, change)
        if self.on_finished is not None:
            self.on_finished(message)

    def _fail(self, messages: Sequence[Message[Any]]) -> None:
        """Settle messages whose `error` is set, in a task."""
        task = self._loop.create_task(self.failures.failed(messages), name=f"{self.spec.name}: what failed")
        self._failing.add(task)
        task.add_done_callback(self._failing_ended)

    def _failing_ended(self, task: asyncio.Task[None]) -> None:
        self._failing.discard(task)
        self._look_for_crash(task)

    def _look_for_crash(self, task: asyncio.Task[None]) -> None:
        """Tell of a task that has ended."""
        crash = None if task.cancelled() else task.exception()
        if crash is not None:
            self.on_crash(crash)
        self.on_idle()

    def _cancel_failing(self) -> int:
        """Cut off the hooks that the failed ones are in, so that these end as decided; returns how many."""
        for task in self._failing:
            task.cancel()
        return len(self._failing)
