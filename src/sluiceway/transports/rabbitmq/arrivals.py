"""Arrivals: what of the broker's pushes is for a source, and who is suspected."""

from __future__ import annotations

import time
from typing import Any

from ..._decisions.topics import is_pattern
from ...message import Message, Settlement
from ...source import Subscription
from .hand import Hand
from .hub import Hub
from .inlet import SUSPECTS
from .letters import open_letter
from .wire import Delivery, queue_of

_TAKEN = SUSPECTS.encode()


class Arrivals:
    """Puts what has arrived in hand."""

    def __init__(self, hub: Hub, hand: Hand, queues: list[str], subscription: Subscription) -> None:
        self._hub = hub
        self._hand = hand
        self._queues = queues
        self._group = subscription.group
        self._overlaps = any(map(is_pattern, subscription.topics))

    def take(self, deliveries: list[Delivery]) -> tuple[bool, list[Settlement]]:
        """Puts them in the buffer; returns whether one is suspected, and what is not due yet, to be sent up again."""
        hand = self._hand
        hand.tags.newest = deliveries[-1][0]
        unwanted: list[int] = []
        early: list[Settlement] = []
        suspected = False
        for delivery in deliveries:
            taken = delivery[5].endswith(_TAKEN)
            inbound = open_letter(delivery, hand.epoch, self._explain(delivery, taken=taken))
            message = inbound.message
            if inbound.probe is not None:
                unwanted.append(delivery[0])
                hand.probed(inbound.probe, queue_of(delivery))
                continue
            if inbound.alone is not None:
                hand.alone[delivery[0]] = inbound.alone
            if inbound.group not in (None, self._group) or (
                self._overlaps and not taken and self._is_another_queues(delivery, message)
            ):
                unwanted.append(delivery[0])
            elif inbound.due and (left := inbound.due - time.time()) > 0.001:
                early.append(Settlement(message, "release", delay=left))
                hand.climbs(message, queue_of(delivery), inbound.place, inbound.due)
            else:
                hand.arrived(message, delivery, inbound.place)
                suspected = suspected or message.suspect
        if unwanted:
            hand.acknowledge(unwanted)
        return suspected, early

    def _explain(self, delivery: Delivery, *, taken: bool) -> int:
        """How many hand-overs of a message that came back ended otherwise than with a process: with a connection of
        ours, or in a cancel of ours, where the broker takes back what it was about to push."""
        if not delivery[1]:
            return 0
        lost = self._hand.lost.get(str(delivery[3].message_id), 0)
        once = not taken and (delivery[3].headers or {}).get("x-delivery-count") == 1
        return lost or int(once and self._hub.was_taken_back(self._queues[queue_of(delivery)]))

    def _is_another_queues(self, delivery: Delivery, message: Message[Any]) -> bool:
        """Whether a better pattern of this group, that we know of, has the message too."""
        return self._hub.best_queue(self._group, message.topic) not in (None, self._queues[queue_of(delivery)])
