"""Calls the consumer's acknowledgers round each settle; what they do changes nothing for it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..acknowledger import Acknowledger
from ..message import Message, Refused, Settlement
from .unset import raise_it

log = logging.getLogger("sluiceway.settler")


class Acknowledgers:
    """All acknowledgers of one consumer. `on_exit` is called when one exits the app."""

    def __init__(self, consumer: str, acknowledgers: Sequence[Acknowledger]) -> None:
        self.on_exit: Callable[[BaseException], None] = raise_it
        self._consumer = consumer
        self._all = acknowledgers

    async def before(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> None:
        for one in self._all:
            await self._call("before_settle", one.before_settle, acks, others)

    async def after(
        self, acks: Sequence[Message[Any]], others: Sequence[Settlement], refused: Sequence[Refused]
    ) -> None:
        for one in self._all:
            await self._call("after_settle", one.after_settle, acks, others, refused)

    async def _call(self, what: str, hook: Callable[..., Any], *arguments: Sequence[Any]) -> None:
        try:
            result = hook(*(tuple(one) for one in arguments))  # copies: what is settled is not theirs to change
            if inspect.isawaitable(result):
                await result
        except GeneratorExit:
            raise
        except BaseException as error:
            if cancelled_from_outside(error):
                raise
            log.exception("%s: %s of an acknowledger raised; nothing else changes", self._consumer, what)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                self.on_exit(error)


def cancelled_from_outside(error: BaseException) -> bool:
    """Whether it is our own task that is cancelled, and not something that it waited for."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
