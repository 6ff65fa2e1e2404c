"""The processes that the acceptance suite starts and kills: `python -m sluiceway.testing._actor WHAT URL …`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

from ..app import App, open_transport
from ..message import Message
from ..retry import Retry
from ..source import Subscription


async def hold(url: str, topic: str, group: str, count: str) -> None:
    """Receive so many messages, and be killed with them in hand."""
    transport = open_transport(url)
    await transport.connect()
    subscription = Subscription(topics=(topic,), group=group, window=int(count))
    source = await transport.subscribe(subscription)
    held = 0
    while held < int(count):
        held += len(await source.receive(int(count) - held))
    os.kill(os.getpid(), signal.SIGKILL)


async def work(url: str, group: str, window: str, path: str) -> None:
    """Handle topic `t` until SIGTERM, and say so in a ledger. A message `poison` kills this process."""
    app = App(url, group=group)
    ledger = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(what: str, body: bytes) -> None:
        os.write(ledger, b"%s %d %s\n" % (what.encode(), os.getpid(), body))  # the kernel has it, whatever comes

    @app.consumer("t", max_demand=int(window), retry=Retry(attempts=3, base_delay=0.1))
    async def handle(message: Message[bytes]) -> None:
        note("start", message.body)
        if message.body == b"poison":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0.005)
        note("end", message.body)

    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    await app.run()


def _die_with(parent: int) -> None:
    """End when the process that started this one has ended, however it did."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(9)


if __name__ == "__main__":
    asyncio.run({"hold": hold, "work": work}[sys.argv[1]](*sys.argv[2:]))
