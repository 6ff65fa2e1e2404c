"""A transport or a source round another one: each call goes through to it. What watches or disturbs overrides some."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ..errors import Unsupported
from ..message import Message, Outgoing, Refused, Settlement, Stored
from ..source import Backlog, Renewer, Source, SourceStatus, Subscription
from ..transport import Features, Finding, Transport


class SourceWrapper:
    """A source that hands every call on to `wrapped`."""

    def __init__(self, wrapped: Source) -> None:
        self.wrapped = wrapped
        self.lease: float | None = wrapped.lease
        self.renewer: Callable[[], Renewer] | None = wrapped.renewer
        self.settles_at_once: bool = getattr(wrapped, "settles_at_once", False)
        self.returns_failed: bool = getattr(wrapped, "returns_failed", False)
        for optional in ("prepare_for_start", "prepare_for_draining"):
            if hasattr(wrapped, optional):
                setattr(self, optional, getattr(wrapped, optional))

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        return await self.wrapped.receive(demand)

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        return await self.wrapped.settle(acks, others)

    async def suspect(self, message: Message[Any]) -> bool:
        return await self.wrapped.suspect(message)

    async def flush(self) -> None:
        await self.wrapped.flush()

    def resize(self, window: int) -> None:
        self.wrapped.resize(window)

    def stop(self) -> None:
        self.wrapped.stop()

    def status(self) -> SourceStatus:
        return self.wrapped.status()

    async def backlog(self) -> Backlog | None:
        return await self.wrapped.backlog()

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        await self.wrapped.aclose(keep=keep)


class TransportWrapper:
    """A transport that hands every call on to `wrapped`."""

    def __init__(self, wrapped: Transport) -> None:
        self.wrapped = wrapped
        self.features: Features = wrapped.features

    async def connect(self) -> None:
        await self.wrapped.connect()
        self.features = self.wrapped.features  # some are known only now

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        return await self.wrapped.ensure(subscriptions, create=create)

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        await self.wrapped.publish(messages)

    async def subscribe(self, subscription: Subscription) -> Source:
        return await self.wrapped.subscribe(subscription)

    def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        return self.wrapped.browse(topic, after=after)

    async def remove(self, stored: Sequence[Stored]) -> None:
        await self.wrapped.remove(stored)

    async def aclose(self) -> None:
        await self.wrapped.aclose()


def end_leases(transport: Transport, source: Source, *, died: bool) -> None:
    """Let the leases of what a source holds run out now; with `died` the source gets and settles nothing more.

    Raises Unsupported when the transport at the bottom has no `expire` and `crash`; the in-memory one has.
    """
    transport = innermost(transport)
    while isinstance(source, SourceWrapper):
        source = source.wrapped
    act = getattr(transport, "crash" if died else "expire", None)
    if act is None:
        raise Unsupported(
            f"{type(transport).__name__} cannot be told that a process died or that its leases ran out; "
            "test that over the in-memory broker, which `running(app)` takes unless another is given"
        )
    act(source)


def innermost(transport: Transport) -> Transport:
    """The transport that all wrappers are round."""
    while isinstance(transport, TransportWrapper):
        transport = transport.wrapped
    return transport
