"""Pulling: asks the server for as many messages as there is demand, and knows when no more are on their way.

First all that waits, up to the demand; where nothing does, a pull of one that waits for it. With one consumer nothing
is on its way when `pull` returns; with several, those that brought nothing keep their pull of one. Pulls are taken back
by ending their subscription. The server (2.9) notices that too late when a nak comes next: it hands another message out
a second time. So a pull that expires at once follows, which makes it look.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence

from .answers import status
from .connection import Connection
from .consumers import Consumer
from .headers import read_delivery
from .wire import Frame

BEAT = 5.0  # seconds between the server's heartbeats while a pull waits, at most
LINGER = 60.0  # seconds that a pull waits
TURN = 0.1  # where the demand is less than one for each consumer
PATIENCE = 3.0  # seconds that an answer at once may take


class Pulls:
    """The pulls of one source. `arrived`: what came, by read, with a time before which the server had not sent it."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.arrived: list[tuple[float, list[Frame]]] = []
        self.trouble: dict[int, str] = {}  # consumers that are not there any more, by index
        self.silent = False  # pulls were not answered: a consumer may be gone, or its leader
        self.stopped: Callable[[], bool] = lambda: False
        self._connection = connection
        self._number = number
        self._generation = 0
        self._sid = b""
        self._inbox = ""
        self._open: dict[int, int] = {}  # what pulls may still bring, by consumer
        self._paths: dict[str, int] = {}
        self._single = True
        self._dry: set[int] = set()  # consumers that had no more
        self._consumers: Sequence[Consumer] = ()
        self._turn = 0
        self.beat = BEAT
        self.moves = 0  # how often messages came, or the server said that somebody else got some
        self._told: dict[int, bytes] = {}  # how many a consumer has handed out, as its last heartbeat said
        self._heard = 0.0
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Something changed: `stopped`, or the connection."""
        if not self._connection.up.is_set():
            self._open.clear()
            self._sid = b""
            self._dry.clear()
        self._wake.set()

    async def rest(self, seconds: float) -> None:
        """Return after so many seconds, or when `stopped` comes true."""
        await self._until(self.stopped, seconds)

    async def changed(self) -> None:
        """Return when something changes."""
        self._wake.clear()
        await self._wake.wait()

    async def pull(self, consumers: Sequence[Consumer], demand: int, max_bytes: int) -> None:
        """Wait until something has arrived, at most `demand`, or there is another reason to look."""
        if consumers is not self._consumers:
            await self.cancel()
            self._consumers, self._single = consumers, len(consumers) == 1
            self._paths = {consumer.path: index for index, consumer in enumerate(consumers)}
            self._dry.clear()
            self._told.clear()
        self._listen()
        free = demand - sum(self._open.values())
        full = [index for index in range(len(consumers)) if index not in self._open and index not in self._dry]
        if full and free > 0:
            asked = self._send_all(full, free, {"no_wait": True, "max_bytes": max_bytes})
            if not await self._until(lambda: asked.isdisjoint(self._open), PATIENCE):
                self.silent = True
                await self.cancel()
        if not (self.arrived or self.stopped() or self.trouble):
            free = demand - sum(self._open.values())
            few = free < len(consumers) - len(self._open)
            wait: dict[str, object] = {"expires": int((TURN if few else LINGER) * 1e9)}
            if not few:
                wait["idle_heartbeat"] = int(self.beat * 1e9)
            closed = [index for index in range(len(consumers)) if index not in self._open]
            self._send_all(closed, min(free, len(closed)), wait)
            await self._linger()
        if self._open and (self.stopped() or self.trouble):
            await self.cancel()

    async def _linger(self) -> None:
        while self._open and not (self.arrived or self.stopped() or self.trouble or self.silent):
            heard = self._heard
            done = await self._until(
                lambda: bool(self.arrived or self.stopped() or self.silent or not self._open),
                self._connection.whole(2 * self.beat + 1),
            )
            if not done and self._heard == heard:  # two heartbeats missed
                self.silent = True
                await self.cancel()

    async def _until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Whether `done` came true in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not done():
            left = deadline - loop.time()
            if left <= 0:
                return False
            self._wake.clear()
            timer = loop.call_later(left, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
        return True

    def _listen(self) -> None:
        if not self._sid and self._connection.up.is_set():
            self._generation += 1
            name = f"p{self._number}-{self._generation}"
            self._sid, self._inbox = name.encode(), f"{self._connection.inbox}.{name}"
            self._connection.handlers[self._sid] = self._on_frames
            self._connection.write(f"SUB {self._inbox}.* {name}\r\n".encode())

    async def cancel(self) -> None:
        """Take the pulls back. What was on its way has arrived when this returns."""
        stale = [index for index in self._open if index < len(self._consumers)]
        await self._unsubscribe()
        if stale:
            self._listen()
            self._send_all(stale, len(stale), {"expires": 1_000_000})
            await self._until(lambda: not self._open, 1.0)
            await self._unsubscribe()

    async def _unsubscribe(self) -> None:
        sid, self._sid = self._sid, b""
        if sid:
            self._connection.write(b"UNSUB %b\r\n" % sid)
            await self._connection.settled()
            self._connection.handlers.pop(sid, None)
        self._open.clear()

    def _send_all(self, indexes: Sequence[int], demand: int, options: dict[str, object]) -> set[int]:
        """Share the demand among consumers, in turn when it is less than one each."""
        share, more = divmod(demand, len(indexes)) if indexes else (0, 0)
        asked = set()
        for number in range(len(indexes) if share else more):
            index = indexes[(self._turn + number) % len(indexes)]
            self._send(index, self._consumers[index], share + (number < more), options)
            asked.add(index)
        self._turn += 1
        return asked

    def _send(self, index: int, consumer: Consumer, batch: int, options: dict[str, object]) -> None:
        if not self._open:
            self._heard = time.monotonic()  # nothing can have come before
        self._open[index] = batch
        body = json.dumps({"batch": batch, **options}).encode()
        line = f"PUB $JS.API.CONSUMER.MSG.NEXT.{consumer.path} {self._inbox}.{index} {len(body)}\r\n"
        self._connection.write(line.encode() + body + b"\r\n")

    def _on_frames(self, frames: list[Frame]) -> None:
        came, self._heard = self._heard, time.monotonic()  # a loop that stood still reads late what came long before
        messages = [frame for frame in frames if frame[1]]
        if messages:
            self.moves += 1
            self.arrived.append((came, messages))
            if self._single:
                self._got(0, len(messages), messages[-1])
            else:
                for frame in messages:
                    delivery = read_delivery(frame[1])
                    self._got(self._paths.get(f"{delivery.stream}.{delivery.consumer}", 0), 1, frame)
        changed = bool(messages)
        if len(messages) < len(frames):
            for frame in frames:
                if not frame[1]:
                    changed = self._on_status(frame) or changed
        if changed:
            self._wake.set()

    def _got(self, index: int, count: int, last: Frame) -> None:
        left = self._open.get(index, 0) - count
        if left > 0:
            self._open[index] = left
        else:
            self._open.pop(index, None)
            if read_delivery(last[1]).pending:
                self._dry.discard(index)

    def _on_status(self, frame: Frame) -> bool:
        """Whether it is more than a heartbeat."""
        code, index = status(frame), int(frame[0].rpartition(b".")[2])
        if code == 100:
            told = frame[2].partition(b"Nats-Last-Stream")[0]
            if told != self._told.get(index):
                self._told[index] = told
                self.moves += 1
            return False
        self._open.pop(index, None)
        self._dry.add(index)
        text = frame[2][13:].partition(b"\r\n")[0].decode(errors="replace")
        if code == 503 or (code == 409 and "eleted" in text):
            self.trouble[index] = text or "no such consumer"
        return True
