"""A process that handles topic `t` in the order of keys, for tests: `python -m … URL LEDGER [POISON]`.

A message with the body POISON kills it.

The ledger gets a line when a handler begins and one when it has succeeded: the word, the process, the key, the body.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys

from sluiceway import App, Message, Retry, RetryLater


async def main(url: str, path: str, poison: str | None = None) -> None:
    ledger = os.open(path, os.O_WRONLY | os.O_APPEND)
    app = App(url, group="g")

    def say(word: str, message: Message[bytes]) -> None:
        os.write(ledger, b"%s %d %s %s\n" % (word.encode(), os.getpid(), str(message.key).encode(), message.body))

    attempts = 1000 if poison is None else 4

    @app.consumer("t", order_by="key", concurrency=8, max_demand=40, retry=Retry(attempts=attempts, base_delay=0.02))
    async def work(message: Message[bytes]) -> None:
        say("start", message)
        if poison is not None:
            await asyncio.sleep(0.02)
            if message.body == poison.encode():
                os.kill(os.getpid(), signal.SIGKILL)
            say("end", message)
            return
        await asyncio.sleep(random.random() / 200)
        chance = random.random()
        if chance < 0.1:
            say("failed", message)
            raise ValueError("as it happens")
        if chance < 0.15:
            say("failed", message)
            raise RetryLater(0.01)
        say("end", message)

    await app.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
