"""Suspects that run alone: how one is written down, and how those that other processes left are taken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import Any, Protocol

from pika.exceptions import AMQPError

from ..._decisions.suspicion import STEADY, suspicions_now
from ...errors import TransportError
from ...message import Message
from .copies import Copies
from .credit import Credit
from .hand import Hand
from .hub import Hub
from .inlet import Inlet
from .topology import suspects_of

log = logging.getLogger("sluiceway")

_SOON = 1.0  # seconds between two suspects that others left


class Receiver(Protocol):
    """The source, as far as it concerns suspects."""

    @property
    def receives(self) -> bool:
        """Whether it may take a suspect now."""
        ...

    async def give_back(self) -> None:
        """Hand back what has arrived and nobody asked for."""
        ...

    async def moves(self, message: Message[Any]) -> None:
        """A message is about to move to the suspects. Raises TransportError when that must wait."""
        ...

    async def has_turn(self, queue: int) -> bool:
        """Whether it is this process that may run what is of a queue."""
        ...

    def wake(self) -> None:
        """A receive may go on."""
        ...


class Suspects:
    """Those of one source. They wait in a queue beside its own, and are taken one at a time."""

    def __init__(self, hub: Hub, inlet: Inlet, hand: Hand, copies: Copies, credit: Credit, receiver: Receiver) -> None:
        self.clearing = False  # one is about to be taken, once nothing is in hand
        self._hub = hub
        self._inlet = inlet
        self._hand = hand
        self._copies = copies
        self._credit = credit
        self._receiver = receiver
        self._taking = asyncio.Lock()  # two would be in hand at once, and one is blamed for the other
        self._running: int | None = None  # the tag of the last one that was written down
        self._empty = asyncio.Event()  # nothing is in hand; it is asked while clearing

    def emptied(self) -> None:
        """The channel has ended, and with it all that was in hand."""
        self._empty.set()

    def see_whether_empty(self) -> None:
        """Something was settled, while a suspect is to be taken."""
        if self._hand.held:
            self._empty.clear()
        else:
            self._empty.set()

    async def write_down(self, message: Message[Any]) -> bool:
        """See the source's `suspect`."""
        async with self._taking:
            written = await self._write_down(message)
            self._running = message.token if written else None
        return written

    async def _write_down(self, message: Message[Any]) -> bool:
        hand, tag = self._hand, message.token
        epoch = hand.epoch
        if message.scope != epoch or not hand.tags.is_open(tag):
            return False
        if tag not in hand.alone:
            now = suspicions_now(message.deliveries, message.failures, message.suspicions)
            await self._receiver.moves(message)
            failed = await self._hub.send([await self._copies.as_it_is(message, now)])
            if failed:
                raise TransportError(f"the suspicion of message {message.id} is not written: {failed[0].text}")
            if hand.epoch != epoch:
                return False
            hand.acknowledge([tag])
            await self._take(self._copies.source_of(message))
            copy = next((one for one in hand.buffer if one.id == message.id and one.token in hand.alone), None)
            if copy is None:
                return False
            hand.buffer.remove(copy)
            message.token, message.scope = copy.token, copy.scope
            hand.hold(message)
        message.suspicions = hand.alone.pop(message.token)
        message.deliveries = message.attempt
        message.suspect = False
        return True

    async def _take(self, index: int) -> None:
        """Take one of the suspects of a queue, if there is one. It has arrived then."""
        try:
            await self._hub.io.run(self._inlet.take_suspect(index))
        except (TransportError, AMQPError) as error:
            log.warning("suspects of %s wait: %s", self._inlet.queues[index], error)

    async def look(self, ending: asyncio.Event) -> None:
        """Take suspects that other processes left, one at a time, while nothing else is in hand; until `ending`.

        Not before this process has lived for a while: where processes are killed soon after their start, a suspect that
        they take would be blamed for it.
        """
        pause = STEADY
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), pause * (1 + random.random() / 4))
                return
            pause = STEADY
            if not self._receiver.receives:
                continue
            queues = self._inlet.queues
            try:
                counts = await self._hub.io.run(self._inlet.waiting([suspects_of(queue) for queue in queues]))
            except (TransportError, AMQPError):
                continue
            if any(counts):
                pause = _SOON
                index = max(range(len(queues)), key=counts.__getitem__)
                if await self._receiver.has_turn(index):
                    await self._take_one(index)

    async def _take_one(self, index: int) -> None:
        self.clearing = True  # so that nothing more is received meanwhile
        try:
            self._credit.withdraw()
            self.see_whether_empty()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STEADY):  # handlers may take hours, and a suspect shall not wait for ever
                    await self._empty.wait()
            await self._credit.quiet.wait()
            await self._receiver.give_back()
            async with self._taking:
                if self._receiver.receives and self._running not in self._hand.held:
                    await self._take(index)
        finally:
            self.clearing = False
            self._receiver.wake()
