"""The inlet: a connection that consumes for one source, and sends its acks."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from pika.exceptions import AMQPError, ChannelClosedByBroker

from ..._decisions.backoff import reconnect_delay
from ...errors import TransportError
from .topology import Declared, declare
from .wire import Channel, Connection, Delivery

log = logging.getLogger("sluiceway")


class Listener(Protocol):
    """Who hears of it, in the loop of the source. `epoch` counts channels: a tag means something within one alone."""

    def opened(self, epoch: int) -> None: ...
    def arrived(self, epoch: int, deliveries: list[Delivery]) -> None: ...
    def quiet(self, epoch: int) -> None: ...
    def lost(self, epoch: int, reason: str) -> None: ...


class Inlet:
    """Everything in here runs on the I/O thread."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        queues: Sequence[str],
        wanted: Sequence[Declared],
        passive: bool,
        listener: Listener,
        tell: Callable[..., object],
    ) -> None:
        self._connect = connect
        self._queues = queues
        self._wanted = wanted
        self._passive = passive
        self._listener = listener
        self._tell = tell
        self._epoch = 0
        self._channel: Channel | None = None
        self._connection: Connection | None = None
        self._consumers: dict[str, None] = {}
        self._closing = False

    async def open(self) -> None:
        """Make what is missing and open a channel; keep one open from then on. Raises TransportError."""
        await self._reopen()
        self._keeping = asyncio.ensure_future(self._keep())

    async def _reopen(self) -> None:
        connection = await self._connect()
        try:
            problems = await declare(connection, self._wanted, passive=self._passive)
            if problems:
                raise TransportError("cannot subscribe: " + "; ".join(problems))
            channel = await connection.channel_of_its_own()
        except BaseException:
            connection.end()
            raise
        self._connection, self._channel = connection, channel
        self._consumers.clear()
        channel.raw.add_on_cancel_callback(self._on_cancel)
        self._epoch += 1
        epoch = self._epoch
        connection.on_deliveries = lambda deliveries: self._tell(self._listener.arrived, epoch, deliveries)
        self._tell(self._listener.opened, epoch)

    async def _keep(self) -> None:
        while self._channel is not None:
            reason = _explain(await self._channel.closed)
            self._channel = None
            if self._connection is not None:
                self._connection.end()
            if self._closing:
                return
            self._tell(self._listener.lost, self._epoch, reason)
            tries = 0
            while self._channel is None and not self._closing:
                delay = reconnect_delay(tries, random.random())
                log.warning("receiving from %s was interrupted: %s; again in %.2f s", self._queues[0], reason, delay)
                await asyncio.sleep(delay)
                tries += 1
                try:
                    await self._reopen()
                except (TransportError, AMQPError) as error:
                    reason = str(error)
                    self._tell(self._listener.lost, self._epoch, reason)
                else:
                    log.info("receiving from %s again", self._queues[0])

    def consume(self, epoch: int, credit: int) -> None:
        """Let the broker push `credit` unsettled messages more, over all queues."""
        if epoch == self._epoch and self._channel is not None and self._channel.raw.is_open:
            each, more = divmod(credit, len(self._queues))
            for index, queue in enumerate(self._queues):
                self._channel.raw.basic_qos(prefetch_count=min(65_535, max(1, each + (index < more))))
                self._consumers[self._channel.raw.basic_consume(queue, _unused)] = None

    def cancel(self, epoch: int) -> None:
        """End all pushes. When the broker has, and all that came has been handed over, the listener hears `quiet`."""
        if epoch == self._epoch and self._channel is not None and self._channel.raw.is_open:
            asyncio.ensure_future(self._cancel(epoch, self._channel, list(self._consumers)))  # noqa: RUF006
            self._consumers.clear()

    async def _cancel(self, epoch: int, channel: Channel, consumers: list[str]) -> None:
        try:
            for consumer in consumers:
                await channel.ask("basic_cancel", consumer)
        except AMQPError:
            return  # the channel has ended, and the listener hears of that
        if self._connection is not None:
            self._connection.hand_over()
        self._tell(self._listener.quiet, epoch)

    def ack(self, epoch: int, acks: Sequence[tuple[int, bool]]) -> None:
        """Acknowledge by tag; with True all before it too. Those of an ended channel mean nothing any more."""
        if epoch == self._epoch and self._channel is not None and self._channel.raw.is_open:
            for tag, multiple in acks:
                self._channel.raw.basic_ack(tag, multiple)

    async def flush(self) -> None:
        """Return when the broker has all acks so far: it answers what is sent behind them on the same channel."""
        if self._channel is not None:
            try:
                await self._channel.ask("basic_qos", prefetch_count=1)
            except AMQPError:
                pass  # what was acknowledged on an ended channel comes again

    async def waiting(self) -> int:
        """How many messages wait in the queues."""
        if self._connection is None or self._channel is None:
            raise TransportError("RabbitMQ is out of reach")
        channel = await self._connection.channel_of_its_own()
        counts = [(await channel.ask("queue_declare", queue, True)).message_count for queue in self._queues]
        channel.raw.close()
        return sum(counts)

    def close(self) -> None:
        self._closing = True
        if self._connection is not None:
            self._connection.end()

    def _on_cancel(self, frame: Any) -> None:
        log.warning("the broker ended consumer %s of %s: its queue was deleted or moved", frame.method.consumer_tag, self)
        if self._channel is not None and self._channel.raw.is_open:
            self._channel.raw.close(reply_text="the broker ended a consumer")

    def __repr__(self) -> str:
        return ", ".join(self._queues)


def _unused(*_: Any) -> None:
    """Deliveries come by `Connection.on_deliveries`."""


def _explain(error: BaseException) -> str:
    if isinstance(error, ChannelClosedByBroker) and error.reply_code == 406 and "timed out" in error.reply_text:
        return (
            f"{error.reply_text}; a message was in hand for longer than the server's consumer_timeout: make that "
            "longer in rabbitmq.conf, or handlers and max_demand smaller"
        )
    return str(error)
