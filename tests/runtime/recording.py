"""A scripted broker: a real implementation of the source's contract that records every call and checks it.

It redelivers what is retried, released, parked or left over at a close, as brokers do, and notes a violation when the
runtime asks for more than its window, settles a delivery twice, calls after the close or makes two calls at once.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from msgspec import Struct

from sluiceway import Pipeline
from sluiceway._decisions.suspicion import suspicions_now
from sluiceway.message import Message, Outgoing, Refused, Settlement
from sluiceway.source import Backlog, Renewer, SourceStatus

Outcome = Literal["ack", "retry", "dead_letter", "release", "park"]
SettleHook = Callable[[Sequence[Message[Any]], Sequence[Settlement]], Awaitable[Sequence[Refused] | None]]


class Entry(Struct, eq=False):
    """A message as the broker keeps it between deliveries."""

    id: str
    body: bytes
    place: int
    key: str | None = None
    failures: int = 0
    suspicions: int = 0
    deliveries: int = 1
    suspect: bool = False


class Ended(Struct, eq=False):
    """How one delivery ended."""

    id: str
    outcome: Outcome
    delay: float = 0.0
    counted: bool = True
    outputs: tuple[Outgoing, ...] = ()
    at: float = 0.0


class Broker:
    """What lives longer than a source: the messages, and the record of all that happened."""

    def __init__(self, *bodies: bytes | str, limit: int | None = None) -> None:
        self.waiting: list[Entry] = []  # by place
        self.parked: set[Entry] = set()
        self.delayed: set[Entry] = set()
        self.held: dict[Message[Any], Entry] = {}
        self.kept: list[str] = []  # ids that a close left as ours
        self.limit = limit
        self.window: Callable[[], int] | None = None
        self.lease: float | None = None
        self.renewer: Callable[[], Renewer] | None = None
        self.max_most = 0  # most ever held
        self.demands: list[int] = []
        self.ended: list[Ended] = []
        self.calls: list[tuple[int, int]] = []  # acks and others of each settle that did not raise
        self.sources: list[RecordingSource] = []
        self.suspected: list[str] = []
        self.violations: list[str] = []
        self.on_settle: SettleHook | None = None
        self.on_receive: Callable[[int], Awaitable[None]] | None = None
        self.on_suspect: Callable[[Message[Any]], Awaitable[bool]] | None = None
        self.on_open: Callable[[], Awaitable[None]] | None = None
        self.acks_in_flight = 0
        self.most_acks_in_flight = 0
        self.others_in_flight = 0
        self.most_others_in_flight = 0
        self.lost: set[str] = set()  # ids whose next settle is refused as lost
        self._changed: set[asyncio.Future[None]] = set()
        self._count = 0
        self.put(*bodies)

    # -- for tests -----------------------------------------------------------------------------------------------

    def put(self, *bodies: bytes | str, key: str | None = None, **fields: Any) -> list[str]:
        """Publish; returns the ids m1, m2, ..."""
        ids = []
        for body in bodies:
            self._count += 1
            data = body.encode() if isinstance(body, str) else body
            entry = Entry(f"m{self._count}", data, self._count, key, **fields)
            self.waiting.append(entry)
            ids.append(entry.id)
        self.changed()
        return ids

    async def open(self) -> RecordingSource:
        if self.on_open is not None:
            await self.on_open()
        source = RecordingSource(self)
        self.sources.append(source)
        self.changed()
        return source

    @property
    def source(self) -> RecordingSource:
        return self.sources[-1]

    async def until(self, true: Callable[[], object], seconds: float = 3600) -> None:
        """Return once `true()` holds, looked at after everything that the broker sees."""
        async with asyncio.timeout(seconds):
            while not true():
                future = asyncio.get_running_loop().create_future()
                self._changed.add(future)
                await future

    async def settled(self, count: int) -> None:
        """Return when so many messages have ended for good."""
        await self.until(lambda: len(self.done) >= count)

    def has_earlier(self, message: Message[Any]) -> bool:
        """Whether an earlier message of the same key is at the broker, in nobody's hand."""
        entry = self.held.get(message)
        return entry is not None and _behind(entry, (*self.waiting, *self.parked, *self.delayed))

    def outcomes(self, id: str) -> list[str]:
        return [one.outcome for one in self.ended if one.id == id]

    @property
    def done(self) -> list[str]:
        """The ids that were acked or dead-lettered, in that order."""
        return [one.id for one in self.ended if one.outcome in ("ack", "dead_letter")]

    @property
    def acked(self) -> list[str]:
        return [one.id for one in self.ended if one.outcome == "ack"]

    @property
    def dead(self) -> list[Ended]:
        return [one for one in self.ended if one.outcome == "dead_letter"]

    def check(self) -> None:
        """Nothing was done against the contract, and nothing ended twice."""
        assert not self.violations, self.violations
        assert len(set(self.done)) == len(self.done), "a message was settled twice"
        assert all(source.closed for source in self.sources), "a source was not closed"

    # -- what sources call ---------------------------------------------------------------------------------------

    def changed(self) -> None:
        waiting, self._changed = self._changed, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)
        for source in self.sources:
            source.wake()

    def violation(self, text: str) -> None:
        self.violations.append(text)

    def back(self, entry: Entry, *, delay: float = 0.0) -> None:
        if delay > 0:
            self.delayed.add(entry)
            asyncio.get_running_loop().call_later(delay, self._due, entry)
        else:
            insort(self.waiting, entry, key=_place)

    def take(self, demand: int) -> list[Entry]:
        """The earliest messages, but none of a key of which an earlier one waits for its retry or is parked."""
        self._unpark()
        away = [entry for entry in (*self.delayed, *self.parked) if entry.key is not None]
        if not away:
            taken, self.waiting = self.waiting[:demand], self.waiting[demand:]
            return taken
        taken = [one for one in self.waiting if not _behind(one, away)][:demand]
        chosen = set(map(_place, taken))
        self.waiting = [one for one in self.waiting if one.place not in chosen]
        return taken

    def _unpark(self) -> None:
        for entry in sorted(self.parked, key=_place):
            if not _behind(entry, (*self.delayed, *self.held.values())):
                self.parked.discard(entry)
                self.back(entry)

    def _due(self, entry: Entry) -> None:
        self.delayed.discard(entry)
        self.back(entry)
        self.changed()


