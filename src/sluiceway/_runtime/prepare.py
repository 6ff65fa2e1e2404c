"""Before the handlers of the messages of one receive: they are decoded, and the user's `prepare` has them all."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from ..errors import HandlerTimeout
from ..message import QUEUED, Message
from .settler import PipelineSettler
from .spec import PipelineSpec, PrepareHook
from .thread_calls import returned_awaitable


class _Prepared(NamedTuple):
    """What a processor finds in `message.value`."""

    payload: Any
    value: Any


class Preparer:
    """Calls `prepare` between intake and processors, one receive at a time and in order.

    It settles nothing. A message that it failed, that cannot be decoded, or whose `prepare` raised, goes its usual way
    with its error set, and fails in its turn without running the handler: so lanes keep their order, and a failure has
    one way to its settlement.
    """

    def __init__(self, spec: PipelineSpec, settler: PipelineSettler, hook: PrepareHook) -> None:
        self.spec = spec
        self.settler = settler
        self._hook = hook
        self.arrived: Callable[[Sequence[Message[Any]]], None] = _nothing  # for lanes: before these are prepared
        self._messages: Sequence[Message[Any]] = ()

    def waiting(self) -> list[Message[Any]]:
        """The messages that are being prepared; those that are handed back meanwhile do not run."""
        return [message for message in self._messages if message.state == QUEUED]

    async def __call__(self, messages: Sequence[Message[Any]]) -> list[Message[Any]]:
        """Prepare messages; returns those that still wait to be handled."""
        self.arrived(messages)
        self._messages = messages
        try:
            good = [message for message in messages if message.state == QUEUED and self._decode(message)]
            if good:
                error = await self._run(good)
                for message in good:
                    if error is not None and message.error is None:
                        message.error = error
        finally:
            self._messages = ()
        for message in messages:
            if message.error is None:
                message.value = _Prepared(message.payload, message.value)
            self.settler.handler_ended(message)  # of one that was acked here
        return [message for message in messages if message.state == QUEUED]

    def _decode(self, message: Message[Any]) -> bool:
        if message.error is not None:
            return False  # it came so
        decode = self.spec.decode
        message.settler = self.settler
        try:
            message.payload = message.body if decode is None else decode(message.body)
        except BaseException as error:
            message.error = error
        return message.error is None

    async def _run(self, messages: Sequence[Message[Any]]) -> BaseException | None:
        """Call the hook within the consumer's `timeout`; returns what fails all messages.

        A hook that ignores its cancellation for as long again is left to itself, so that the intake goes on.
        """
        task = asyncio.create_task(self._call(tuple(messages)), name=f"{self.spec.name}: prepare")
        seconds = self.spec.timeout
        try:
            await asyncio.wait((task,), timeout=seconds)
            if task.done():
                return asyncio.CancelledError("an inner task was cancelled") if task.cancelled() else task.result()
            task.cancel()
            await asyncio.wait((task,), timeout=seconds)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait((task,))  # it may clean up before the source is closed
            raise
        if task.done() and not task.cancelled():
            return task.result()  # it swallowed its cancellation and came to an end
        more = "" if task.done() else " and ignored its cancellation"
        return HandlerTimeout(f"{self.spec.name}: prepare of {len(messages)} messages ran over {seconds} s{more}")

    async def _call(self, messages: tuple[Message[Any], ...]) -> BaseException | None:
        try:
            result = await self._hook(messages)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            return error
        if result is not None:
            return TypeError(
                f"{self.spec.name}: prepare returned {type(result).__name__}; it returns nothing: all messages go on, "
                "and message.fail(...) keeps one from its handler"
            )
        return None


def _nothing(messages: Sequence[Message[Any]]) -> None:
    pass


def after_prepare(spec: PipelineSpec) -> PipelineSpec:
    """The spec for processors whose messages are prepared: a check for that in their loop would cost every message."""
    handle: Any = spec.handle

    async def handle_prepared(message: Message[Any]) -> Any:
        message.payload, message.value = message.value
        value = await handle(message)
        message.value = None  # the batch gets what the handler returned
        return value

    def handle_on_thread(message: Message[Any]) -> Any:
        message.payload, message.value = message.value
        value = handle(message)
        if inspect.isawaitable(value):
            raise returned_awaitable(handle, value)
        message.value = None
        return value

    return replace(spec, decode=None, handle=handle_prepared if spec.mode == "async" else handle_on_thread)
