"""The gates of one pipeline, and what pipelines of this process that share a gate have asked for through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

from ..gate import Gate

PATIENCE = 0.25  # seconds that a receive may keep from others what it was allowed, while nothing comes
MAX_PATIENCE = 2.0  # to which they double while nothing comes to anyone: a broker may be slow to answer


class SharedGate:
    """One gate for all pipelines of the process that have it.

    A gate's answer takes nothing, so two pipelines that ask before either has received would be told the same. What one
    has asked for and not received yet is therefore set aside here, for every kind of gate.

    A receive may wait for hours, and with it what was set aside. So when others wait at the gate, a receive that has
    brought nothing for `patience` seconds is taken back, and its pipeline asks for a single message until one comes.
    Those who wait share what is free.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.asks: dict[Gates, tuple[int, float]] = {}  # what their receives wait for, and since when
        self.asked = 0  # the sum of them
        self.waiting: set[Gates] = set()
        self.patience = PATIENCE

    def allow(self, who: Gates, now: float, wanted: int) -> int:
        """How many of `wanted` this pipeline may ask for now; none when it is below 1."""
        if not self.waiting:
            return self.gate.allow(now, self.asked + wanted) - self.asked
        others = len(self.waiting) - (who in self.waiting)
        free = self.gate.allow(now, self.asked + wanted * (others + 1)) - self.asked
        return min(free, wanted, max(1, free // (others + 1)))

    def is_open(self, who: Gates, now: float) -> bool:
        """Whether the gate still allows what was asked for, and one message more when this pipeline asks for none."""
        wanted = self.asked + (who not in self.asks)
        return self.gate.allow(now, wanted) >= wanted

    def ask(self, who: Gates, now: float, count: int) -> None:
        """Set aside what a receive is about to wait for."""
        self.asks[who] = (count, now)
        self.asked += count

    def answered(self, who: Gates, now: float, count: int) -> None:
        """That receive brought `count`; the rest is free again."""
        asked, _ = self.asks.pop(who)
        self.asked -= asked
        if count:
            self.gate.took(now, count)
            self.patience = PATIENCE
        if count < asked and self.waiting:
            for other in sorted(self.waiting, key=_waits_since):
                other.poke()

    def wait(self, who: Gates, now: float) -> float | None:
        """This pipeline may ask for nothing; returns when it should look again, None: when it is poked."""
        self.waiting.add(who)
        more = self.gate.opens_at(now)
        if self.gate.allow(now, 1) < 1:
            return more
        for other, (_, since) in list(self.asks.items()):
            if now >= since + self.patience:
                other.idle = True
                other.take_back()
                self.patience = min(MAX_PATIENCE, self.patience * 2)
        later = max(now + PATIENCE, min((since + self.patience for _, since in self.asks.values()), default=now))
        return later if more is None else min(later, more)


_shared: WeakValueDictionary[int, SharedGate] = WeakValueDictionary()  # by the gate's id, which lives as long


def _share(gate: Gate) -> SharedGate:
    shared = _shared.get(id(gate))
    if shared is None:
        shared = _shared[id(gate)] = SharedGate(gate)
    return shared


class Gates:
    """The gates of one pipeline as one. `poke` says that it may look again, `take_back` that its receive must end."""

    def __init__(self, gates: Sequence[Gate], poke: Callable[[], Any], take_back: Callable[[], Any]) -> None:
        self.poke = poke
        self.take_back = take_back
        self.idle = False  # a receive was taken back for others, and none has brought anything since
        self.contended = False  # others waited at a gate when the last receive ended
        self.waits_since: float | None = None
        self._gates = [_share(gate) for gate in gates]

    def allow(self, now: float, wanted: int) -> int:
        """How many of `wanted` messages may be asked for now."""
        if self.idle:
            wanted = min(wanted, 1)
        for gate in self._gates:
            wanted = gate.allow(self, now, wanted)
            if wanted <= 0:
                return 0
        return wanted

    def is_open(self, now: float) -> bool:
        """Whether all gates allow what was asked for, or else a message."""
        return all(gate.is_open(self, now) for gate in self._gates)

    def shut_by(self, now: float) -> str:
        """Which gates are not open, as text; "" when all are."""
        return ", ".join(_name(one.gate) for one in self._gates if not one.is_open(self, now))

    def ask(self, now: float, count: int) -> None:
        """A receive is about to wait for `count`, which `allow` allows."""
        self.waits_since = None
        for gate in self._gates:
            gate.ask(self, now, count)

    def answered(self, now: float, count: int) -> None:
        """It brought `count`."""
        if count:
            self.idle = False
        self.contended = False
        for gate in self._gates:
            gate.answered(self, now, count)
            if gate.waiting:
                self.contended = True

    def wait(self, now: float) -> float | None:
        """Wait at those gates that allow nothing; returns when to look again at the latest, None: when poked."""
        shut = [gate for gate in self._gates if gate.allow(self, now, 1) <= 0]
        if not shut:
            return now  # one has opened meanwhile
        if self.waits_since is None:
            self.waits_since = now
        times = [gate.wait(self, now) for gate in shut]
        return min((at for at in times if at is not None), default=None)

    def wait_no_more(self) -> None:
        """It looks again."""
        for gate in self._gates:
            gate.waiting.discard(self)


def _name(gate: Gate) -> str:
    return str(gate) if type(gate).__str__ is not object.__str__ else type(gate).__name__


def _waits_since(gates: Gates) -> float:
    return gates.waits_since or 0.0