class RecordingSource:
    """One subscription of a `Broker`."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.lease = broker.lease
        self.renewer = broker.renewer
        self.receiving = False
        self.paused = False
        self.stopped = False
        self.closed = False
        self.resized: list[int] = []
        self.flushed = 0
        self.keep: list[str] = []
        self.mine: set[Message[Any]] = set()
        self._waiter: asyncio.Future[None] | None = None

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        broker = self.broker
        self._check_open("receive")
        if self.receiving:
            broker.violation("two receives at once")
        if demand < 1:
            broker.violation(f"a demand of {demand}")
        held = len(self.mine)
        limits = [broker.limit] + ([broker.window()] if broker.window is not None else [])
        for limit in limits:
            if limit is not None and held + demand > limit:
                broker.violation(f"held {held} + demand {demand} > window {limit}")
        broker.demands.append(demand)
        self.receiving = True
        try:
            broker.changed()
            if broker.on_receive is not None:
                await broker.on_receive(demand)
            messages: list[Message[Any]] = []
            while not (messages or self.stopped or self.paused or self.closed):
                messages = [self._deliver(entry) for entry in broker.take(demand)]
                if not messages:
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
            broker.max_most = max(broker.max_most, len(self.mine))
            return messages
        finally:
            self.receiving = False

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        broker = self.broker
        self._check_open("settle")
        broker.acks_in_flight += bool(acks)
        broker.others_in_flight += bool(others)
        broker.most_acks_in_flight = max(broker.most_acks_in_flight, broker.acks_in_flight)
        broker.most_others_in_flight = max(broker.most_others_in_flight, broker.others_in_flight)
        try:
            refused = (await broker.on_settle(acks, others) if broker.on_settle is not None else None) or []
            no = {id(one.message): one for one in refused}
            result = list(refused)
            for message in acks:
                if id(message) not in no:
                    result += self._end(message, Settlement(message, "ack"))
            for one in others:
                if id(one.message) not in no:
                    result += self._end(one.message, one)
                elif no[id(one.message)].kind == "lost":
                    self._forget(one.message)
            broker.calls.append((len(acks), len(others)))
            return result
        finally:
            broker.acks_in_flight -= bool(acks)
            broker.others_in_flight -= bool(others)
            broker.changed()

    async def suspect(self, message: Message[Any]) -> bool:
        self._check_open("suspect")
        broker = self.broker
        if broker.on_suspect is not None and not await broker.on_suspect(message):
            self._forget(message)
            return False
        entry = broker.held[message]
        entry.suspicions = suspicions_now(entry.deliveries, entry.failures, entry.suspicions)
        entry.deliveries = 1 + entry.failures + entry.suspicions
        message.suspicions = entry.suspicions
        broker.suspected.append(message.id)
        return True

    async def flush(self) -> None:
        self._check_open("flush")
        self.flushed += 1

    def resize(self, window: int) -> None:
        self.resized.append(window)
        self.paused = window == 0
        self.wake()

    def stop(self) -> None:
        self.stopped = True
        self.broker.changed()

    def status(self) -> SourceStatus:
        state: Literal["stopped", "paused", "running"] = (
            "stopped" if self.stopped else "paused" if self.paused else "running"
        )
        return SourceStatus(state=state, since=0.0)

    async def backlog(self) -> Backlog | None:
        return Backlog(len(self.broker.waiting), 0.0)

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        self.closed = True
        kept = set(keep)
        self.keep = [message.id for message in keep]
        self.broker.kept += self.keep
        for message in list(self.mine):
            entry = self.broker.held.pop(message)
            self.mine.discard(message)
            if message not in kept:
                self.broker.back(entry)
        self.broker.changed()

    # -- helpers -------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _deliver(self, entry: Entry) -> Message[Any]:
        message: Message[Any] = Message(
            "source", entry.body, entry.id, entry.key, token=entry.id, deliveries=entry.deliveries,
            failures=entry.failures, suspicions=entry.suspicions, suspect=entry.suspect,
        )  # fmt: skip
        self.broker.held[message] = entry
        self.mine.add(message)
        return message

    def _forget(self, message: Message[Any]) -> None:
        self.mine.discard(message)
        self.broker.held.pop(message, None)

    def _end(self, message: Message[Any], one: Settlement) -> list[Refused]:
        broker = self.broker
        if message not in self.mine:
            if message.id not in broker.lost:
                broker.violation(f"{one.outcome} of {message.id}, which this source does not hold")
            return [Refused(message, "lost")]
        entry = broker.held[message]
        self._forget(message)
        if message.id in broker.lost:
            broker.lost.discard(message.id)
            return [Refused(message, "lost", "another has it")]
        now = asyncio.get_running_loop().time()
        broker.ended.append(Ended(message.id, one.outcome, one.delay, one.counted, one.outputs, now))
        if one.outcome == "retry":
            entry.failures += one.counted
            entry.suspicions, entry.suspect, entry.deliveries = 0, False, 1 + entry.failures  # the handler did end
            broker.back(entry, delay=one.delay)
        elif one.outcome == "release":
            broker.back(entry, delay=one.delay)
        elif one.outcome == "park":
            broker.parked.add(entry)
        return []

    def _check_open(self, what: str) -> None:
        if self.closed:
            self.broker.violation(f"{what} after the close")


def _place(entry: Entry) -> int:
    return entry.place


def _behind(entry: Entry, others: Iterable[Entry]) -> bool:
    """Whether one of the others has the same key and comes before."""
    return entry.key is not None and any(one.key == entry.key and one.place < entry.place for one in others)


@asynccontextmanager
async def running(pipeline: Pipeline, broker: Broker, *, check: bool = True) -> AsyncIterator[asyncio.Task[None]]:
    """Run a pipeline while the body runs; drain it then, and check that the contract was kept."""
    stats = pipeline.stats

    def window() -> int:
        now = stats()
        return now.window if now is not None and now.window else 1 << 30

    broker.window = window
    task = asyncio.create_task(pipeline.run())
    try:
        await broker.until(lambda: broker.sources or task.done())
        while not task.done() and window() == 1 << 30:  # noqa: ASYNC110 # the flow starts some turns later
            await asyncio.sleep(0)
        yield task
    finally:
        pipeline.stop()
        await asyncio.wait((task,))
    task.result()
    if check:
        broker.check()


def bodies(count: int) -> Iterable[bytes]:
    return (b"%d" % number for number in range(1, count + 1))
