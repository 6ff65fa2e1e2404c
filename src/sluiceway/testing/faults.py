"""Faults between an app and its broker: what networks, brokers and processes do wrong, when a test wants it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Literal

from msgspec import Struct

from ..errors import OptionError, PublishError, Unsupported
from ..message import Message, Outgoing, Refused, Settlement
from ..source import Source, Subscription
from ..transport import Transport
from .wrapping import SourceWrapper, TransportWrapper, end_leases, innermost

log = logging.getLogger("sluiceway.testing")

Call = Literal["subscribe", "receive", "settle", "suspect", "publish"]
Kind = Literal["disconnect", "delay", "drop", "duplicate", "lose_lease", "crash"]

POSSIBLE: dict[Call, tuple[Kind, ...]] = {
    "subscribe": ("disconnect", "delay"),
    "receive": ("disconnect", "delay", "drop", "duplicate", "lose_lease", "crash"),
    "settle": ("disconnect", "delay", "lose_lease", "crash"),
    "suspect": ("disconnect", "delay", "lose_lease", "crash"),
    "publish": ("disconnect", "delay", "crash"),
}
"""What can go wrong at which call to the broker."""

_WITH_AFTER = ("disconnect", "crash")


class Fault(Struct, frozen=True):
    """One thing that goes wrong at one call to the broker.

    - `disconnect`: the call raises. With `after` the broker has done what was asked, and only its answer is lost.
    - `delay`: the call takes `seconds` longer.
    - `drop`: what was handed over does not arrive; it comes again `seconds` later, uncounted.
    - `duplicate`: what was handed over is published once more to the group, with the same ids.
    - `lose_lease`: the leases of all that is in hand run out: it comes again, as suspects, while its handlers run on.
    - `crash`: the process dies, and another one starts in its place (see `Harness.crash`); with `after` the broker has
      done what was asked.
    """

    kind: Kind
    seconds: float = 0.0
    after: bool = False


class Faults:
    """Which calls to the broker go wrong, and how: by a script, or at random.

        Faults(receive=[None, Fault("duplicate")], settle=[Fault("disconnect", after=True)])

    The first receive goes well here and the second is duplicated; the answer to the first settle is lost; all further
    calls go well. Calls are counted over all sources, and over restarts. `happened` lists what went wrong, in order.
    Raises OptionError for what cannot go wrong at a call.
    """

    def __init__(self, **script: Iterable[Fault | None]) -> None:
        self.happened: list[tuple[Call, Fault]] = []
        self.seed: int | None = None
        self._script: dict[str, list[Fault | None]] = {call: list(faults) for call, faults in script.items()}
        self._draw: Callable[[Call], Fault | None] = _nothing
        for call, faults in self._script.items():
            if call not in POSSIBLE:
                raise OptionError(f"Faults: there is no call {call!r}; calls: {', '.join(POSSIBLE)}")
            for fault in faults:
                if fault is not None and fault.kind not in POSSIBLE[call]:
                    possible = ", ".join(POSSIBLE[call])
                    raise OptionError(f"Faults: {fault.kind!r} cannot happen at {call}; possible: {possible}")

    @classmethod
    def random(
        cls, seed: int | None = None, *, rate: float = 0.05, kinds: Collection[Kind] | None = None, seconds: float = 1.0
    ) -> Faults:
        """Faults drawn from a seed: each call goes wrong with a probability of `rate`, in one of the `kinds`.

        Delays are up to `seconds`. Without a seed one is drawn. It is logged as a warning, which pytest shows when the
        test fails: hand it in to have the same faults again. Raises OptionError.
        """
        import random

        if not 0 <= rate < 1:
            raise OptionError(f"Faults: rate must be a probability, 0 or more and below 1; got {rate!r}")
        known = {kind for some in POSSIBLE.values() for kind in some}
        if kinds is not None and not set(kinds) <= known:
            raise OptionError(f"Faults: kinds must be some of {', '.join(sorted(known))}; got {kinds!r}")
        faults = cls()
        faults.seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        source = random.Random(faults.seed)

        def draw(call: Call) -> Fault | None:
            if source.random() >= rate:
                return None
            possible: list[Kind] = [kind for kind in POSSIBLE[call] if kinds is None or kind in kinds]
            if not possible:
                return None
            kind, after = source.choice(possible), source.random() < 0.5
            return Fault(kind, source.uniform(0, seconds), after and kind in _WITH_AFTER)

        faults._draw = draw
        log.warning("faults are drawn with seed %d; Faults.random(%d) repeats them", faults.seed, faults.seed)
        return faults

    def stop(self) -> None:
        """From now on nothing goes wrong."""
        self._script.clear()
        self._draw = _nothing

    def next(self, call: Call) -> Fault | None:
        """What goes wrong at this call; None when it goes well. Each asking counts as one call."""
        planned = self._script.get(call)
        fault = planned.pop(0) if planned else self._draw(call)
        if fault is not None:
            self.happened.append((call, fault))
            log.info("fault at %s: %s", call, fault)
        return fault


class FaultyTransport(TransportWrapper):
    """A transport between which and the app things go wrong. `running(app, faults=...)` makes one by itself.

    `crash` is awaited for a crash; without it a crash is a call that raises Unsupported. A lost lease needs a broker in
    memory.
    """

    def __init__(
        self, wrapped: Transport, faults: Faults, *, crash: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        super().__init__(wrapped)
        self.faults = faults
        self._crash = crash

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        fault = self.faults.next("publish")
        try:
            await self.before(fault)
            await self.wrapped.publish(messages)
            await self.after(fault)
        except ConnectionError as error:
            raise PublishError.unconfirmed(messages, len(messages), error) from error

    async def subscribe(self, subscription: Subscription) -> Source:
        await self.before(self.faults.next("subscribe"))
        return FaultySource(await self.wrapped.subscribe(subscription), self, subscription.group)

    async def before(self, fault: Fault | None, source: Source | None = None) -> None:
        """What goes wrong before a call has reached the broker."""
        if fault is None:
            return
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        elif fault.kind == "lose_lease" and source is not None:
            end_leases(self.wrapped, source, died=False)
        elif not fault.after:
            await self._end(fault, "before the broker had the call")

    async def after(self, fault: Fault | None) -> None:
        """What goes wrong after the broker has done what was asked."""
        if fault is not None and fault.after:
            await self._end(fault, "after the broker had done what was asked")

    async def _end(self, fault: Fault, when: str) -> None:
        if fault.kind == "disconnect":
            raise ConnectionError(f"fault: disconnected {when}")
        if fault.kind == "crash":
            if self._crash is None:
                raise Unsupported("a crash needs somebody who starts the app anew: running(app, faults=...)")
            await self._crash()


class FaultySource(SourceWrapper):
    """A source between which and the pipeline things go wrong."""

    def __init__(self, wrapped: Source, transport: FaultyTransport, group: str) -> None:
        super().__init__(wrapped)
        self.settles_at_once = False  # a settle may be delayed
        self._transport = transport
        self._group = group
        self._stopped = asyncio.Event()

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        while True:
            fault = self._transport.faults.next("receive")
            if fault is not None and fault.kind == "delay":
                await self._wait(fault.seconds)
            else:
                await self._transport.before(fault, self.wrapped)
            messages = await self.wrapped.receive(demand)
            await self._transport.after(fault)
            if fault is not None and fault.kind == "duplicate":
                await innermost(self._transport).publish([_copy(message, self._group) for message in messages])
            if fault is None or fault.kind != "drop" or not messages:
                return messages
            back = [Settlement(one, "release", fault.seconds, counted=False) for one in messages]
            await self.wrapped.settle((), back)

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        fault = self._transport.faults.next("settle")
        await self._transport.before(fault, self.wrapped)
        refused = await self.wrapped.settle(acks, others)
        await self._transport.after(fault)
        return refused

    async def suspect(self, message: Message[Any]) -> bool:
        fault = self._transport.faults.next("suspect")
        await self._transport.before(fault, self.wrapped)
        ours = await self.wrapped.suspect(message)
        await self._transport.after(fault)
        return ours

    def stop(self) -> None:
        self._stopped.set()
        self.wrapped.stop()

    async def _wait(self, seconds: float) -> None:
        """Wait, but no longer than until the stop: a receive has to return promptly then."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return


def _copy(message: Message[Any], group: str) -> Outgoing:
    return Outgoing(
        message.topic, message.body, message.key, message.headers, message.id, message.timestamp, group=group
    )


def _nothing(call: Call) -> Fault | None:
    return None
