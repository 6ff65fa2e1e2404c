"""Taking events from an iterator by demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from ..message import Outgoing

Publish = Callable[[Sequence[Outgoing]], Awaitable[None]]


class Pump:
    """Draws from an iterator as many events as are asked for.

    An async iterator is drawn in a task of its own, which no `take` that is cancelled cancels: a generator that is
    cancelled is at its end. So it may be one event ahead of what was asked for.
    """

    def __init__(self, events: AsyncIterable[Any] | Iterable[Any]) -> None:
        self._plain: Iterator[Any] | None = iter(events) if isinstance(events, Iterable) else None
        self._events = events
        self._drawn: list[Any] = []
        self._wanted = 0
        self._drawing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._asked = asyncio.Event()

    async def take(self, demand: int) -> list[Any] | None:
        """Up to `demand` events, at least one; None at the end. Raises what the iterator raises, each time."""
        if self._plain is not None:
            return list(islice(self._plain, demand)) or None
        if self._drawing is None:
            self._drawing = asyncio.create_task(self._draw())
        while not self._drawn:
            if self._drawing.done():
                self._drawing.result()
                return None
            self._wanted = max(self._wanted, demand)
            self._asked.set()
            self._changed.clear()
            await self._changed.wait()
        self._wanted = 0
        events, self._drawn = self._drawn[:demand], self._drawn[demand:]
        return events

    async def _draw(self) -> None:
        try:
            assert isinstance(self._events, AsyncIterable)
            async for event in self._events:
                self._drawn.append(event)
                self._changed.set()
                while len(self._drawn) >= self._wanted:
                    self._asked.clear()
                    await self._asked.wait()
        finally:
            self._changed.set()
