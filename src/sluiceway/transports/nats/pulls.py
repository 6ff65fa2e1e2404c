"""Pulling: asks the server for as many messages as there is demand, and knows when no more are on their way.

First all that waits, up to the demand; when nothing does, a pull of one that waits for it. So when `pull` returns,
nothing is on its way that nobody waits for. A pull is taken back by ending its subscription, which the server notices.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence

from .connection import Connection, status
from .headers import read_delivery
from .streams import Consumer
from .wire import Frame

BEAT = 5.0  # seconds between the server's heartbeats while a pull waits
LINGER = 60.0  # seconds that a pull waits
PATIENCE = 3.0  # seconds that an answer at once may take


class Pulls:
    """The pulls of one source. `arrived`: what came, by read, with the time of it."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.arrived: list[tuple[float, list[Frame]]] = []
        self.trouble: dict[int, str] = {}  # consumers that are not there any more, by index
        self.stopped: Callable[[], bool] = lambda: False
        self._connection = connection
        self._number = number
        self._generation = 0
        self._sid = b""
        self._inbox = ""
        self._open: dict[int, int] = {}  # what pulls may still bring, by consumer
        self._paths: dict[str, int] = {}
        self._single = True
        self._dry = False
        self._turn = 0
        self._heard = 0.0
        self.reads = 0
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Something changed: `stopped`, or the connection."""
        if not self._connection.up.is_set():
            self._open.clear()
            self._sid = b""
        self._wake.set()

    async def changed(self) -> None:
        """Return when something changes."""
        self._wake.clear()
        await self._wake.wait()

    async def pull(self, consumers: Sequence[Consumer], demand: int, max_bytes: int) -> None:
        """Wait until something has arrived, at most `demand`, or there is another reason to look."""
        self._listen(consumers)
        if not self._dry:
            asked = self._request(consumers, demand, {"no_wait": True, "max_bytes": max_bytes})
            if not await self._until(lambda: not self._open, PATIENCE):
                await self.cancel()
            self._dry = self._count() < asked
        if not self.arrived and not self.stopped() and not self.trouble and self._sid:
            few = demand < len(consumers)
            chosen = [(self._turn + number) % len(consumers) for number in range(min(demand, len(consumers)))]
            self._turn += len(chosen)
            wait = {"expires": int((1.0 if few else LINGER) * 1e9)}
            if not few:
                wait["idle_heartbeat"] = int(BEAT * 1e9)
            for index in chosen:
                self._send(index, consumers[index], 1, wait)
            await self._linger()
            if self._open:
                await self.cancel()
            self._dry = not self.arrived or read_delivery(self.arrived[-1][1][-1][1]).pending == 0

    def _count(self) -> int:
        return sum(len(frames) for _, frames in self.arrived)

    async def _linger(self) -> None:
        while self._open and not (self.arrived or self.stopped() or self.trouble):
            heard = self._heard
            if not await self._until(lambda: bool(self.arrived or self.stopped() or not self._open), 2 * BEAT + 1):
                if self._heard == heard:
                    return  # two heartbeats missed: ask anew

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

    def _listen(self, consumers: Sequence[Consumer]) -> None:
        self._heard = time.monotonic()
        self._single = len(consumers) == 1
        self._paths = {consumer.path: index for index, consumer in enumerate(consumers)}
        if not self._sid and self._connection.up.is_set():
            self._generation += 1
            name = f"p{self._number}-{self._generation}"
            self._sid, self._inbox = name.encode(), f"{self._connection.inbox}.{name}"
            self._connection.handlers[self._sid] = self._on_frames
            self._connection.write(f"SUB {self._inbox}.* {name}\r\n".encode())

    async def cancel(self) -> None:
        """Take the pulls back. What was on its way has arrived when this returns."""
        sid, self._sid = self._sid, b""
        if sid:
            self._connection.write(b"UNSUB %b\r\n" % sid)
            await self._connection.settled()
            self._connection.handlers.pop(sid, None)
        self._open.clear()

    def _request(self, consumers: Sequence[Consumer], demand: int, options: dict[str, object]) -> int:
        """Share the demand among the consumers, in turn when it is less than one each."""
        count = len(consumers)
        share, more = divmod(demand, count)
        for number in range(count if share else more):
            index = (self._turn + number) % count
            self._send(index, consumers[index], share + (number < more), options)
        self._turn += 1
        return demand

    def _send(self, index: int, consumer: Consumer, batch: int, options: dict[str, object]) -> None:
        self._open[index] = batch
        body = json.dumps({"batch": batch, **options}).encode()
        line = f"PUB $JS.API.CONSUMER.MSG.NEXT.{consumer.path} {self._inbox}.{index} {len(body)}\r\n"
        self._connection.write(line.encode() + body + b"\r\n")

    def _on_frames(self, frames: list[Frame]) -> None:
        now = self._heard = time.monotonic()
        self.reads += 1
        messages = [frame for frame in frames if frame[1]]
        if messages:
            self.arrived.append((now, messages))
            if self._single:
                self._got(0, len(messages))
            else:
                for frame in messages:
                    delivery = read_delivery(frame[1])
                    self._got(self._paths.get(f"{delivery.stream}.{delivery.consumer}", 0), 1)
        if len(messages) < len(frames):
            for frame in frames:
                if not frame[1]:
                    self._on_status(frame)
        self._wake.set()

    def _got(self, index: int, count: int) -> None:
        left = self._open.get(index, 0) - count
        if left > 0:
            self._open[index] = left
        else:
            self._open.pop(index, None)

    def _on_status(self, frame: Frame) -> None:
        code = status(frame)
        if code == 100:
            return
        index = int(frame[0].rpartition(b".")[2])
        self._open.pop(index, None)
        text = frame[2][13:].partition(b"\r\n")[0].decode(errors="replace")
        if code == 503 or (code == 409 and "eleted" in text):
            self.trouble[index] = text or "no such consumer"
