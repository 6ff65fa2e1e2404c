"""One source of a feed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .._decisions.backoff import reconnect_delay
from .._decisions.policy import unusable
from ..codec import encode
from ..errors import OptionError, PublishError, SluicewayError, Unsupported
from ..message import Message, Refused, Settlement, new_id
from ..source import Backlog, Renewer, SourceInfo, SourceStatus
from ._ledger import Entry, Ledger

if TYPE_CHECKING:
    from . import Feed

log = logging.getLogger("sluiceway.sources")

CLOSE_TIMEOUT = 2.0  # seconds that a fetch has to end once it is cancelled


class FeedSource:
    """Hands out what is in the ledger, and fetches when there is nothing. It never holds more than was asked for."""

    lease: float | None = None
    renewer: Callable[[], Renewer] | None = None
    returns_failed = True

    def __init__(self, feed: Feed, ledger: Ledger) -> None:
        self._feed = feed
        self._ledger = ledger
        self._name = type(feed).__name__
        self._held: dict[Message[Any], Entry] = {}
        self._last: list[Entry] = []  # what the feed put out because of a drain
        self._fetching: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._error: str | None = None
        self._since = time.time()
        self._paused = self._stopped = self._closed = False
        self.settles_at_once = not feed.overrides("ended")  # then an ack waits for nothing
        if feed.overrides("prepare_for_draining"):
            self.prepare_for_draining = self._prepare_for_draining
        ledger.listeners.add(self._wake.set)

    # -- start and drain -----------------------------------------------------------------------------------------

    async def prepare_for_start(self, info: SourceInfo) -> None:
        if not self._feed.publishes and info.options.get("exhausted") != "drop":
            raise OptionError(
                f"{info.pipeline}: {self._name} has nowhere to put dead letters: override its publish(), or lose what "
                'fails for good with exhausted="drop"'
            )
        self._ledger.ordered = info.options.get("order_by") is not None
        await self._feed.prepare_for_start(info)

    async def _prepare_for_draining(self) -> None:
        self._last = [self._entry(event) for event in await self._feed.prepare_for_draining()]
        self._ledger.place(self._last)
        self._ledger.hold(self, self._last)

    # -- receiving -----------------------------------------------------------------------------------------------

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        while not (self._stopped or self._paused):
            self._wake.clear()
            entries = self._ledger.take(self, demand)
            if entries:
                return [self._deliver(entry) for entry in entries]
            self._fetch(demand)
            await self._wake.wait()
        if self._paused:
            return []
        entries, self._last = self._last[:demand], self._last[demand:]
        return [self._deliver(entry) for entry in entries]

    def _fetch(self, demand: int) -> None:
        if self._fetching is not None:
            if not self._fetching.done():
                return
            fetched, self._fetching = self._fetching, None
            fetched.result()  # raises what the feed raised
        if not self._ledger.at_end and self._ledger.waiting < self._feed.max_waiting:
            self._fetching = asyncio.create_task(self._fetch_some(demand), name=f"{self._name}: fetch")
            self._fetching.add_done_callback(lambda _: self._wake.set())

    async def _fetch_some(self, demand: int) -> None:
        tries = 0
        while True:
            try:
                events = await _fetched(self._name, self._feed.fetch(demand))
            except self._feed.transient as error:
                delay = reconnect_delay(tries, random.random())
                tries += 1
                self._set_error(f"{type(error).__name__}: {error}")
                log.warning("%s: fetch failed: %s; trying again in %.2f s", self._name, self._error, delay)
                await asyncio.sleep(delay)
                continue
            self._set_error(None)
            if events is None:
                self._ledger.at_end = True
                self._ledger.changed()
            elif events:
                self._ledger.add([self._entry(event) for event in events])
            else:
                await asyncio.sleep(self._feed.poll_interval)
            return

    def _set_error(self, error: str | None) -> None:
        if (error is None) != (self._error is None):
            self._since = time.time()
        self._error = error

    def _entry(self, event: Any) -> Entry:
        """A new event. One that cannot be made a message fails when it is handled, it alone."""
        try:
            message: Any = self._feed.message(event)
            if not isinstance(message, Message):
                raise TypeError(f"{self._name}.message must return a Message, got {type(message).__name__}")
            return Entry(event, message, None)
        except Exception as error:
            made = Message[Any](self._feed.topic, _body(event), new_id())
            return Entry(event, made, unusable(f"{self._name}.message", error))

    def _deliver(self, entry: Entry) -> Message[Any]:
        made, entry.published = entry.message, False
        message: Message[Any] = Message(
            made.topic, made.body, made.id, made.key, made.headers, made.timestamp,
            token=entry.event if made.token is None else made.token,
            deliveries=1 + entry.failures, failures=entry.failures, error=entry.error,
        )  # fmt: skip
        self._held[message] = entry
        return message

    # -- settling ------------------------------------------------------------------------------------------------

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        await self._end([message for message in acks if message in self._held])
        refused = []
        failed: Exception | None = None
        for one in others:
            try:
                if one.message in self._held:
                    await self._settle(one)
            except (PublishError, Unsupported) as error:
                refused.append(Refused(one.message, "rejected", str(error)))
            except Exception as error:  # the others are settled nevertheless; the runtime calls again for this one
                failed = error
        if failed is not None:
            raise failed
        return refused

    async def _settle(self, one: Settlement) -> None:
        entry = self._held[one.message]
        if one.outputs and not entry.published:
            await self._feed.publish(one.outputs)
            entry.published = True  # if `ended` raises now, that alone is done again
        if one.outcome in ("ack", "dead_letter"):
            await self._end((one.message,))
            return
        stays = True
        if one.outcome == "retry":
            stays = await self._feed.retried(one.message, one.delay)
            entry.failures += one.counted
        elif one.outcome == "release":
            stays = await self._feed.released(one.message, one.delay)
        if self._held.pop(one.message, None) is None:
            return  # closed meanwhile, and given back
        if not stays:
            self._ledger.end((entry,))
        elif one.outcome == "park":
            self._ledger.park(entry)
        else:
            self._ledger.back(entry, one.delay)

    async def _end(self, messages: Sequence[Message[Any]]) -> None:
        if messages:
            await self._feed.ended(messages)
            self._ledger.end([self._held.pop(message) for message in messages if message in self._held])

    async def suspect(self, message: Message[Any]) -> bool:
        """Never asked for: what the process has in hand when it dies is forgotten with it."""
        return message in self._held

    async def flush(self) -> None:
        """Nothing to wait for: a settle is done when it returns."""

    # -- control -------------------------------------------------------------------------------------------------

    def resize(self, window: int) -> None:
        if self._paused != (window == 0):
            self._since = time.time()
        self._paused = window == 0
        self._wake.set()

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._since = time.time()
        self._wake.set()

    def status(self) -> SourceStatus:
        if self._stopped or self._paused:
            state: Literal["stopped", "paused", "connecting", "running"] = "stopped" if self._stopped else "paused"
        else:
            state = "running" if self._error is None else "connecting"
        return SourceStatus(state=state, since=self._since, error=self._error, held_by_broker=len(self._held))

    async def backlog(self) -> Backlog | None:
        return await self._feed.backlog()

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._ledger.listeners.discard(self._wake.set)
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait((self._fetching,), timeout=CLOSE_TIMEOUT)
        kept = set(keep)
        for message, entry in self._held.items():
            if message not in kept:
                self._ledger.back(entry)
        for entry in self._last:
            self._ledger.back(entry)
        self._held.clear()
        self._last.clear()


def _body(event: Any) -> bytes:
    try:
        return encode(event)
    except SluicewayError:
        return repr(event).encode(errors="backslashreplace")


async def _fetched(name: str, fetching: Any) -> Sequence[Any] | None:
    """What `fetch` returns. Raises TypeError for what is no list of events: a text would be taken for many."""
    if not isinstance(fetching, Awaitable):
        raise TypeError(f"{name}.fetch must be an `async def`; it returned {type(fetching).__name__}")
    events = await fetching
    if events is None or (isinstance(events, Sequence) and not isinstance(events, (str, bytes, bytearray))):
        return events
    raise TypeError(
        f"{name}.fetch must return a list of events, or None at the end; it returned {type(events).__name__}"
    )
