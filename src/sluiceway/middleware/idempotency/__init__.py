"""Idempotency: a message that was handled is not handled again, however often it comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from ...errors import OptionError, RetryLater
from ...message import SETTLED, Handler, Message, Outgoing, new_id
from .. import ConsumerInfo, refuse_batches
from .._checks import is_seconds
from .memory import MemoryStore
from .store import Claim, Store

__all__ = ["Claim", "Idempotency", "MemoryStore", "Store"]

log = logging.getLogger("sluiceway.idempotency")


class Idempotency:
    """Handles each key once: claims it in `store` before the handler runs, and marks it done when that has returned.

    - `key(message)`: what makes two messages the same; the message's id unless given. None: handle the message as if
      this were not here. Keys are apart by consumer and group.
    - `lease`: seconds a claim lasts, and so how long a process that died holds its claims. It is renewed while the
      handler runs.
    - `ttl`: seconds for which what was done is known; a day.
    - `retry_after`: seconds until a message is tried again, uncounted, whose key is in progress elsewhere.

    A message whose key is done is acked without its handler, and its value is None. What the handler published with
    `message.publish` is kept with the key, and published again then, with the same ids: the first process may have died
    before the broker had it. A handler that fails gives its claim up. A process that dies between the handler's return
    and the mark leaves nothing of it: the handler runs again.

    It does not go with batches, whose work is done after the handler returned: OptionError at start.
    """

    def __init__(
        self,
        store: Store,
        *,
        key: Callable[[Message[Any]], str | None] | None = None,
        lease: float = 30.0,
        ttl: float = 86_400.0,
        retry_after: float = 1.0,
    ) -> None:
        for name, value in (("lease", lease), ("ttl", ttl), ("retry_after", retry_after)):
            if not is_seconds(value):
                raise OptionError(f"Idempotency: {name} must be seconds, more than 0; got {value!r}")
        if not callable(getattr(store, "claim", None)) or isinstance(store, type):
            raise OptionError(f"Idempotency: store must be a store, such as MemoryStore(); got {store!r}")
        if key is not None and not callable(key):
            raise OptionError(f"Idempotency: key must be a function of the message; got {key!r}")
        self.store = store
        self.key = key or _id
        self.lease = lease
        self.ttl = ttl
        self.retry_after = retry_after

    def for_consumer(self, consumer: ConsumerInfo) -> Callable[[Message[Any], Handler], Awaitable[Any]]:
        refuse_batches("Idempotency", consumer)
        if consumer.batchers:
            raise OptionError(
                f"{consumer.name}: Idempotency would call a message done when its handler returned, before its batch "
                "ran; leave it out, and make the batch handler's writes idempotent (an upsert by message id)"
            )
        prefix = f"{consumer.group}:{consumer.name}:"

        async def once(message: Message[Any], call_next: Handler) -> Any:
            key = self.key(message)
            if key is None:
                return await call_next(message)
            return await self._once(_Held(self, prefix + key, consumer.is_async), message, call_next)

        return once

    async def _once(self, held: _Held, message: Message[Any], call_next: Handler) -> Any:
        found = await held.claim()
        if found.state == "busy":
            raise RetryLater(self.retry_after, f"key {held.key!r} is in progress elsewhere", counted=False)
        if found.state == "done":
            if found.result:
                message.outputs = [*(message.outputs or ()), *_unpacked(found.result)]
            return None
        try:
            value = await call_next(message)
            await held.ended(message)
        except GeneratorExit:
            raise  # nobody runs us any more: the claim runs out
        except BaseException as error:
            if message.state >= SETTLED and message.error is None:  # it acked itself: what came then is of no account
                await held.ended(message)
            else:
                await held.failed(error)
            raise
        finally:
            held.stop()
        return value


class _Held:
    """One claim, renewed until `stop`. A renewal is a task only when a third of the lease has passed."""

    def __init__(self, rules: Idempotency, key: str, can_cancel: bool) -> None:
        self.key = key
        self._rules = rules
        self._token = new_id()
        self._can_cancel = can_cancel
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def claim(self) -> Claim:
        rules = self._rules
        try:
            found = await rules.store.claim(self.key, self._token, rules.lease)
        except (Exception, asyncio.CancelledError):
            await self.release()  # it may have been made nevertheless
            raise
        if found.state == "claimed":
            self._renew_later()
        return found

    async def done(self, result: bytes) -> None:
        if not await self._rules.store.done(self.key, self._token, result, self._rules.ttl):
            log.warning("key %r was claimed by another while its handler ran here; it may have run there too", self.key)

    async def ended(self, message: Message[Any]) -> None:
        """The handler returned, or settled its message: the key is done where that ends with an ack."""
        if message.error is None and (message.ending is None or message.ending.on_success == "ack"):
            await self.done(b"" if message.outputs is None else _packed(message.outputs))
        else:
            await self.release()

    async def failed(self, error: BaseException) -> None:
        """Give the claim up, but not under a thread that runs on: it then lasts until its lease runs out."""
        if self._can_cancel or not isinstance(error, asyncio.CancelledError):
            await self.release()

    async def release(self) -> None:
        try:
            await self._rules.store.release(self.key, self._token)
        except Exception as error:
            log.warning(
                "key %r could not be released (%s: %s); it is free again in %g s",
                self.key, type(error).__name__, error, self._rules.lease,
            )  # fmt: skip

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _renew_later(self) -> None:
        self._timer = self._loop.call_later(self._rules.lease / 3, self._start_renewal)

    def _start_renewal(self) -> None:
        self._task = self._loop.create_task(self._renew(), name=f"idempotency: renew {self.key}")

    async def _renew(self) -> None:
        try:
            if not await self._rules.store.renew(self.key, self._token, self._rules.lease):
                return  # another has it: `done` will say so
        except Exception as error:
            log.warning("key %r could not be renewed: %s: %s", self.key, type(error).__name__, error)
        self._renew_later()


def _id(message: Message[Any]) -> str:
    return message.id


# What a handler published, as a store keeps it. A key is bytes there: one that is no UTF-8 is kept by surrogateescape.
_Packed = tuple[str, bytes, bytes | None, dict[str, str], str, float, float, str | None]
_decoder = msgspec.msgpack.Decoder(list[_Packed])


def _packed(outputs: list[Outgoing]) -> bytes:
    rows = []
    for one in outputs:
        key = None if one.key is None else one.key.encode("utf-8", "surrogateescape")
        rows.append((one.topic, one.body, key, dict(one.headers), one.id, one.timestamp, one.delay, one.group))
    return msgspec.msgpack.encode(rows)


def _unpacked(result: bytes) -> list[Outgoing]:
    outputs = []
    for topic, body, key, headers, id_, timestamp, delay, group in _decoder.decode(result):
        text = None if key is None else key.decode("utf-8", "surrogateescape")
        outputs.append(Outgoing(topic, body, text, headers, id_, timestamp, delay, group))
    return outputs
