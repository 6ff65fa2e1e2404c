"""Copies: what takes the place of a message that goes back to the broker, with all that is known about it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ..._decisions.topics import best_match
from ...message import Message, Outgoing, Settlement
from ...source import Subscription
from .hub import Hub
from .letters import ALONE, BASE, DUE, PLACE, TOPIC, Letter, pack


class Copies:
    """Makes the letters of a source's settlements."""

    def __init__(self, hub: Hub, subscription: Subscription) -> None:
        self.alone: dict[int, int] = {}  # by tag, of what was taken from the suspects: its suspicions once it runs
        self.places: dict[int, int] = {}  # by tag, of messages whose keys are in order
        self._hub = hub
        self._group = subscription.group
        self._topics = subscription.topics

    def of(self, settlement: Settlement) -> list[Callable[[], Awaitable[Letter]]]:
        """What must be confirmed before a delivery is acknowledged: its outputs, and its copy where it goes back."""
        message, outcome = settlement.message, settlement.outcome
        if outcome in ("ack", "dead_letter"):
            return [partial(self._hub.letter, outgoing) for outgoing in settlement.outputs]
        if outcome == "retry":  # its handler ended, so whatever died with it before, it was not this message's doing
            failures = message.failures + settlement.counted
            return [partial(self._copy, message, failures, 0, failures, delay=settlement.delay)]
        return [partial(self.as_it_is, message, self.alone.get(message.token), settlement.delay)]

    def as_it_is(self, message: Message[Any], alone: int | None = None, delay: float = 0.0) -> Awaitable[Letter]:
        """A copy that goes on where the message stands. `alone`: it goes to the suspects, and has so many suspicions
        once it runs."""
        return self._copy(message, message.failures, message.suspicions, message.deliveries - 1, alone, delay)

    def source_of(self, message: Message[Any]) -> int:
        """The number of the queue, of those of the subscription, that messages like this come from."""
        found = best_match(self._topics, message.topic)
        return 0 if found is None else self._topics.index(found)

    async def _copy(
        self,
        message: Message[Any],
        failures: int,
        suspicions: int,
        before: int,
        alone: int | None = None,
        delay: float = 0.0,
    ) -> Letter:
        more = {TOPIC: message.topic}
        if self.places and message.token in self.places:
            more[PLACE] = str(self.places[message.token])
        if before != failures + suspicions:
            more[BASE] = str(before)
        if alone is not None:
            more[ALONE] = str(alone)
        if delay > 0:
            more[DUE] = repr(time.time() + delay)
        outgoing = Outgoing(
            message.topic, message.body, message.key, message.headers, message.id, message.timestamp, delay
        )
        properties = pack(outgoing, more, failures=failures, suspicions=suspicions)
        own = self._hub.names.queue(self._group, self._topics[self.source_of(message)])
        if alone is not None:
            return await self._hub.to_suspects(own, message.body, properties, delay)
        queue = own if len(self._topics) == 1 else self._hub.best_queue(self._group, message.topic) or own
        return await self._hub.to_queue(queue, message.body, properties, delay)
