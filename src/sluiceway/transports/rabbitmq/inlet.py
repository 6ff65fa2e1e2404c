"""The inlet: a connection that consumes for one source, and sends its acks."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from pika.exceptions import AMQPError, ChannelClosedByBroker
from pika.spec import Basic

from ..._decisions.backoff import reconnect_delay
from ...errors import TransportError
from .topology import Declared, declare, suspects_of
from .wire import Channel, Connection, Delivery, outage_level

log = logging.getLogger("sluiceway")

SUSPECTS = "suspects"  # in the place of a consumer's number: what was taken from the suspects of a queue
# Seconds without a push after which a consumer is cancelled. Nothing on the wire says that a queue has pushed all that
# it may: cancel-ok comes behind what the channel has sent, and what it had not sent yet is taken back and counted. So
# this makes that rare, and `Hub.was_taken_back` explains the rest.
_SILENCE = 0.03


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
        *,
        there: bool,
    ) -> None:
        """`there`: what is wanted was there a moment ago. If it is not any more, the channel ends, and it is made."""
        self._connect = connect
        self.queues = queues
        self._wanted = wanted
        self._passive = passive
        self._there = there
        self._listener = listener
        self._tell = tell
        self._epoch = 0
        self._channel: Channel | None = None
        self.connection: Connection
        self._consumers: list[str] = []
        self._cancels: set[asyncio.Task[None]] = set()
        self._count = 0
        self._closing = False
        self._newest = 0  # the last tag that came
        self._acks: list[tuple[int, bool]] = []  # not sent yet
        self._holding = 0  # cancels on their way
        self._taken: asyncio.Future[None]  # a suspect has arrived, or there is none

    async def open(self) -> None:
        """Make what is missing and open a channel; keep one open from then on. Raises TransportError."""
        await self._reopen()
        self._keeping = asyncio.ensure_future(self._keep())

    async def _reopen(self) -> None:
        connection = self.connection = await self._connect()
        try:
            problems = [] if self._there else await declare(connection, self._wanted, passive=self._passive)
            self._there = False
            if problems:
                raise TransportError("cannot subscribe: " + "; ".join(problems))
            channel = await connection.channel_of_its_own()
        except BaseException:
            connection.end()
            raise
        self._channel = channel
        self._consumers = []
        channel.raw.add_on_cancel_callback(self._on_cancel)
        channel.raw.add_callback(self._on_empty, [Basic.GetEmpty], one_shot=False)
        self._epoch += 1
        epoch = self._epoch
        connection.on_deliveries = partial(self._arrived, epoch)
        self._acks.clear()
        self._tell(self._listener.opened, epoch)

    async def _keep(self) -> None:
        while self._channel is not None:
            reason = _explain(await self._channel.closed)
            self._channel = None
            self.connection.end()
            if self._closing:
                return
            self._tell(self._listener.lost, self._epoch, reason)
            tries = 0
            while not self._closing:
                delay = reconnect_delay(tries, random.random())
                level = outage_level(tries)
                log.log(level, "receiving from %s was interrupted: %s; again in %.2f s", self.queues[0], reason, delay)
                await asyncio.sleep(delay)
                tries += 1
                try:
                    await self._reopen()
                except Exception as error:
                    reason = str(error) or repr(error)
                    self._tell(self._listener.lost, self._epoch, reason)
                else:
                    log.info("receiving from %s again", self.queues[0])
                    break

    def _arrived(self, epoch: int, deliveries: list[Delivery]) -> None:
        self._newest = deliveries[-1][0]
        self._tell(self._listener.arrived, epoch, deliveries)

    def consume(self, epoch: int, credit: int) -> None:
        """Let the broker push `credit` unsettled messages more, over all queues."""
        if epoch == self._epoch and self._channel and self._channel.raw.is_open:
            each, more = divmod(credit, len(self.queues))
            for index, queue in enumerate(self.queues):
                self._count += 1
                tag = f"{index}.{self._count}"
                self._channel.raw.basic_qos(prefetch_count=min(65_535, max(1, each + (index < more))))
                self._channel.raw.basic_consume(queue, _unused, consumer_tag=tag)
                self._consumers.append(tag)

    def cancel(self, epoch: int) -> None:
        """End all pushes. When the broker has, and all that came has been handed over, the listener hears `quiet`."""
        if epoch == self._epoch and self._channel and self._channel.raw.is_open:
            task = asyncio.ensure_future(self._cancel(epoch, self._channel, self._consumers))
            self._cancels.add(task)
            task.add_done_callback(self._cancels.discard)
            self._consumers = []

    async def leave(self, epoch: int) -> None:
        """End all pushes, and return when all that came has been handed over."""
        if epoch == self._epoch and self._channel and self._channel.raw.is_open:
            consumers, self._consumers = self._consumers, []
            await self._cancel(epoch, self._channel, consumers)

    async def _cancel(self, epoch: int, channel: Channel, consumers: list[str]) -> None:
        """A quorum queue counts what it pushes while a cancel is on its way, and takes it back. So acks, which let it
        push, are held until that is over, and the cancel waits until nothing has come for a moment."""
        self._holding += 1
        try:
            newest = -1
            while newest != self._newest:
                newest = self._newest
                await asyncio.sleep(_SILENCE)
            for consumer in consumers:
                await channel.ask("basic_cancel", consumer)
            await channel.ask("basic_qos", prefetch_count=1)  # what was pushed before the cancel is in front of this
        except AMQPError:
            return  # the channel has ended, and the listener hears of that
        finally:
            self._holding -= 1
            self.ack(epoch, ())
        self.connection.hand_over()
        self._tell(self._listener.quiet, epoch)

    def ack(self, epoch: int, acks: Sequence[tuple[int, bool]]) -> None:
        """Acknowledge by tag; with True all before it too. Those of an ended channel mean nothing any more."""
        if epoch == self._epoch and self._channel and self._channel.raw.is_open:
            self._acks += acks
            if not self._holding:
                for tag, multiple in self._acks:
                    self._channel.raw.basic_ack(tag, multiple)
                self._acks.clear()

    async def flush(self) -> None:
        """Return when the broker has all acks so far: it answers what is sent behind them on the same channel."""
        if self._channel is not None:
            try:
                await self._channel.ask("basic_qos", prefetch_count=1)
            except AMQPError:
                pass  # what was acknowledged on an ended channel comes again

    async def waiting(self, queues: Sequence[str]) -> list[int]:
        """How many messages wait in each queue; none where there is no such queue."""
        if self._channel is None:
            raise TransportError("RabbitMQ is out of reach")
        counts = []
        channel: Channel | None = None
        for queue in queues:
            channel = channel or await self.connection.channel_of_its_own()
            try:
                counts.append((await channel.ask("queue_declare", queue, passive=True)).message_count)
            except ChannelClosedByBroker as error:
                if error.reply_code != 404:
                    raise
                counts.append(0)
                channel = None
        if channel is not None:
            channel.raw.close()
        return counts

    async def read(self, queue: str) -> list[bytes]:
        """The bodies in a queue, which stay there; none where there is no such queue."""
        if self._channel is None:
            raise TransportError("RabbitMQ is out of reach")
        channel, bodies = await self.connection.channel_of_its_own(), list[bytes]()
        try:
            while (body := await channel.get(queue)) is not None:
                bodies.append(body)
        except ChannelClosedByBroker as error:
            if error.reply_code != 404:
                raise
        if channel.raw.is_open:
            channel.raw.close()
        return bodies

    def put_back(self, epoch: int, tags: Sequence[int]) -> None:
        """Hand deliveries back to where they were in their queues; the broker counts that."""
        if epoch == self._epoch and self._channel and self._channel.raw.is_open:
            for tag in tags:
                self._channel.raw.basic_nack(tag, requeue=True)

    async def take_suspect(self, index: int) -> None:
        """Take one message of the suspects of queue `index`, if there is one: it has arrived when this returns."""
        if self._channel is None:
            raise TransportError("RabbitMQ is out of reach")
        channel, epoch = self._channel, self._epoch
        self._taken = asyncio.get_running_loop().create_future()
        tag = f"{index}.{SUSPECTS}".encode()

        def arrived(_: Any, method: Any, properties: Any, body: bytes) -> None:
            self._arrived(epoch, [(method.delivery_tag, method.redelivered, "", properties, body, tag)])
            self._on_empty()

        channel.raw.basic_get(suspects_of(self.queues[index]), arrived)
        await channel.wait(self._taken)

    def _on_empty(self, *_: Any) -> None:
        if not self._taken.done():
            self._taken.set_result(None)

    async def close(self) -> None:
        """End the connection. What is unsettled goes back to its place in its queue, and then its turn ends."""
        self._closing = True
        self._keeping.cancel()
        for task in self._cancels:
            task.cancel()
        await asyncio.wait((self._keeping,))
        if self._channel is not None:
            # pika would cancel its consumers first: another process would be handed what comes behind what we hold
            self._channel.raw._consumers.clear()
        await self.connection.finish()

    def _on_cancel(self, frame: Any) -> None:
        log.warning(
            "the broker ended consumer %s of %s: its queue was deleted or moved", frame.method.consumer_tag, self
        )
        if self._channel and self._channel.raw.is_open:
            self._channel.raw.close(reply_text="the broker ended a consumer")

    def __repr__(self) -> str:
        return ", ".join(self.queues)


def _unused(*_: Any) -> None:
    """Deliveries come by `Connection.on_deliveries`."""


def _explain(error: BaseException) -> str:
    if isinstance(error, ChannelClosedByBroker) and error.reply_code == 406 and "timed out" in error.reply_text:
        return (
            f"{error.reply_text}; a message was in hand for longer than the server's consumer_timeout: make that "
            "longer in rabbitmq.conf, or handlers and max_demand smaller"
        )
    return str(error)
