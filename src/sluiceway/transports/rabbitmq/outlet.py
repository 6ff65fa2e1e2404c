"""The outlet: a connection that only publishes, so that a broker that blocks publishers does not keep acks waiting."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from msgspec import Struct
from pika.exceptions import AMQPError

from ..._decisions.backoff import reconnect_delay
from ...errors import ConnectError, TransportError
from .letters import Letter
from .topology import Declared, declare
from .wire import Channel, Connection, outage_level

log = logging.getLogger("sluiceway")

_MOST = 1_000  # unconfirmed messages
_MOST_BYTES = 16 * 1024 * 1024  # and their bodies: pika would buffer without limit


class Failure(Struct, frozen=True):
    """Why a letter is not confirmed. `mendable`: another try may succeed. `homeless`: it was routed to no queue."""

    text: str
    mendable: bool = True
    homeless: bool = False


def _refusal(text: str, *, homeless: bool = False) -> Failure:
    return Failure(text, mendable=False, homeless=homeless)


class _Call:
    """One publish: the letters of it that are not confirmed yet, by their index."""

    def __init__(self, letters: Sequence[Letter]) -> None:
        self.letters = letters
        self.left = set(range(len(letters)))
        self.failed: dict[int, Failure] = {}
        self.done = asyncio.Event()

    def end(self, index: int, failure: Failure | None = None) -> None:
        if index in self.left:
            self.left.discard(index)
            if failure is not None:
                self.failed.setdefault(index, failure)
            if not self.left:
                self.done.set()


class Outlet:
    """Publishes with confirms and `mandatory`. Everything in here runs on the I/O thread."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], base: Iterable[Declared], passive: bool) -> None:
        self._connect = connect
        self._base = list(base)
        self._passive = passive
        self.connection: Connection | None = None
        self.trouble: str | None = "not connected"
        self.known: set[str] = set()  # what was declared since the last loss
        self._raw: Any = None
        self._free = asyncio.Event()
        self._blocked = False
        self._number = 0
        self._unconfirmed: dict[int, tuple[_Call, int]] = {}
        self._bytes = 0

    async def open(self) -> list[str]:
        """Connect for the first time, and stay connected from then on. Raises ConnectError; returns what is wrong."""
        problems = await self._reopen()
        self._keeping = asyncio.ensure_future(self._keep())
        return problems

    async def _reopen(self) -> list[str]:
        connection = await self._connect()
        try:
            problems = await declare(connection, self._base, passive=self._passive)
            channel = await connection.channel_of_its_own()
            channel.raw.add_on_return_callback(self._on_return)
            await channel.ask("confirm_delivery", self._on_confirm)
        except (TransportError, AMQPError) as error:
            connection.end()
            raise ConnectError(f"RabbitMQ does not let us publish: {error}") from error
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        self.connection, self._raw, self._channel = connection, channel.raw, channel
        self.known.clear()
        self._number, self._blocked, self.trouble = 0, False, None
        self._see()
        return problems

    async def _keep(self) -> None:
        while True:
            reason = await self._until_lost(self._channel)
            tries = 0
            while True:
                delay = reconnect_delay(tries, random.random())
                level = outage_level(tries)
                log.log(level, "publishing to RabbitMQ was interrupted: %s; connecting again in %.2f s", reason, delay)
                await asyncio.sleep(delay)
                try:
                    await self._reopen()
                except Exception as error:
                    self.trouble = reason = str(error) or repr(error)
                    tries += 1
                else:
                    log.info("publishing to RabbitMQ again")
                    break

    async def _until_lost(self, channel: Channel) -> str:
        reason = str(await channel.closed)
        self.trouble = f"the connection was lost: {reason}"
        self._free.clear()
        lost, self._unconfirmed, self._bytes = self._unconfirmed, {}, 0
        for call, index in lost.values():
            call.end(index, Failure(self.trouble))
        if self.connection is not None:
            self.connection.end()
            self.connection = None
        return reason

    async def declare(self, wanted: Sequence[Declared], timeout: float) -> None:
        """Make what is not there, unless that was done already. Raises TransportError when it cannot be, or not within
        `timeout` seconds: a broker that takes no messages answers nothing on the connection that has published."""
        if not all(one.name in self.known for one in wanted):
            if self.connection is None:
                raise TransportError(f"RabbitMQ is out of reach: {self.trouble}")
            try:
                async with asyncio.timeout(timeout):
                    if self.trouble is not None:
                        await self._free.wait()
                    problems = await declare(self.connection, wanted, passive=self._passive)
            except TimeoutError:
                why = self.trouble or "it did not answer"
                raise TransportError(f"{wanted[0].name!r} is not made within {timeout:g} s: {why}") from None
            if problems:
                raise TransportError(problems[0])
            self.known.update(one.name for one in wanted)

    async def publish(self, letters: Sequence[Letter], timeout: float) -> dict[int, Failure]:
        """Publish in order. Returns, by index, what is not confirmed and why, once all is confirmed or time is up."""
        call = _Call(letters)
        try:
            async with asyncio.timeout(timeout):
                for index, letter in enumerate(letters):
                    if not self._free.is_set():
                        await self._free.wait()
                    self._send(call, index, letter)
                await call.done.wait()
        except TimeoutError:
            why = self.trouble or "it did not confirm"
            for index in sorted(call.left):
                call.end(index, Failure(f"not within {timeout:g} s: {why}"))
        return call.failed

    def _send(self, call: _Call, index: int, letter: Letter) -> None:
        try:
            self._raw.basic_publish(letter.exchange, letter.key, letter.body, letter.properties, mandatory=True)
        except Exception as error:  # what cannot be encoded; nothing was written then
            call.end(index, Failure(f"{type(error).__name__}: {error}", mendable=not self._raw.is_open))
            return
        self._number += 1
        self._unconfirmed[self._number] = (call, index)
        self._bytes += len(letter.body)
        self._see()

    def _see(self) -> None:
        """Whether more may be published now."""
        if self.trouble is None and len(self._unconfirmed) < _MOST and self._bytes < _MOST_BYTES:
            self._free.set()
        else:
            self._free.clear()

    def _on_confirm(self, frame: Any) -> None:
        tag, confirmed = frame.method.delivery_tag, frame.method.NAME == "Basic.Ack"
        numbers = [tag]
        if frame.method.multiple:
            numbers = []
            for number in self._unconfirmed:
                if number > tag:
                    break
                numbers.append(number)
        for number in numbers:
            call, index = self._unconfirmed.pop(number)
            self._bytes -= len(call.letters[index].body)
            call.end(index, None if confirmed else _refusal("the broker refused it: a queue is full or not available"))
        self._see()

    def _on_return(self, _: Any, method: Any, properties: Any, __: bytes) -> None:
        """It reaches no queue. Its confirm follows; what is equal goes the same way, so the first that fits is it."""
        self.known.clear()  # somebody may have deleted what we made
        for call, index in self._unconfirmed.values():
            letter = call.letters[index]
            same = (letter.exchange, letter.key) == (method.exchange, method.routing_key)
            if same and letter.properties.message_id == properties.message_id and index not in call.failed:
                why = "no group has its topic; start a consumer of it once, which makes its queue"
                text = f"no queue takes it ({method.reply_text}): {why}"
                call.failed[index] = _refusal(text, homeless=True)
                return

    def _on_blocked(self, _: Any, frame: Any) -> None:
        self.trouble = f"the broker takes no messages at present: {frame.method.reason}"
        log.warning("publishing to RabbitMQ waits: %s", self.trouble)
        self._see()

    def _on_unblocked(self, _: Any, __: Any) -> None:
        log.info("publishing to RabbitMQ again")
        self.trouble = None
        self._see()

    async def close(self) -> None:
        self._keeping.cancel()
        await asyncio.wait((self._keeping,))
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.finish()
