"""What the tests of the built-in middlewares share: a pipeline over given messages, and how they ended."""

from __future__ import annotations

from typing import Any

from sluiceway import App, Retry
from sluiceway.message import Stored
from sluiceway.transports.memory import MemoryTransport

ONCE = Retry(attempts=1)


class Shop:
    """An app over memory. Its topic is `t`; `run` handles what is given, until nothing waits."""

    def __init__(self, **options: Any) -> None:
        self.transport = MemoryTransport()
        self.app = App(self.transport, group="shop", **options)

    async def run(self, *payloads: Any, headers: dict[str, str] | None = None) -> None:
        async with self.app.running() as manager:
            for payload in payloads:
                await self.app.publish("t", payload, headers=headers)
            await manager.idle()

    async def dead(self) -> list[Stored]:
        return [stored async for stored in self.transport.browse("t.shop.dead")]

    async def why_dead(self) -> list[str]:
        return [stored.headers["sluiceway-dead-error"] for stored in await self.dead()]
