"""One connection to the server: hiredis packs and parses, asyncio moves the bytes.

Commands go out as they are called and answers come back in their order, so calls of several tasks share a connection
without waiting for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

try:
    import hiredis
except ImportError as missing:
    raise ImportError("the Redis transport needs hiredis: pip install 'sluiceway[redis]'") from missing

from ...errors import ConnectError, TransportError
from .lua import Script
from .scripts import SCRIPTS
from .settings import Settings

ReplyError = hiredis.ReplyError
Command = tuple[Any, ...]

CONNECT = 5.0  # seconds to reach the server and be let in
ANSWER = 30.0  # seconds after which a server that says nothing counts as gone
_NO_REPLY = object()


class Wire(asyncio.Protocol):
    """A connection, made by `connect`. When it breaks, all calls in progress and later ones raise TransportError."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client_id = 0
        self.received = 0  # bytes, so far
        self.lost: str | None = None
        self._reader = hiredis.Reader(notEnoughData=_NO_REPLY)
        self._calls: deque[tuple[int, asyncio.Future[list[Any]]]] = deque()  # how many answers each waits for
        self._answers: list[Any] = []  # of the first call
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport

    # -- asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        made = transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not _NO_REPLY:
                self._answers.append(answer)
                if len(self._answers) == self._calls[0][0]:
                    _, future = self._calls.popleft()
                    answers, self._answers = self._answers, []
                    if not future.done():
                        future.set_result(answers)
        except (hiredis.ProtocolError, IndexError) as error:
            self.abort(f"what came is no answer of a Redis server ({error})")

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection broke: {error}" if error else "the server closed the connection")

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- calls

    async def call(self, *commands: Command, seconds: float = ANSWER) -> list[Any]:
        """Send commands in one go and return their answers; one that failed is a ReplyError among them.

        Raises TransportError when the connection is broken, or breaks or says nothing for `seconds`: the commands may
        have been carried out then, or not.
        """
        await self._writable.wait()
        if self.lost is not None:
            raise TransportError(f"{self.name}: {self.lost}")
        packed = [hiredis.pack_command(command) for command in commands]
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._calls.append((len(commands), future))
        self._transport.write(packed[0] if len(packed) == 1 else b"".join(packed))
        timer = loop.call_later(seconds, self.abort, f"no answer within {seconds:g} s")
        try:
            return await future
        finally:
            timer.cancel()

    async def ask(self, *command: Any, seconds: float = ANSWER) -> Any:
        """One command's answer. Raises TransportError, also for what the server refuses."""
        (answer,) = await self.call(command, seconds=seconds)
        if isinstance(answer, ReplyError):
            raise refusal(self, f"carry out {command[0]}", answer) from answer
        return answer

    async def run(self, script: Script, keys: Sequence[Any], *arguments: Any) -> Any:
        """Run a script. Raises TransportError, with the ReplyError as its cause where the server refuses it."""
        command = ("EVALSHA", script.sha, len(keys), *keys, *arguments)
        (answer,) = await self.call(command)
        if isinstance(answer, ReplyError) and str(answer).startswith("NOSCRIPT"):  # SCRIPT FLUSH
            _, answer = await self.call(("SCRIPT", "LOAD", script.text), command)
        if isinstance(answer, ReplyError):
            raise refusal(self, script.what, answer) from answer
        return answer

    def abort(self, why: str) -> None:
        """Close at once; calls in progress raise. Idempotent."""
        self._fail(why)
        self._transport.abort()

    def _fail(self, why: str) -> None:
        if self.lost is None:
            self.lost = why
            self._writable.set()
            while self._calls:
                _, future = self._calls.popleft()
                if not future.done():
                    future.set_exception(TransportError(f"{self.name}: {why}"))


_CLUSTER = "it is a node of a cluster; Sluiceway needs a server (and replicas) without one"
_HINTS = {  # by how a refusal begins
    "READONLY": "it is a replica; give the URL of its primary, or of an address that follows it",
    "WRONGTYPE": "another program has a key of that name, and it is no stream: rename the topic or that key, or give "
    "another prefix= for the keys beside it",
    "OOM": "its memory is full: raise maxmemory; consumers go on, and make room",
    "MISCONF": "it cannot write to its disk: look at its log",
    "NOREPLICAS": "fewer replicas follow it than min-replicas-to-write wants",
    "NOPERM": "allow it to this user (ACL SETUSER); ACL LOG shows what was refused",
    "NOAUTH": "give user and password in the URL: redis://user:password@host",
    "ERR DB index is out of range": "the URL ends with the number of a database; raise `databases` at the server, or "
    "take a lower one",
    "MOVED": _CLUSTER,
    "CROSSSLOT": _CLUSTER,
    "CLUSTERDOWN": _CLUSTER,
    "ERR SELECT is not allowed in cluster mode": _CLUSTER,
}


