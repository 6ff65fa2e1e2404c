"""The renewal of leases, from a thread or process that no handler can block."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ...errors import TransportError
from .scripts import RENEW
from .settings import Settings
from .wire import Line

renewed: dict[str, float] = {}
"""By consumer of this process: when its lease was last renewed, by the monotonic clock."""


class RedisRenewer:
    """Renews the leases of a source's deliveries on a connection of its own, which is opened when it is needed.

    A lease belongs to the source and covers all that it holds, so a renewal is one command however many tokens there
    are. `leases`: the keys that hold the source's lease; `lease`: seconds.
    """

    def __init__(self, settings: Settings, leases: Sequence[str], lease: float) -> None:
        self._leases = leases
        self._lease = lease
        self._line = Line(settings)
        self._runner = asyncio.Runner()

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        """Set the leases of `tokens` to their full length from now; returns those that are lost, for good.

        Raises TransportError when the server cannot be reached; the leases are then as they were.
        """
        lost = {consumer for consumer in {token[2] for token in tokens} if not self._renew(consumer)}
        return [token for token in tokens if token[2] in lost] if lost else []

    def _renew(self, consumer: str) -> bool:
        now = time.monotonic()
        try:
            kept = self._runner.run(self._ask(consumer))
        except TransportError:  # the connection of the last time may be gone
            kept = self._runner.run(self._ask(consumer))
        if kept and consumer in renewed:
            renewed[consumer] = now
        return kept

    async def _ask(self, consumer: str) -> bool:
        wire = await self._line.wire()
        return bool(await wire.run(RENEW, self._leases, round(self._lease * 1000), consumer))

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._line.close()
        self._runner.close()
