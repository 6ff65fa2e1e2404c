"""Looking at a queue and taking out of it: all is received on a connection of its own, which then goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from pika.exceptions import ChannelClosedByBroker

from ...message import Stored
from .letters import open_stored
from .wire import Channel, Connection, Delivery

_MOST = 10_000  # messages that are held while one looks
_SILENCE = 0.5  # seconds without a message after which the rest is in other hands

Connect = Callable[[], Awaitable[Connection]]


async def browse_queue(connect: Connect, queue: str, topic: str, after: str | None) -> list[Stored]:
    """What a queue holds, behind position `after`."""
    connection = await connect()
    try:
        found = await _hold(connection, await connection.channel_of_its_own(), queue)
    finally:
        await connection.finish()
    stored = [open_stored(one, topic) for one in found]
    positions = [one.position for one in stored]
    if after in positions:
        return stored[positions.index(after) + 1 :]
    return stored if after is None else [one for one in stored if one.position > after]


async def remove_from_queue(connect: Connect, queue: str, topic: str, positions: Collection[str]) -> None:
    """Acknowledge what stands at `positions`, and put the rest back."""
    connection = await connect()
    try:
        channel = await connection.channel_of_its_own()
        for delivery in await _hold(connection, channel, queue):
            if open_stored(delivery, topic).position in positions:
                channel.raw.basic_ack(delivery[0])
        if channel.raw.is_open:
            await channel.ask("basic_qos", prefetch_count=1)  # the broker has the acks when it answers
    finally:
        await connection.finish()


async def _hold(connection: Connection, channel: Channel, queue: str) -> list[Delivery]:
    try:
        waiting = (await channel.ask("queue_declare", queue, passive=True)).message_count
    except ChannelClosedByBroker as error:
        if error.reply_code == 404:
            return []
        raise
    wanted = min(waiting, _MOST)
    found: list[Delivery] = []
    more = asyncio.Event()

    def arrived(deliveries: list[Delivery]) -> None:
        found.extend(deliveries)
        more.set()

    connection.on_deliveries = arrived
    if wanted:
        await channel.ask("basic_qos", prefetch_count=wanted)
        await channel.ask("basic_consume", queue, lambda *_: None)
    while len(found) < wanted:
        more.clear()
        try:
            async with asyncio.timeout(_SILENCE):
                await more.wait()
        except TimeoutError:
            break
    return found[:wanted]
