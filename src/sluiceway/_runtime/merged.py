"""Several sources of one pipeline as one source."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal

from .._decisions.backoff import reconnect_delay
from ..errors import OptionError
from ..message import Message, Refused, Settlement
from ..source import Backlog, Renewer, Source, SourceStatus
from .chance import draw
from .owners import Opened, Owners
from .spec import PipelineSpec

log = logging.getLogger("sluiceway")

GRACE = 0.002  # seconds that the other sources have to answer, once one has, before their demand is taken back
PROMPT = 1.0  # seconds after which a source whose demand was taken back is waited for no more
TURN = 0.05  # seconds after which a demand too small for all sources goes to others; it doubles up to a second

_State = Literal["connecting", "running", "paused", "blocked", "stopped"]
_BEST_FIRST: tuple[_State, ...] = ("running", "blocked", "connecting", "stopped")


class _Place:
    """One of the places for a source: what is open there, and what it was asked for."""

    def __init__(self, index: int, opened: Opened) -> None:
        self.index = index
        self.opened: Opened | None = opened
        self.call: asyncio.Task[Sequence[Message[Any]]] | None = None
        self.asked = 0  # the demand of the call
        self.withdrawn = False  # its source has a window of 0 since we took the demand back
        self.tries = 0  # reopenings since it last had a message
        self.error: str | None = None  # why it is not open
        self.reopening: asyncio.Task[None] | None = None


class MergedSource:
    """Several sources as one.

    The demand is split among them, one `receive` at a time in each. When one answers, the demand of those that have
    not is taken back before `receive` returns: so nothing arrives that nobody waits for, and a window, a gate or a
    quarantine that shrinks what may be held finds nothing on its way.

    A source whose `receive` raises is opened again alone, with capped backoff, while the others go on. What it had
    given is still settled through it; it is closed when the last of that is settled, and what cannot be settled any
    more comes again. When no source is left open, `receive` raises what the last one raised.

    What one source cannot settle, since that raises or does not answer, is `Later`: the runtime settles it again, and
    what the others gave does not wait for that.
    """

    def __init__(
        self, spec: PipelineSpec, sources: Sequence[Source], open_one: Callable[[int], Awaitable[Source]]
    ) -> None:
        self.name = spec.name
        self.settles_at_once = all(getattr(one, "settles_at_once", False) for one in sources)
        self._owners = Owners(at_once=self.settles_at_once, settled=self._close_if_settled)
        self.lease = min((one.lease for one in sources if one.lease is not None), default=None)
        self.renewer: Callable[[], Renewer] | None = None
        if any(one.renewer is not None for one in sources):
            self.renewer = self._owners.renewer
        self.returns_failed = any(getattr(one, "returns_failed", False) for one in sources)
        if any(hasattr(one, "prepare_for_draining") for one in sources):
            self.prepare_for_draining = self._prepare_for_draining
        self._open_one = open_one
        self._window = spec.ceiling
        self._places = [_Place(index, Opened(source)) for index, source in enumerate(sources)]
        self._retired: set[Opened] = set()
        self._left: list[Message[Any]] = []  # of a source that was not prompt: more than the next demand
        self._first = 0  # the place that is asked first
        self._broken: BaseException | None = None
        self._since = time.time()
        self._stopped = self._closed = False
        self._wake = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    # -- receiving -----------------------------------------------------------------------------------------------

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        turns = 0
        while not (self._stopped or self._left or self._window == 0):
            if self._broken is not None:
                raise self._broken
            self._wake.clear()
            all_asked = self._ask(demand)
            until = asyncio.get_running_loop().time() + GRACE
            try:
                async with asyncio.timeout(None if all_asked else min(1.0, TURN * 2**turns)):
                    await self._wake.wait()
            except TimeoutError:
                turns = min(turns + 1, 10)
            await self._withdraw(until)
        if self._stopped and not self._left:
            return await self._receive_last(demand)
        messages, self._left = self._left[:demand], self._left[demand:]
        return messages

    def _ask(self, demand: int) -> bool:
        """Split the demand among the sources that no call waits in; returns whether there was some for each."""
        free = demand - sum(place.asked for place in self._places)
        places = self._places[self._first :] + self._places[: self._first]
        idle = [place for place in places if place.opened is not None and place.call is None]
        for number, place in enumerate(idle):
            share = (free + len(idle) - 1 - number) // len(idle)
            if share > 0 and place.opened is not None:
                self._call(place, place.opened.source, share)
        asked = min(max(free, 0), len(idle))
        self._first = (self._first + asked) % len(self._places)
        return asked == len(idle)

    def _call(self, place: _Place, source: Source, share: int) -> None:
        if place.withdrawn:
            place.withdrawn = False
            source.resize(self._window)
        place.asked = share
        place.call = asyncio.create_task(_receive(source, share), name=f"{self.name}: source {place.index + 1}")
        place.call.add_done_callback(lambda _: self._wake.set())

    async def _withdraw(self, until: float) -> None:
        """Take back what was asked for and has not come, and collect what has."""
        calls = [place.call for place in self._places if place.call is not None]
        grace = until - asyncio.get_running_loop().time()
        if calls and grace > 0 and not self._stopped and self._window and any(call.done() for call in calls):
            await asyncio.wait(calls, timeout=grace)
        slow = {place.call for place in self._places if place.withdrawn}  # waited for before
        for place in self._places:
            if place.opened is None or place.call is None or place.call.done() or place.withdrawn or self._stopped:
                continue
            place.withdrawn = True
            place.opened.source.resize(0)
        calls = [call for call in calls if call not in slow]
        if calls:
            await asyncio.wait(calls, timeout=PROMPT)
        for place in self._places:
            if place.call is not None and place.call.done():
                self._collect(place, place.call)

    def _collect(self, place: _Place, call: asyncio.Task[Sequence[Message[Any]]]) -> None:
        place.call, place.asked = None, 0
        if place.opened is None:
            return
        error = RuntimeError("something that it awaited was cancelled") if call.cancelled() else call.exception()
        if error is not None:
            self._failed(place, place.opened, error)
        elif messages := call.result():
            place.tries = 0
            self._left += self._owners.own(place.opened, messages)

    async def _receive_last(self, demand: int) -> Sequence[Message[Any]]:
        """After a stop: what sources with `prepare_for_draining` still have."""
        for place in self._places:
            if place.call is None and place.opened is not None and hasattr(place.opened.source, "prepare_for_draining"):
                opened = place.opened
                try:
                    messages = await opened.source.receive(demand)
                except Exception as error:  # the others may have some still
                    self._failed(place, opened, error)
                    continue
                if messages:
                    return self._owners.own(opened, messages)
        return []

    # -- a source that fails -------------------------------------------------------------------------------------

    def _failed(self, place: _Place, opened: Opened, error: BaseException) -> None:
        """Open a source again, and keep the failed one for what it has given."""
        place.opened = None
        opened.retired = True
        opened.source.stop()
        self._retired.add(opened)
        self._close_if_settled(opened)
        place.error = f"source {place.index + 1} of {len(self._places)}: {type(error).__name__}: {error}"
        if self._stopped:
            log.warning("%s: receiving failed in the drain: %s", self.name, place.error)
        elif not self._open():
            self._broken = error
        else:
            place.reopening = asyncio.ensure_future(self._reopen(place, error))

    async def _reopen(self, place: _Place, error: BaseException) -> None:
        while True:
            delay = reconnect_delay(place.tries, draw())
            place.tries += 1
            log.error("%s: %s; it is opened again in %.2f s", self.name, place.error, delay, exc_info=error)
            await asyncio.sleep(delay)
            try:
                source = await self._open_one(place.index)
            except OptionError as wrong:  # nothing that time would mend
                self._broken = wrong
                break
            except Exception as again:
                error = again
                place.error = f"source {place.index + 1} of {len(self._places)}: {type(error).__name__}: {error}"
                continue
            if self._stopped:
                await source.aclose()
            else:
                place.opened, place.error = Opened(source), None
                place.withdrawn = True  # its window is told with its first call
            break
        self._wake.set()

    def _close_if_settled(self, opened: Opened) -> None:
        if opened.retired and opened in self._retired and not self._owners.has(opened):
            self._retired.discard(opened)
            self._in_background(self._close(opened, ()))

    async def _close(self, opened: Opened, keep: Sequence[Message[Any]]) -> None:
        try:
            await opened.source.aclose(keep=keep)
        except Exception:
            log.exception("%s: closing a source failed; the broker hands out again what it held", self.name)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- settling ------------------------------------------------------------------------------------------------

    def keep(self, on_thread: Callable[[Message[Any]], bool]) -> None:
        """`on_thread` says whether a thread runs a message: a source that is closed while others go on keeps it."""
        self._owners.on_thread = on_thread

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        return await self._owners.settle(acks, others)

    async def suspect(self, message: Message[Any]) -> bool:
        return await self._owners.suspect(message)

    async def flush(self) -> None:
        await asyncio.gather(*(opened.source.flush() for opened in self._open()))
        await asyncio.gather(*(opened.source.flush() for opened in self._retired), return_exceptions=True)

    # -- control -------------------------------------------------------------------------------------------------

    def resize(self, window: int) -> None:
        self._window = window
        for place in self._places:
            if place.opened is not None:
                place.withdrawn = window == 0
                place.opened.source.resize(window)
        self._wake.set()

    def stop(self) -> None:
        self._stopped = True
        for opened in self._open():
            opened.source.stop()
        for place in self._places:
            if place.reopening is not None:
                place.reopening.cancel()
        self._wake.set()

    async def _prepare_for_draining(self) -> None:
        hooks = [getattr(opened.source, "prepare_for_draining", None) for opened in self._open()]
        results = await asyncio.gather(*(hook() for hook in hooks if hook is not None), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                log.error("%s: prepare_for_draining raised; the drain goes on", self.name, exc_info=result)

    def status(self) -> SourceStatus:
        """Running as long as one source is; `error` is that of the first that has one."""
        each = [opened.source.status() for opened in self._open()]
        held = [one.held_by_broker for one in each if one.held_by_broker is not None]
        errors = [place.error for place in self._places] + [one.error for one in each]
        return SourceStatus(
            state=self._state({"running" if one.state == "paused" else one.state for one in each}),
            since=max([self._since, *(one.since for one in each)]),
            error=next(filter(None, errors), None),
            scopes=frozenset().union(*(one.scopes for one in each)),
            held_by_broker=sum(held) if each and len(held) == len(each) else None,
        )

    def _state(self, states: set[_State]) -> _State:
        if self._stopped:
            return "stopped"
        if self._window == 0:
            return "paused"
        best: list[_State] = [one for one in _BEST_FIRST if one in states]
        return best[0] if best else "connecting"

    async def backlog(self) -> Backlog | None:
        """The largest that a source tells of: sources of one queue all tell of the same."""
        each = await asyncio.gather(*(opened.source.backlog() for opened in self._open()))
        return max((one for one in each if one is not None), key=lambda one: one.messages, default=None)

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        if self._closed:
            return
        self._closed = True
        self.stop()
        tasks: list[asyncio.Task[Any]] = [
            task for place in self._places for task in (place.call, place.reopening) if task is not None
        ]
        tasks += [call for opened in (*self._open(), *self._retired) for call in opened.settling.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=PROMPT)
        closing = [
            self._close(opened, [message for message in keep if self._owners.of.get(message) is opened])
            for opened in (*self._open(), *self._retired)
        ]
        await asyncio.gather(*closing, *self._background)
        self._owners.of.clear()

    def _open(self) -> list[Opened]:
        return [place.opened for place in self._places if place.opened is not None]


async def _receive(source: Source, demand: int) -> Sequence[Message[Any]]:
    return await source.receive(demand)
