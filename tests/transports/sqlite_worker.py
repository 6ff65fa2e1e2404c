"""Another process on a SQLite file, for tests: does one thing, and says each step on a line of its standard output."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from sluiceway.message import Message, Outgoing
from sluiceway.source import Subscription
from sluiceway.transports.sqlite import SQLiteTransport


def say(word: str, messages: list[Message[Any]] | None = None) -> None:
    """In one write, so that a kill leaves whole lines."""
    sys.stdout.write(" ".join([word, *(message.body.decode() for message in messages or ())]) + "\n")
    sys.stdout.flush()


async def hold(transport: SQLiteTransport, count: str) -> None:
    """Receive so many messages and keep them."""
    source = await transport.subscribe(Subscription(topics=("t",), group="g", window=1000))
    held: list[Message[Any]] = []
    while len(held) < int(count):
        held += await source.receive(int(count) - len(held))
    say("held", held)
    refused = await source.settle(held, []) if await asyncio.to_thread(sys.stdin.readline) else []
    say("refused", [one.message for one in refused])
    say("scope", None if source.status().scopes == {held[0].scope} else held[:1])


async def consume(transport: SQLiteTransport, window: str) -> None:
    """Ack what comes, and say so before and after."""
    source = await transport.subscribe(Subscription(topics=("t",), group="g", window=int(window)))
    say("ready")
    while True:
        messages = list(await source.receive(int(window)))
        say("got", messages)
        refused = await source.settle(messages, [])
        assert not refused
        say("acked", messages)


async def publish(transport: SQLiteTransport, first: str, size: str) -> None:
    """Publish calls of `size` numbered messages from `first` on, and say which were accepted."""
    number = int(first)
    say("ready")
    while True:
        batch = [Outgoing("t", b"%d" % one) for one in range(number, number + int(size))]
        await transport.publish(batch)
        say(f"published {number}")
        number += int(size)


async def main(what: str, path: str, lease: str, *arguments: str) -> None:
    transport = SQLiteTransport(path, lease=float(lease))
    await transport.connect()
    jobs: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {"hold": hold, "consume": consume, "publish": publish}
    await jobs[what](transport, *arguments)
    await transport.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
