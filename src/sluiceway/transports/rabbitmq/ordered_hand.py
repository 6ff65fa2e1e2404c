"""The hand of an ordered source: what goes back to a message's place, and what goes to the broker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from ..._decisions.suspicion import group_size, next_suspects
from ...message import Message, Refused, Settlement
from .copies import Copies
from .credit import Credit
from .hand import Hand
from .hub import Hub
from .inlet import Inlet
from .order import Order, untouched
from .wire import Delivery, queue_of


class Keeper(Protocol):
    """The source, as far as it concerns its hand."""

    window: int
    listed: bool
    """There are, or were just now, suspects; what is handed out must be prepared."""

    def settled(self) -> None: ...
    def runs(self, tag: int) -> None: ...
    def prepare(self, demand: int, max_bytes: int) -> None: ...
    def relieve(self) -> None: ...
    def probed(self, probe: str, queue: int) -> None: ...
    async def remember(self, queues: set[int]) -> None: ...


class OrderedCredit(Credit):
    """As much as the window, once: who ends its consumer hands its turn to another process."""

    def ask(self, demand: int, window: int, *, apart: bool) -> None:
        if self._hand.epoch and not self._credit and window:
            self._credit = window
            self._hub.io.call(self._inlet.consume, self._hand.epoch, window)

    def withdraw(self) -> None:
        """What the broker pushes beyond the demand waits in the buffer."""


class OrderedHand(Hand):
    """What goes back at once stays: it is handed out again from here. That others go back is written down first."""

    def __init__(self, hub: Hub, inlet: Inlet, copies: Copies, source: Keeper) -> None:
        super().__init__(hub, inlet, copies, source.settled)
        self.source = source
        self.order = Order()
        self.suspected: set[int] = set()  # by tag
        self.chosen: list[Message[Any]] = []  # what the next receive returns, while there are suspects

    def ended(self) -> None:
        super().ended()
        self.order = Order()
        self.suspected.clear()
        self.chosen.clear()
        self._copies.places.clear()

    def arrived(self, message: Message[Any], delivery: Delivery, place: int | None) -> None:
        if message.key is not None:
            place = self.order.came(message, queue_of(delivery), place)
            if place is None:  # a process died as it sent a copy
                self.acknowledge([message.token])
                return
            self._copies.places[message.token] = place
        self.buffer.append(message)
        if message.suspect:
            self.suspected.add(message.token)

    def climbs(self, message: Message[Any], queue: int, place: int | None, due: float) -> None:
        if place is not None and message.key is not None:
            self.order.expect(message, queue, place, due)
            self._copies.places[message.token] = place

    def probed(self, probe: str, queue: int) -> None:
        self.source.probed(probe, queue)

    def hold(self, message: Message[Any]) -> None:
        super().hold(message)
        self.source.runs(message.token)
        self.order.takes(message)
        self.order.room.pop(message.token, None)

    def unsettled(self) -> list[Message[Any]]:
        return [*super().unsettled(), *self.chosen, *self.order.room.values()]

    def take(self, demand: int, max_bytes: int) -> list[Message[Any]]:
        if self.chosen or self.suspected or self.source.listed:
            found, self.chosen = self.chosen, []
            self.held.update([(message.token, message) for message in found])
            if not found:
                self.source.prepare(demand, max_bytes)
            return found
        return self.next_ones(demand, max_bytes)

    def next_ones(self, demand: int, max_bytes: int) -> list[Message[Any]]:
        """The next ones that may be handed out; they are held."""
        found: list[Message[Any]] = []
        size, at = 0, 0
        while at < len(self.buffer) and len(found) < demand and size < max_bytes:
            message = self.buffer[at]
            at += 1
            if self.order.takes(message):
                self.held[message.token] = message
                found.append(message)
                size += len(message.body)
            if at == len(self.buffer):
                self.buffer, at = self.order.called(), 0
        self.buffer = self.order.called() + self.buffer[at:]
        self.source.relieve()
        return found

    def next_suspects(self, demand: int) -> list[Message[Any]]:
        """The suspects that may run now, which then are chosen; the others wait in hand."""
        alone = next((one for one in self.buffer if one.token in self.alone), None)
        if alone is not None:
            self.buffer.remove(alone)
            self.hold(alone)
            del self.held[alone.token]
            return [alone]
        suspects = [one for one in self.buffer if one.token in self.suspected]
        self.buffer = [one for one in self.buffer if one.token not in self.suspected]
        free = [one for one in suspects if self.order.takes(one)]
        chosen = next_suspects(free, group=group_size(self.source.window), ordered=True)[:demand] if free else []
        for message in free:
            if message not in chosen:
                self._keep(message, parked=False)
        self.buffer += self.order.called()
        return chosen

    def _keep(self, message: Message[Any], *, parked: bool) -> None:
        """It is handed out again from here."""
        suspect = message.token in self.suspected
        if message.key is None:
            self.buffer.insert(0, untouched(message, suspect=suspect))
        else:
            self.order.stays(untouched(message, suspect=suspect), parked=parked)

    def acknowledge(self, tags: Sequence[int]) -> None:
        self.order.ended(tags)
        for tag in tags:
            self._copies.places.pop(tag, None)
            self.suspected.discard(tag)
        self.buffer[:0] = self.order.called()
        super().acknowledge(tags)

    async def _settle_others(self, others: Sequence[Settlement]) -> list[Refused]:
        go = [self._goes(one) for one in others if not self._stays(one)]
        self.buffer[:0] = self.order.called()
        self._settled()
        if not go:
            return []
        await self.source.remember({queue for _, queue in go if queue is not None})
        return await super()._settle_others([settlement for settlement, _ in go])

    def _stays(self, settlement: Settlement) -> bool:
        """Whether it only goes back into this hand. It is there then."""
        message, tag = settlement.message, settlement.message.token
        if message.scope != self.epoch or not self.tags.is_open(tag) or tag in self.alone or self.order.is_going(tag):
            return False
        if settlement.outcome not in ("park", "release") or (settlement.outcome == "release" and settlement.delay > 0):
            return False
        if self.held.get(tag) is not message:  # it was settled before; or it is too much for the room
            return self.order.room.get(tag) is not message
        del self.held[tag]
        self._keep(message, parked=settlement.outcome == "park")
        return True

    def _goes(self, settlement: Settlement) -> tuple[Settlement, int | None]:
        """It goes to the broker: with the delay that it needs, and the number of the queue whose record must say so."""
        message, tag, delay = settlement.message, settlement.message.token, settlement.delay
        copied = tag in self.order.places and settlement.outcome in ("retry", "release", "park")
        if message.scope != self.epoch or not copied:
            return settlement, None
        if settlement.outcome != "retry" and tag not in self.alone:  # it waits for others of its key
            delay = max(delay, self.order.due(tag) - time.time())
            settlement = replace(settlement, delay=delay)
        self.order.goes(tag, time.time() + delay)
        return settlement, self._copies.source_of(message)
