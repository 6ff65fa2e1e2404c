"""A TCP proxy on loopback that stands between a client and its server, and does to them what networks do.

It runs on a thread with a loop of its own, so it goes on while the loop of a test is blocked, and every method may be
called from an async test, from a plain thread or from a fixture. What a method says is so when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Self, TypeVar

T = TypeVar("T")
Way = Literal["requests", "replies", "both"]

CHUNK = 65_536
HOST = "127.0.0.1"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: what is unsent is dropped, and the other side gets an RST


class _Direction:
    """What happens to the bytes of one way. It is touched by the proxy's own thread alone."""

    def __init__(self) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.latency = 0.0
        self.rate: float | None = None  # bytes/s
        self.passed = 0
        self.cut_at: int | None = None  # so many passed bytes cut everything

    def room(self) -> int:
        """How many bytes may be passed on at once."""
        room = CHUNK if self.rate is None else max(1, min(CHUNK, int(self.rate / 20)))
        return room if self.cut_at is None else max(1, min(room, self.cut_at - self.passed))


class _Connection:
    """One client and the server behind it. Its task closes both, and nobody else does."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server = socket.socket()
        self.reset = False  # how it ends
        self.task: asyncio.Task[None] | None = None
        for one in (self.client, self.server):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        for one in (self.client, self.server):
            if self.reset:
                with contextlib.suppress(OSError):  # the other side is gone already
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            one.close()


class Proxy:
    """Takes connections on `port` and passes them on to the server on loopback port `target`.

    At first it does no harm. `cut`, `stall`, `slow`, `refuse` and `cut_after` do, and `heal` ends all that. The bytes
    that clients send are the `requests`, what the server answers the `replies`. The port stays the same over `stop` and
    `start`.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.taken = 0  # connections, in all
        self._ways: dict[str, _Direction] = {}
        self._open: set[_Connection] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._cutting: asyncio.Task[int] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # -- its life

    def start(self) -> Self:
        """Take connections from now on."""
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        ready.wait()
        self._call(self._listen)
        return self

    def stop(self) -> None:
        """Reset what is open and end. Idempotent."""
        if self._thread is None or self._loop is None:
            return
        self._await(self._unlisten())
        self._await(self._cut(reset=True))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what it does to them

    def cut(self, *, reset: bool = True) -> int:
        """End every open connection, by RST, or by FIN without `reset`. New ones are taken. Returns how many it were.

        What was held back by `stall` is lost with them: `stall("replies")` and then `cut()` is a request that the
        server has carried out and whose reply nobody hears of.
        """
        return self._await(self._cut(reset=reset))

    def cut_after(self, count: int, way: Way = "replies") -> None:
        """Reset every connection once `count` more bytes have passed that way, so perhaps in the midst of a frame."""

        def set_limit() -> None:
            for one in self._directions(way):
                one.cut_at = one.passed + count

        self._call(set_limit)

    def stall(self, way: Way = "both") -> None:
        """Pass on nothing that way. Connections are taken and stay open; what arrives waits, until `heal`."""
        self._call(lambda: self._stall(way))

    def slow(self, latency: float = 0.0, rate: float | None = None, way: Way = "both") -> None:
        """Pass on each read `latency` seconds later that way, and no more than `rate` bytes/s per connection."""

        def set_pace() -> None:
            for one in self._directions(way):
                one.latency, one.rate = latency, rate

        self._call(set_pace)

    def refuse(self) -> None:
        """Refuse new connections, as a machine without the server does. Open ones stay; `cut` ends them."""
        self._await(self._unlisten())

    def heal(self) -> None:
        """Do no more harm. What was held back flows on."""

        def undo() -> None:
            for one in self._ways.values():
                one.flowing.set()
                one.latency, one.rate, one.cut_at = 0.0, None, None
            self._listen()

        self._call(undo)

    # -- what it has seen

    @property
    def open(self) -> int:
        """How many connections are open now."""
        return len(self._open)

    def passed(self, way: Literal["requests", "replies"]) -> int:
        """How many bytes it has passed on that way, over all connections."""
        return self._ways[way].passed

    # -- on its thread

    def _run(self, ready: threading.Event) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._ways = {"requests": _Direction(), "replies": _Direction()}
            self._loop.call_soon(ready.set)
            self._loop.run_forever()

    def _call(self, function: Callable[[], T]) -> T:
        """Call it on the proxy's thread and return what it returns."""

        async def call() -> T:
            return function()

        return self._await(call())

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None or self._thread is None:
            work.close()
            raise RuntimeError("the proxy was not started")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _stall(self, way: Way) -> None:
        for one in self._directions(way):
            one.flowing.clear()

    def _directions(self, way: Way) -> list[_Direction]:
        return list(self._ways.values()) if way == "both" else [self._ways[way]]

    def _listen(self) -> None:
        if self._accepting is None:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, self.port))
            listener.listen(128)
            listener.setblocking(False)
            self._accepting = asyncio.create_task(self._accept(listener))

    async def _unlisten(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
            self._accepting = None

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
                self.taken += 1
                connection = _Connection(client)
                self._open.add(connection)
                connection.task = asyncio.create_task(self._serve(connection))

    async def _serve(self, connection: _Connection) -> None:
        """Open the server's side of a new connection, and pass on between the two until both have ended."""
        client, server = connection.client, connection.server
        try:
            await self._ways["requests"].flowing.wait()
            await asyncio.get_running_loop().sock_connect(server, (HOST, self.target))
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(client, server, self._ways["requests"]))
                both.create_task(self._pass_on(server, client, self._ways["replies"]))
        except* OSError:  # a server that is not there, or a side that has reset: so the other side hears of it
            connection.reset = True
        finally:
            connection.close()
            self._open.discard(connection)

    async def _pass_on(self, one: socket.socket, other: socket.socket, way: _Direction) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(one, CHUNK):
            if way.latency:
                await asyncio.sleep(way.latency)
            while data:
                await way.flowing.wait()
                room = way.room()  # what is set meanwhile holds for what was read already
                piece, data = data[:room], data[room:]
                await loop.sock_sendall(other, piece)
                way.passed += len(piece)
                if way.cut_at is not None and way.passed >= way.cut_at:
                    way.cut_at = None
                    self._cutting = asyncio.create_task(self._cut(reset=True))
                    return
                if way.rate is not None:
                    await asyncio.sleep(len(piece) / way.rate)
        await way.flowing.wait()
        other.shutdown(socket.SHUT_WR)

    async def _cut(self, *, reset: bool) -> int:
        tasks = []
        for connection in self._open:
            connection.reset = reset
            if connection.task is not None:
                connection.task.cancel()
                tasks.append(connection.task)
        if tasks:
            await asyncio.wait(tasks)
        return len(tasks)
