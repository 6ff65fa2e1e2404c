"""All that is private of nats-py: its parser, replaced by a quicker one, its write buffer, and what it says first.

nats-py tries two regular expressions per message, moves the rest of its buffer each time, awaits four coroutines,
parses all headers and puts the message in a queue that a task empties. This parser hands over all messages of one read
in one call, headers unparsed. What is no message (INFO, PING, -ERR, …) is still nats-py's. The figures are in
docs/reference/clients.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client
from nats.errors import Error
from nats.protocol.parser import Parser

Frame = tuple[bytes, bytes, bytes, bytes]
"""Subject, reply, header block (empty without one) and body of a message."""

OnFrames = Callable[[dict[bytes, list[Frame]]], None]
"""Takes the messages of one read, by subscription id, each in order."""

_H, _M = b"HM"


class WireClient(Client):
    """A client that hands all its messages to `on_frames`. With `must_encrypt` it says nothing to a server without TLS,
    where nats-py would send the password in clear."""

    def __init__(self, on_frames: OnFrames, *, must_encrypt: bool = False) -> None:
        super().__init__()
        self._ps = WireParser(self, on_frames)
        self._must_encrypt = must_encrypt

    def _connect_command(self) -> bytes:
        if self._must_encrypt and not self._server_info.get("tls_required"):
            raise Error("nats: the server offers no TLS")
        return super()._connect_command()

    async def _process_pong(self) -> None:
        """Pass over a PONG that nobody waits for any more, at which nats-py stops reading, and closes nothing."""
        pongs: Any = self._pongs
        if pongs and pongs[0].done():
            pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    def write(self, data: bytes) -> None:
        """Write now, behind what the client has yet to write."""
        private: Any = self
        if private._pending:
            waiting, private._pending, private._pending_data_size = private._pending, [], 0
            data = b"".join([*waiting, data])
        private._transport.write(data)


def on_end(client: Client, call: Callable[[], None]) -> None:
    """Have `call` called when one of nats-py's own tasks ends. Closing a connection that was reset raises in them, and
    asyncio would say so at any time after."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()
        call()

    private: Any = client
    for task in (private._reading_task, private._flusher_task):
        task.add_done_callback(ended)


class WireParser(Parser):
    """The parser. A large body is gathered in parts and joined once."""

    def __init__(self, client: Client, on_frames: OnFrames) -> None:
        self._on_frames = on_frames
        super().__init__(client)

    def reset(self) -> None:
        """Forget what was read in part: the connection is a new one."""
        super().reset()
        self._parts: list[bytes] = []
        self._missing = 0

    async def parse(self, data: bytes = b"") -> None:
        if self._parts:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data, self._parts = b"".join(self._parts), []
        at, size = 0, len(data)
        self._missing = 1
        found: dict[bytes, list[Frame]] = {}
        while (end := data.find(b"\r\n", at)) >= 0:
            kind = data[at]
            if kind != _H and kind != _M:
                await super().parse(data[at : end + 2])
                at = end + 2
                continue
            words = data[at:end].split(b" ")
            start = end + 2
            stop = start + int(words[-1])
            if stop + 2 > size:
                self._missing = stop + 2 - size
                break
            body = start + int(words[-2]) if kind == _H else start
            reply = words[3] if len(words) == (6 if kind == _H else 5) else b""
            frame = (words[1], reply, data[start:body], data[body:stop])
            frames = found.get(words[2])
            if frames is None:
                found[words[2]] = [frame]
            else:
                frames.append(frame)
            at = stop + 2
        if at < size:
            self._parts = [data[at:]]
        if found:
            self._on_frames(found)