def explained(answer: Exception) -> str:
    """A refusal, and what to change where that is known."""
    text = str(answer)
    hint = next((hint for start, hint in _HINTS.items() if text.startswith(start)), None)
    return text if hint is None else f"{text.rstrip('.')}; {hint}"


def refusal(wire: Wire, what: str, answer: Exception) -> TransportError:
    """The server's refusal as an error. A server that became a replica is left, so that the next call finds the new
    primary."""
    if str(answer).startswith("READONLY"):
        wire.abort("it is a read-only replica now")
    return TransportError(f"{wire.name} refuses to {what}: {explained(answer)}")


async def connect(settings: Settings) -> Wire:
    """A connection that is let in, with our scripts loaded. Raises ConnectError that says what to do."""
    name = settings.name
    try:
        async with asyncio.timeout(CONNECT):
            tls = settings.tls
            context = None if tls is None else await asyncio.to_thread(tls.context, name)
            server_name = None if tls is None else tls.server_name or settings.host
            _, wire = await asyncio.get_running_loop().create_connection(
                lambda: Wire(name), settings.host, settings.port, ssl=context, server_hostname=server_name
            )
    except ssl.SSLCertVerificationError as error:
        hint = "name its authority with ca_file=, or its name with server_name="
        raise ConnectError(f"the certificate of {name} is not trusted: {error.verify_message}; {hint}") from error
    except ssl.SSLError as error:
        raise ConnectError(f"no TLS with {name}: {error.reason}; without TLS its URL is redis://") from error
    except TimeoutError:
        hint = ", or it speaks no TLS: without TLS its URL is redis://" if tls is not None else ""
        raise ConnectError(f"{name} does not answer within {CONNECT:g} s; check host and port{hint}") from None
    except OSError as error:
        raise ConnectError(f"cannot reach {name}: {error}; check that it runs, host and port") from error
    try:
        await _enter(wire, settings)
    except BaseException as error:
        wire.abort("not let in")
        if isinstance(error, TransportError) and not isinstance(error, ConnectError):
            hint = "" if tls is not None else "; if it wants TLS its URL is rediss://"
            raise ConnectError(f"{error}{hint}") from error
        raise
    return wire


async def _enter(wire: Wire, settings: Settings) -> None:
    if settings.password is not None:
        user = () if settings.user is None else (settings.user,)
        (answer,) = await wire.call(("AUTH", *user, settings.password), seconds=CONNECT)
        if isinstance(answer, ReplyError):
            raise ConnectError(f"{wire.name} refuses the user name or password: {answer}")
    answers = await wire.call(("CLIENT", "ID"), ("SELECT", settings.db), *(
        ("SCRIPT", "LOAD", script.text) for script in SCRIPTS
    ), seconds=CONNECT)  # fmt: skip
    for answer in answers:
        if isinstance(answer, ReplyError):
            raise ConnectError(f"{wire.name} does not let us in: {explained(answer)}")
    wire.client_id = answers[0]


class Line:
    """A connection that comes back: `wire()` gives it, made anew when it broke."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._wire: Wire | None = None
        self._making = asyncio.Lock()
        self._refused: tuple[float, ConnectError] | None = None  # until when nobody tries again, and why

    @property
    def up(self) -> bool:
        """Whether there is a connection now."""
        return self._wire is not None and self._wire.lost is None

    async def wire(self) -> Wire:
        """The connection. Raises ConnectError, and for a moment after that the same again without a try."""
        if self._wire is None or self._wire.lost is not None:
            async with self._making:
                if self._wire is None or self._wire.lost is not None:
                    self._wire = await self._connect()
        return self._wire

    async def _connect(self) -> Wire:
        now = asyncio.get_running_loop().time()
        if self._refused is not None and now < self._refused[0]:
            raise ConnectError(str(self._refused[1]))
        try:
            made = await connect(self._settings)
        except ConnectError as error:
            self._refused = (now + 0.2, error)
            raise
        self._refused = None
        return made

    def close(self) -> None:
        """Close the connection. Idempotent."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort("it was closed")
