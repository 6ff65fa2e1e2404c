"""Leases: when each ends, as far as we know, and what renews them from a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

from nats.aio.client import Client

from ...errors import TransportError
from .settings import Settings
from .wire import on_end

Token = tuple[bytes, float]
"""Where a delivery is acked, and a time before which it had not come, by the machine's monotonic clock."""


class Leases:
    """Until when deliveries are ours. The server keeps that time too, and acks are not fenced there: whoever acks a
    message that it has given to another ends the other's delivery. So what is over here is never sent."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self.id = uuid4().hex
        self.renewed: dict[Token, float] = {}

    def fresh(self) -> float:
        """What came later is ours. A tenth, at most a second, is taken off the lease for the way to the server."""
        return time.monotonic() - self.lease + min(1.0, self.lease / 10)

    def lost(self, token: Token) -> bool:
        """Whether the lease is over."""
        return max(token[1], self.renewed.get(token, 0.0)) < self.fresh()


_shared: WeakValueDictionary[str, Leases] = WeakValueDictionary()


def share(leases: Leases) -> None:
    """Let the renewer of this process say what it renews."""
    _shared[leases.id] = leases


class NATSRenewer:
    """Renews with `+WPI`, on a connection and an event loop of its own, which runs while `renew` does."""

    def __init__(self, settings: Settings, lease: float, leases_id: str) -> None:
        self._leases = _shared.get(leases_id) or Leases(lease)
        self._timeout = max(0.5, lease / 3)
        self._runner = asyncio.Runner()
        self._client = Client()
        try:
            options: Any = {**settings.connect_options(), "error_cb": _quiet, "name": "sluiceway leases"}
            self._runner.run(self._client.connect(**options))
            on_end(self._client, lambda: None)
        except Exception as error:
            self._runner.close()
            raise TransportError(f"cannot reach NATS at {settings.where()} to renew leases: {error}") from error

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        """Set the leases to their full length; returns those that are over. Raises TransportError."""
        lost = [token for token in tokens if self._leases.lost(token)]
        kept = [token for token in tokens if not self._leases.lost(token)] if lost else tokens
        now = time.monotonic()
        try:
            self._runner.run(self._send(kept))
        except Exception as error:
            raise TransportError(f"cannot renew leases: {type(error).__name__} {error}") from error
        self._leases.renewed = dict.fromkeys(kept, now)
        return lost

    async def _send(self, tokens: Sequence[Token]) -> None:
        for reply, _ in tokens:
            await self._client.publish(reply.decode(), b"+WPI")
        await asyncio.wait_for(self._client.flush(), self._timeout)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        try:
            if not self._client.is_closed:
                self._runner.run(self._client.close())
        finally:
            self._runner.close()


async def _quiet(error: Exception) -> None:
    """The error is raised as well."""
