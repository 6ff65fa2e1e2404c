"""The ordered source: `order_by`, over queues of which one process at a time is handed anything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Any

from msgspec import Struct
from pika.exceptions import AMQPError
from pika.spec import BasicProperties

from ...errors import TransportError
from ...message import Message, Settlement, new_id
from .copies import Copies
from .credit import Credit
from .hand import Hand
from .letters import PROBE, Letter
from .order import read, write
from .ordered_hand import OrderedCredit, OrderedHand
from .source import RabbitMQSource
from .topology import record_of, suspects_of
from .wire import Delivery, queue_of

log = logging.getLogger("sluiceway")

_LOOK = 0.5  # seconds between looks at what should have come
_PATIENCE = 5.0  # seconds after which a probe is sent again
_AWAY = 1.0  # seconds for which what is too much stays away, at least
_TRIES = 5  # to read a record


class OrderedSource(RabbitMQSource):
    """One process at a time is handed what is in the queue, in its order; when it ends, the next one takes its turn.

    The broker pushes a whole window ahead. When it is handed its first message, a process reads what the one before
    has written down, and hands nothing out before.
    """

    _sets_apart = False
    _hand: OrderedHand

    def _make_hand(self, copies: Copies) -> Hand:
        self.window = self._subscription.window
        self.leaving = False
        self.listed = False  # the record says of what is in hand that no process dies with it
        self._running: set[int] = set()  # but of these, by tag
        self._preparing = False
        self._ahead = max(1, self._window // len(self._inlet.queues))  # what the broker pushes of each queue
        self._known: dict[int, frozenset[object]] = {}  # by queue that is our turn: whom its record names
        self._waiting: dict[int, list[Delivery]] = {}  # by queue whose record is being read
        self._probes: dict[int, _Probe] = {}  # by queue
        self._writing = asyncio.Lock()
        self._relieving = False
        return OrderedHand(self._hub, self._inlet, copies, self)

    def _make_credit(self) -> Credit:
        return OrderedCredit(self._hub, self._inlet, self._hand)

    async def open(self) -> None:
        """See RabbitMQSource."""
        await super().open()
        self._lasting.append(self._in_background(self._watch(), last=True))

    # -- taking turns

    def opened(self, epoch: int) -> None:
        self._known.clear()
        self._waiting.clear()
        self._probes.clear()
        self.listed, self._preparing = False, False
        super().opened(epoch)

    def lost(self, epoch: int, reason: str) -> None:
        for deliveries in self._waiting.values():
            for delivery in deliveries:
                self._hand.lost[str(delivery[3].message_id)] += 1
        self._waiting.clear()
        super().lost(epoch, reason)

    def _took(self, deliveries: list[Delivery]) -> None:
        ready: list[Delivery] = []
        for delivery in deliveries:
            queue = queue_of(delivery)
            if queue in self._known:
                ready.append(delivery)
            elif queue in self._waiting:
                self._waiting[queue].append(delivery)
            else:
                self._waiting[queue] = [delivery]
                self._in_background(self._succeed(queue, self._hand.epoch))
        if ready:
            super()._took(ready)

    async def _succeed(self, queue: int, epoch: int) -> None:
        """It is our turn: learn what the one before has left."""
        name, bodies = record_of(self._inlet.queues[queue]), list[bytes]()
        for number in range(_TRIES):
            try:
                bodies = await self._hub.io.run(self._inlet.read(name))
                break
            except (TransportError, AMQPError) as error:
                log.warning("reading in %s what has to come first failed: %s", name, error)
                await asyncio.sleep(0.1 * 2**number)
        if self._hand.epoch != epoch:
            return
        away, explained = read(bodies)
        self._hand.order.learn(queue, away)
        for one, count in explained.items():
            self._hand.lost[one] = max(self._hand.lost[one], count)
        self._known[queue] = frozenset(place for place, *_ in away) | frozenset(explained)
        super()._took(self._waiting.pop(queue))

    @property
    def receives(self) -> bool:
        """See RabbitMQSource. Suspects that are in hand come first."""
        hand = self._hand
        return super().receives and not hand.chosen and not any(one.token in hand.suspected for one in hand.buffer)

    async def has_turn(self, queue: int) -> bool:
        """Whether the queue hands us what it has. Where it has handed us nothing yet, a probe will tell."""
        if queue not in self._known:
            self._ask()
            await self._probe(queue, [])
        return queue in self._known

    # -- what is written down

    def prepare(self, demand: int, max_bytes: int) -> None:
        """Choose what the next receive returns, while there are suspects."""
        if not self._preparing:
            self._preparing = True
            self._in_background(self._prepare(demand, max_bytes))

    async def _prepare(self, demand: int, max_bytes: int) -> None:
        """Suspects run with nothing else in hand, and a death points at nobody else: that is written down before."""
        hand, epoch = self._hand, self._hand.epoch
        suspects: list[Message[Any]] = []
        try:
            if any(one.token in hand.suspected for one in hand.buffer):
                if hand.held:
                    return  # they end first
                suspects = hand.next_suspects(demand)
            others = [] if suspects else hand.next_ones(demand, max_bytes)
            for message in others:
                del hand.held[message.token]
            hand.chosen = suspects or others
            if suspects or self.listed:
                self.listed = bool(suspects)
                self._running = {one.token for one in suspects}
                await self._insist_on(self._known.keys(), epoch)
        finally:
            self._preparing = False
            if hand.chosen:
                self.wake()

    async def _insist_on(self, queues: Iterable[int], epoch: int) -> None:
        """Write it down, however long that takes."""
        while self._hand.epoch == epoch:
            try:
                await self.remember(set(queues))
                return
            except TransportError as error:
                log.warning("%s; trying again", error)
                await asyncio.sleep(1.0)

    async def remember(self, queues: set[int], *, leaving: bool = False) -> None:
        """Write down what of these queues is away; `leaving`: and that no process dies with what is in hand. Raises
        TransportError when that cannot be now."""
        if not queues:
            return
        hand = self._hand
        async with self._writing:
            explained = {name: count for name, count in hand.lost.items() if count > 0}
            if leaving or self.listed:
                running = set() if leaving else self._running
                ids = [one.id for one in hand.unsettled() if one.token not in running and one.token not in hand.alone]
                explained |= {name: explained.get(name, 0) + 1 for name in ids}
            letters: list[Letter] = []
            names: dict[int, frozenset[object]] = {}
            for queue in queues & self._known.keys():  # others are not ours any more
                await self._hub.have_record(self._inlet.queues[queue])
                away = hand.order.record(queue)
                names[queue] = frozenset(place for place, *_ in away) | frozenset(explained)
                name = record_of(self._inlet.queues[queue])
                letters.append(Letter("", name, write(away, explained), BasicProperties(delivery_mode=2)))
            failed = await self._hub.send(letters)
            if failed:
                why = next(iter(failed.values())).text
                raise TransportError(f"it cannot be written down what has to come first: {why}")
            self._known.update((queue, named) for queue, named in names.items() if queue in self._known)

    async def moves(self, message: Message[Any]) -> None:
        """See Suspects."""
        if message.token in self._hand.order.places:
            self._hand.order.goes(message.token, time.time())
        self.listed, self._running = True, {message.token}
        await self.remember(set(self._known))

    def runs(self, tag: int) -> None:
        """A suspect runs alone under this tag: it is not written down that no process dies with it."""
        self._running.add(tag)

    # -- what takes too long

    async def _watch(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), _LOOK)
                return
            try:
                await self._look()
            except (TransportError, AMQPError, ValueError) as error:
                log.debug("looking at what has to come first: %s", error)
            except Exception:  # without these looks a key may wait for ever
                log.exception("looking at what has to come first in %s failed; looking again", self._inlet)

    async def _look(self) -> None:
        """Write down what has come, and ask the queues for what has not."""
        order = self._hand.order
        there = {queue: {place for place, *_ in order.record(queue)} | set(self._hand.lost) for queue in self._known}
        await self.remember({queue for queue, named in self._known.items() if named - there.get(queue, set())})
        freed = order.free({one.key for one in (*self._hand.held.values(), *self._hand.chosen, *self._hand.buffer)})
        if freed:
            self._hand.buffer[:0] = freed
            self.settled()
        late: dict[int, list[tuple[str, int]]] = {}
        for key, place, queue in order.overdue():
            late.setdefault(queue, []).append((key, place))
        for queue, places in late.items():
            probe = self._probes.get(queue)
            (suspects,) = await self._hub.io.run(self._inlet.waiting([suspects_of(self._inlet.queues[queue])]))
            if suspects:
                continue  # they may be what is waited for
            if probe is None or time.monotonic() > probe.sent + _PATIENCE:
                await self._probe(queue, places)

    async def _probe(self, queue: int, places: list[tuple[str, int]]) -> None:
        """What is in a queue has come when this has, which is behind it."""
        probe = self._probes[queue] = _Probe(new_id(), time.monotonic(), places)
        properties = BasicProperties(delivery_mode=2, headers={PROBE: probe.id})
        await self._hub.send([Letter("", self._inlet.queues[queue], b"", properties)])

    def probed(self, probe: str, queue: int) -> None:
        """A probe has come."""
        asked = self._probes.get(queue)
        if asked is not None and asked.id == probe:
            del self._probes[queue]
            for key, place in asked.places:
                self._hand.order.forgets(key, place)
            self._hand.buffer[:0] = self._hand.order.called()
            self.settled()

    def relieve(self) -> None:
        """Send away what waits for what is away, where so much does that the broker pushes nothing else."""
        hand, most = self._hand, max(1, self._ahead // 2)
        if len(hand.order.room) >= most and not self._relieving and not self.leaving:
            busy = {one.key for one in (*hand.held.values(), *hand.chosen, *hand.buffer)}
            crowd = hand.order.crowd(busy, most)
            if crowd:
                self._relieving = True
                self._in_background(self._send_away(crowd))

    async def _send_away(self, crowd: list[Message[Any]]) -> None:
        try:
            await self._insist([Settlement(message, "release", delay=_AWAY) for message in crowd])
        finally:
            self._relieving = False
            self.wake()

    # -- receiving and the end

    def settled(self) -> None:
        super().settled()
        if self._hand.buffer:
            self.wake()

    def stop(self) -> None:
        """See RabbitMQSource. What is handed out from now on stays in hand until the end, and is back in its place
        then."""
        self.leaving = True
        super().stop()

    async def give_back(self) -> None:
        """Nothing: what is in hand is nobody else's turn."""

    async def _give_all_back(self, kept: set[int]) -> None:
        """It goes back to its place when the channel ends. That no process died with it is written down before; what
        comes meanwhile, too."""
        hand = self._hand
        alone = [one for one in hand.unsettled() if one.token in hand.alone and one.token not in kept]
        await self.settle((), [Settlement(message, "release") for message in alone])
        newest = -1
        while newest != hand.tags.newest:
            await self.flush()
            newest = hand.tags.newest
            await self.remember(set(self._known), leaving=True)
            await self.flush()
        if kept:
            await self._hub.io.run(self._inlet.leave(hand.epoch))
            tags = sorted(one.token for one in hand.unsettled() if one.token not in kept)
            self._hub.io.call(self._inlet.put_back, hand.epoch, tags)


class _Probe(Struct):
    """`places`: what has to be in its queue before it, by key."""

    id: str
    sent: float
    places: list[tuple[str, int]]
