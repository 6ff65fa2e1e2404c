"""The hand: what a source has received and not settled, and how that is settled."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

from ...errors import TransportError
from ...message import Message, Refused, Settlement
from .copies import Copies
from .hub import Hub
from .inlet import Inlet
from .letters import Letter
from .tags import Tags
from .wire import Delivery

_LATE = 1.0  # seconds that a copy may take from when it is due
_REMEMBERED = 10_000  # ids of messages that were lost with a connection
_GONE = "its channel has ended, and the broker hands the message out again"


class Hand:
    """Deliveries go by their tag, which means something within one epoch alone: while one channel is open."""

    def __init__(self, hub: Hub, inlet: Inlet, copies: Copies, settled: Callable[[], None]) -> None:
        """`settled` is called when there is less in hand."""
        self.epoch = 0  # 0: no channel is open
        self.tags = Tags()
        self.held: dict[int, Message[Any]] = {}  # returned by a receive and not settled, by tag
        self.buffer: list[Message[Any]] = []  # arrived, and not returned by a receive
        self.alone = copies.alone
        self.lost: Counter[str] = Counter()  # by id: hand-overs that ended with a connection, while this process lives
        self._put_off: list[float] = []  # a heap: when each copy is back that waits for a delay
        self._hub = hub
        self._inlet = inlet
        self._copies = copies
        self._settled = settled
        self._sent: dict[tuple[int, str], set[int]] = {}  # by tag and outcome: which letters the broker has, not all

    def opened(self, epoch: int) -> None:
        """There is a channel."""
        self.epoch, self.tags = epoch, Tags()

    def ended(self) -> None:
        """The channel has ended: the broker hands all out again."""
        if self.epoch:
            if len(self.lost) > _REMEMBERED:  # others have them
                self.lost.clear()
            for message in self.unsettled():
                self.lost[message.id] += 1
        self.epoch = 0
        self.buffer.clear()
        self.held.clear()
        self.alone.clear()
        self._sent.clear()

    @property
    def put_off(self) -> int:
        """How many messages wait for a delay that was set here, or are on their way back from it."""
        now = time.time()
        while self._put_off and self._put_off[0] < now:
            heappop(self._put_off)
        return len(self._put_off)

    def unsettled(self) -> list[Message[Any]]:
        """All that are in hand."""
        return [*self.buffer, *self.held.values()]

    def arrived(self, message: Message[Any], delivery: Delivery, place: int | None) -> None:
        """A message came; `place` is that of a copy whose key is in order."""
        self.buffer.append(message)

    def climbs(self, message: Message[Any], queue: int, place: int | None, due: float) -> None:
        """It is not due yet, and is about to go up again."""

    def probed(self, probe: str, queue: int) -> None:
        """What was asked of a queue has passed through it."""

    def hold(self, message: Message[Any]) -> None:
        """It is in hand as if a receive had returned it."""
        self.held[message.token] = message

    def take(self, demand: int, max_bytes: int) -> list[Message[Any]]:
        """Up to `demand` of those that have arrived; no more once their bodies have `max_bytes`."""
        count, size = 0, 0
        for message in self.buffer[:demand]:
            count += 1
            size += len(message.body)
            if size >= max_bytes:
                break
        messages, self.buffer = self.buffer[:count], self.buffer[count:]
        self.held.update([(message.token, message) for message in messages])
        return messages

    def acknowledge(self, tags: Sequence[int]) -> None:
        """The broker may forget these. The ack is on its way when this returns."""
        settled = self.tags.settle(tags)
        if settled:
            self._hub.io.call(self._inlet.ack, self.epoch, settled)
        held = self.held
        lost = self.lost
        for tag in tags:
            message = held.pop(tag, None)
            if lost and message is not None:
                lost.pop(message.id, None)
        if self.alone:
            for tag in tags:
                self.alone.pop(tag, None)
        self._settled()

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> list[Refused]:
        """See the source's."""
        refused: list[Refused] = []
        if acks:
            epoch = self.epoch
            tags = [message.token for message in acks if message.scope == epoch]
            self.acknowledge(tags)
            if len(tags) < len(acks):
                refused += [Refused(message, "lost", _GONE) for message in acks if message.scope != epoch]
        if others:
            refused += await self._settle_others(others)
        return refused

    async def _settle_others(self, others: Sequence[Settlement]) -> list[Refused]:
        epoch = self.epoch
        refused = [Refused(one.message, "lost", _GONE) for one in others if one.message.scope != epoch]
        current = [one for one in others if one.message.scope == epoch and self.tags.is_open(one.message.token)]
        letters: list[Letter] = []
        places: list[tuple[int, int]] = []  # of each letter: its settlement, and its number within that
        bad: dict[int, str] = {}
        for index, settlement in enumerate(current):
            sent = self._sent.get((settlement.message.token, settlement.outcome), ())
            makers = self._copies.of(settlement)
            try:
                made = [(number, await make()) for number, make in enumerate(makers) if number not in sent]
            except ValueError as error:  # it cannot be sent as it is; nothing of the settlement is
                bad[index] = str(error)
            else:
                letters += [letter for _, letter in made]
                places += [(index, number) for number, _ in made]
        failed = await self._hub.send(letters) if letters else {}
        again: str | None = None
        for at, (index, number) in enumerate(places):
            if at not in failed:
                key = current[index].message.token, current[index].outcome
                self._sent.setdefault(key, set()).add(number)
            elif not failed[at].mendable:
                bad[index] = failed[at].text
            else:
                again = failed[at].text
        if self.epoch != epoch:  # the deliveries went back meanwhile
            return [*refused, *(Refused(one.message, "lost", _GONE) for one in current)]
        missing = {places[at][0] for at in failed}
        done = [one for index, one in enumerate(current) if index not in bad and index not in missing]
        for one in done:
            self._sent.pop((one.message.token, one.outcome), None)
            if one.outcome in ("retry", "release") and one.delay > 0:
                heappush(self._put_off, time.time() + one.delay + _LATE)
        self.acknowledge([one.message.token for one in done])
        if again is not None:
            raise TransportError(f"the broker has not confirmed what belongs to a settle: {again}")
        return [*refused, *(Refused(current[index].message, "rejected", text) for index, text in bad.items())]
