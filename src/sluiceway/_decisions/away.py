"""Order by key over a broker that keeps none: which messages of a key are away, and what must wait behind them."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

TokenT = TypeVar("TokenT", bound=Hashable)

SOON = 1.0  # seconds: what comes by itself so soon is not called, or it might come twice


class _Away(NamedTuple, Generic[TokenT]):
    due: float
    """When it comes by itself."""
    token: TokenT | None = None
    """How to call it before that; None: it cannot be, or was."""
    behind: TokenT | None = None
    """The last one before it that was held when it was parked: it waits for that one too."""


class _Lane(Generic[TokenT]):
    __slots__ = ("away", "held", "order")

    def __init__(self) -> None:
        self.held: dict[int, TokenT] = {}
        self.away: dict[int, _Away[TokenT]] = {}
        self.order: list[int] = []  # a heap of the places in `away`, and perhaps of some that have left it

    def first(self) -> int | None:
        """The first place that is away."""
        while self.order and self.order[0] not in self.away:
            heappop(self.order)
        return self.order[0] if self.order else None


class Away(Generic[TokenT]):
    """What one source knows of the messages of its keys.

    A message has a *place* in its key, a number, which it keeps when it goes back. A delivery of it has a *token*. It
    is *held* from when it came until it is settled, and *away* after it went back. What comes while an earlier place
    of its key is away must be parked: it is away then too, and is called when nothing is in its way any more.

    Times are of any clock that only goes forward. A token that is not known, or not any more, is passed over.
    """

    def __init__(self, most: int = 100) -> None:
        """`most`: how many messages of one key are called at once; the next ones are when these have come."""
        self.parked = 0
        """How many messages are parked and not called."""
        self._most = most
        self._lanes: dict[Hashable, _Lane[TokenT]] = {}
        self._where: dict[TokenT, tuple[Hashable, int]] = {}
        self._moved: set[Hashable] = set()  # keys where something may be in nobody's way any more

    def comes(self, key: Hashable, place: int, token: TokenT) -> bool:
        """A message has come: whether it may be handed out. If not, park it."""
        lane = self._lane(key)
        self._where[token] = (key, place)
        first = lane.first()
        if first is not None and first < place:
            if place in lane.away:
                self._put(lane, place, _Away(lane.away[place].due))  # until it is parked again
            return False
        if first == place:
            self._take(lane, place)
            self._moved.add(key)
        lane.held[place] = token
        return True

    def ends(self, token: TokenT) -> None:
        """It is settled for good, and with it whatever else there was of it: what came twice, when its lease was over
        on the way, may be in hand once more or have gone back."""
        key, place = self._where.get(token, (None, 0))
        self._leaves(token)
        lane = self._lanes.get(key)
        if lane is not None:
            twin = lane.held.pop(place, None)
            if twin is not None:
                del self._where[twin]
            self._take(lane, place)
            self._moved.add(key)

    def goes(self, token: TokenT, due: float) -> None:
        """It went back, and comes again at `due`."""
        self._leaves(token, _Away(due))

    def parks(self, token: TokenT, due: float, *, behind_held: bool) -> None:
        """It is parked until `due`, unless it is called before. `behind_held`: it also waits until those are settled
        that are held now and come before it; otherwise only for those that are away."""
        if token in self._where:
            key, place = self._where[token]
            held = self._lane(key).held
            last = max((other for other in held if other < place), default=None) if behind_held else None
            self._leaves(token, _Away(due, token, held[last] if last is not None else None))

    def expect(self, key: Hashable, place: int, due: float) -> None:
        """One that this source did not send back is away, and comes again at `due`."""
        lane = self._lane(key)
        if place not in lane.held:
            self._put(lane, place, _Away(due))

    def forgets(self, key: Hashable, place: int) -> None:
        """It does not come any more."""
        lane = self._lanes.get(key)
        if lane is not None:
            self._take(lane, place)
            self._moved.add(key)

    def next_due(self, token: TokenT, otherwise: float) -> float:
        """When the first one that is away comes of the key of a message that is about to be parked."""
        key, _ = self._where.get(token, (None, 0))
        return self.first_due(key, otherwise)

    def first_due(self, key: Hashable, otherwise: float) -> float:
        """When the first one that is away comes of a key."""
        lane = self._lanes.get(key)
        first = lane.first() if lane is not None else None
        return max(otherwise, lane.away[first].due) if lane is not None and first is not None else otherwise

    def calls(self, now: float) -> list[TokenT]:
        """The parked messages that may come now, in the order in which to call them. They are not parked any more."""
        called: list[TokenT] = []
        moved, self._moved = self._moved, set()
        for key in moved:
            lane = self._lanes.get(key)
            if lane is not None:
                called += self._call(lane, now)
                if not (lane.held or lane.away):
                    del self._lanes[key]
        return called

    def _call(self, lane: _Lane[TokenT], now: float) -> list[TokenT]:
        first = lane.first()
        if first is None or lane.away[first].token is None:
            return []
        called: list[TokenT] = []
        held = set(lane.held.values())
        for place in sorted(lane.away):
            away = lane.away[place]
            if away.token is None or away.behind in held or len(called) >= self._most:
                break
            soon = away.due - now <= SOON
            if not soon:
                called.append(away.token)
            self._put(lane, place, _Away(away.due if soon else now))
        return called

    def all_parked(self) -> list[TokenT]:
        """The tokens of all that are parked, in the order of their keys."""
        found = []
        for lane in self._lanes.values():
            found += [lane.away[place].token for place in sorted(lane.away) if lane.away[place].token is not None]
        return [token for token in found if token is not None]

    def overdue(self, before: float) -> list[tuple[Hashable, int]]:
        """Those that should have come before a time."""
        return [
            (key, place) for key, lane in self._lanes.items() for place, away in lane.away.items() if away.due < before
        ]

    def dues(self) -> list[tuple[int, float]]:
        """The place of each that is away, and when it comes by itself."""
        return [(place, away.due) for lane in self._lanes.values() for place, away in lane.away.items()]

    def coming(self, before: float) -> int:
        """How many come before a time, without those that are parked."""
        return sum(
            away.token is None and away.due < before for lane in self._lanes.values() for away in lane.away.values()
        )

    def clear(self) -> None:
        """Forget all: what comes from now on comes in order."""
        self._lanes.clear()
        self._where.clear()
        self._moved.clear()
        self.parked = 0

    def _lane(self, key: Hashable) -> _Lane[TokenT]:
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
            self._moved.add(key)  # an empty one goes with the next call
        return lane

    def _leaves(self, token: TokenT, away: _Away[TokenT] | None = None) -> None:
        where = self._where.pop(token, None)
        if where is None:
            return
        key, place = where
        lane = self._lane(key)
        if lane.held.get(place) == token:
            del lane.held[place]
        elif place in lane.held:
            return  # it came again meanwhile
        if away is not None:
            self._put(lane, place, away)
        self._moved.add(key)

    def _put(self, lane: _Lane[TokenT], place: int, away: _Away[TokenT]) -> None:
        was = lane.away.get(place)
        if was is None:
            heappush(lane.order, place)
        self.parked += (away.token is not None) - (was is not None and was.token is not None)
        lane.away[place] = away

    def _take(self, lane: _Lane[TokenT], place: int) -> None:
        was = lane.away.pop(place, None)
        if was is not None and was.token is not None:
            self.parked -= 1
