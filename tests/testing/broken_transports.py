"""Transports with one fault each, which the acceptance suite must find. `FAULTS` says which guarantee each breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sluiceway.message import Message, Outgoing, Settlement
from sluiceway.source import Subscription
from sluiceway.transports.memory import MemorySource, MemoryTransport


class _Faulty(MemoryTransport):
    """One in memory, whose sources settle and receive through `settle` and `receive` of this class."""

    async def subscribe(self, subscription: Subscription) -> MemorySource:
        source: Any = await super().subscribe(subscription)
        receive, settle = source.receive, source.settle
        source.receive = lambda demand: self.receive(source, receive, demand)
        source.settle = lambda acks, others: self.settle(settle, acks, others)
        return source

    async def receive(self, source: Any, receive: Any, demand: int) -> Sequence[Message[Any]]:
        return await receive(demand)

    async def settle(self, settle: Any, acks: Sequence[Any], others: Sequence[Settlement]) -> Any:
        return await settle(acks, others)


class NeverAcks(_Faulty):
    async def settle(self, settle: Any, acks: Sequence[Any], others: Sequence[Settlement]) -> Any:
        return await settle([], others)


class GivesTooMany(_Faulty):
    async def receive(self, source: Any, receive: Any, demand: int) -> Sequence[Message[Any]]:
        return await receive(demand + 3)


class LosesWhatArrivesAtAStop(_Faulty):
    async def receive(self, source: Any, receive: Any, demand: int) -> Sequence[Message[Any]]:
        messages = await receive(demand)
        await asyncio.sleep(0)  # a stop that comes here takes them away
        if source.status().state == "stopped":
            await MemorySource.settle(source, messages, [])
            return []
        return messages


class SuspectsNobody(_Faulty):
    async def receive(self, source: Any, receive: Any, demand: int) -> Sequence[Message[Any]]:
        messages = await receive(demand)
        for message in messages:
            message.suspect = False
        return messages


class RetriesAtOnce(_Faulty):
    async def settle(self, settle: Any, acks: Sequence[Any], others: Sequence[Settlement]) -> Any:
        return await settle(acks, [Settlement(one.message, one.outcome, 0.0, one.counted) for one in others])


class CountsReleases(_Faulty):
    async def settle(self, settle: Any, acks: Sequence[Any], others: Sequence[Settlement]) -> Any:
        for one in others:
            if one.outcome == "release":
                one.outcome = "retry"
        return await settle(acks, others)


class AcksWithoutTheDeadLetter(_Faulty):
    async def settle(self, settle: Any, acks: Sequence[Any], others: Sequence[Settlement]) -> Any:
        for one in others:
            if one.outcome == "dead_letter":
                one.outputs = ()
        return await settle(acks, others)


class SaysNothingOfLostLeases(_Faulty):
    async def settle(self, settle: Any, acks: Sequence[Any], others: Sequence[Settlement]) -> Any:
        await settle(acks, others)
        return []


class HasOneGroup(MemoryTransport):
    async def subscribe(self, subscription: Subscription) -> MemorySource:
        return await super().subscribe(Subscription(topics=subscription.topics, group="g", window=1000))


class DropsHeaders(MemoryTransport):
    async def publish(self, messages: Sequence[Outgoing]) -> None:
        await super().publish([Outgoing(one.topic, one.body, one.key, id=one.id) for one in messages])


class PublishesBackwards(MemoryTransport):
    async def publish(self, messages: Sequence[Outgoing]) -> None:
        await super().publish(messages[::-1])


FAULTS = {
    NeverAcks: "G2",
    GivesTooMany: "G1",
    LosesWhatArrivesAtAStop: "G5",
    SuspectsNobody: "G7",
    RetriesAtOnce: "G8",
    CountsReleases: "G3",
    AcksWithoutTheDeadLetter: "G2",
    SaysNothingOfLostLeases: "G10",
    HasOneGroup: "groups",
    DropsHeaders: "publish",
    PublishesBackwards: "publish",
}
