"""The connection: one for all of a transport. It comes back by itself, and asks many questions in one write."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from nats.errors import AuthorizationError

from ..._decisions.backoff import reconnect_delay
from ...errors import ConnectError, TransportError
from .answers import Unanswered, read_answer
from .settings import Settings
from .wire import Frame, WireClient, on_end

log = logging.getLogger("sluiceway.nats")

TIMEOUT = 10.0  # seconds for a server to answer
OLDEST = (2, 9)
_CHECKS = 5  # how often a new connection asks for JetStream, in that time
_PIPELINE, _PIPELINE_BYTES = 1000, 4 * 1024 * 1024  # asked at once and not answered, at most

Request = tuple[str, bytes, bytes]
"""Subject, header block (empty for none) and body."""


class _Call:
    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.answers: list[Frame | None] = [None] * count
        self.missing = count
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def give_up(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(Unanswered(why, self.answers))

    def time_out(self, seconds: float) -> None:
        self.give_up(f"NATS did not answer {self.missing} of {len(self.answers)} requests in {seconds:g} s")


class Connection:
    """To one of the servers. `on_change` of each listener is called when it is lost and when it is back."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.up = asyncio.Event()
        self._down = asyncio.Event()
        self.error: str | None = None
        self.handlers: dict[bytes, Callable[[list[Frame]], None]] = {}
        self.listeners: set[Callable[[], None]] = set()
        self.inbox = ""
        self._servers = settings.servers
        self._client: WireClient | None = None
        self._calls: dict[int, _Call] = {}
        self._asked = 0
        self._keeper: asyncio.Task[None] | None = None
        self._phase = random.random()  # so that not all processes look at the same moment

    async def open(self) -> None:
        """Connect. Raises ConnectError that says what to do."""
        await self._connect()
        self._keeper = asyncio.create_task(self._keep())

    @property
    def max_payload(self) -> int:
        """Bytes that a message may have with its headers."""
        return self._client.max_payload if self._client is not None else 1024 * 1024

    async def ready(self, seconds: float) -> None:
        """Return when it is up. Raises TransportError when it is not in so many seconds."""
        if not self.up.is_set():
            try:
                await asyncio.wait_for(self.up.wait(), seconds)
            except TimeoutError:
                raise TransportError(
                    f"there is no connection to NATS at {self.settings.where()}: {self.error}"
                ) from None

    def whole(self, seconds: float) -> float:
        """So many seconds or a little more: they end with a full second of this connection. What its sources wait for
        ends together then, and an app with many that are idle wakes once a second, not once for each of them."""
        now = asyncio.get_running_loop().time() + self._phase
        return math.ceil(now + seconds) - now

    def write(self, data: bytes) -> None:
        """Send, if the connection is up."""
        if self._client is not None and self.up.is_set():
            self._client.write(data)

    async def settled(self) -> None:
        """Return when the server has done all that was written, and what it sent before has arrived."""
        if self._client is not None and self.up.is_set():
            try:
                await self._client.flush(5)
            except Exception as error:  # the connection broke: nothing more arrives
                log.debug("flush: %s", error)

    async def ask(self, requests: Sequence[Request], *, before: bytes = b"", timeout: float = TIMEOUT) -> list[Frame]:
        """All answers, in order; the questions go out in as few writes as can be, behind `before`, which asks nothing.
        Raises Unanswered."""
        answers: list[Frame | None] = []
        at = 0
        try:
            while at < len(requests):
                size, end = 0, at
                while end < len(requests) and end - at < _PIPELINE and size < _PIPELINE_BYTES:
                    size += len(requests[end][2])
                    end += 1
                answers += await self._ask(requests[at:end], before, timeout)
                at, before = end, b""
        except Unanswered as error:
            answers += error.answers
            raise Unanswered(str(error), [*answers, *[None] * (len(requests) - len(answers))]) from None
        return answers  # type: ignore[return-value]  # none is missing

    async def _ask(self, requests: Sequence[Request], before: bytes, timeout: float) -> list[Frame | None]:
        if not self.up.is_set():
            raise Unanswered(f"there is no connection to NATS: {self.error}", [])
        call = _Call(self._asked, len(requests))
        self._asked += len(requests)
        lines = [before]
        for number, (subject, header, body) in enumerate(requests, call.first):
            self._calls[number] = call
            if header:
                sizes = f"{len(header)} {len(header) + len(body)}"
                lines.append(f"HPUB {subject} {self.inbox}.r.{number} {sizes}\r\n".encode())
            else:
                lines.append(f"PUB {subject} {self.inbox}.r.{number} {len(body)}\r\n".encode())
            lines.append(header + body + b"\r\n")
        timer = asyncio.get_running_loop().call_later(timeout, call.time_out, timeout)
        try:
            self.write(b"".join(lines))
            await call.done  # asyncio.wait_for would take one more turn of the loop
        finally:
            timer.cancel()
            for number in range(call.first, call.first + len(requests)):
                self._calls.pop(number, None)
        return call.answers

    async def api(self, subject: str, body: dict[str, Any] | None = None, what: str | None = None) -> dict[str, Any]:
        """One question to the JetStream API. Raises ApiError, which says `what` was asked for."""
        (answer,) = await self.ask([(f"$JS.API.{subject}", b"", json.dumps(body or {}).encode())])
        return read_answer(answer, what or subject)

    # -- coming and going

    async def _connect(self) -> None:
        errors: list[Exception] = []

        async def on_error(error: Exception) -> None:
            errors.append(error)
            log.debug("nats: %s", error)

        def on_silence() -> None:
            if client is self._client:
                self._lost(str(client.last_error or (errors[-1] if errors else "the server closed the connection")))

        client = WireClient(self._on_frames, must_encrypt=self.settings.encrypted)
        options = self.settings.connect_options()
        try:
            await client.connect(**options, error_cb=on_error, name="sluiceway")
        except Exception as error:
            await _abandon(client)
            raise self._explained(errors[-1] if errors else error) from error
        self.inbox = client.new_inbox()
        self._client = client
        self.handlers = {b"r": self._on_answers}
        self._down.clear()
        self.up.set()
        on_end(client, on_silence)
        self.write(f"SUB {self.inbox}.r.* r\r\n".encode())
        try:
            await self._check(client)
        except BaseException as error:
            self._lost(str(error) or type(error).__name__)  # others may have asked already
            await _abandon(client)
            raise
        self.error = None

    async def _check(self, client: WireClient) -> None:
        version = client.connected_server_version
        if (version.major, version.minor) < OLDEST:
            raise ConnectError(f"the NATS server at {self.settings.where()} is {version!r}; 2.9 or newer is needed")
        for tries in range(1, _CHECKS + 1):
            try:
                (answer,) = await self.ask([("$JS.API.INFO", b"", b"")], timeout=TIMEOUT / _CHECKS)
                read_answer(answer, "asked for JetStream")
                return
            except TransportError as error:
                silent = isinstance(error, Unanswered) and self.up.is_set()
                if not silent or tries == _CHECKS:  # a cluster without a leader is silent, and forgets who has asked
                    raise ConnectError(
                        f"NATS at {self.settings.where()} has no JetStream for this account ({error}); start the server"
                        " with -js, or enable it for the account; a cluster needs more than half of its servers"
                    ) from error

    def _explained(self, error: BaseException) -> ConnectError:
        where = self.settings.where()
        text = str(error) or type(error).__name__
        if isinstance(error, AuthorizationError) or "uthorization" in text:
            return ConnectError(f"NATS at {where} refused the credentials; check user and password, token or key file")
        if isinstance(error, ssl.SSLError):
            return ConnectError(f"TLS with NATS at {where} failed: {text}; check ca_file, cert_file and server_name")
        if isinstance(error, (ConnectionResetError, BrokenPipeError)):
            return ConnectError(
                f"NATS at {where} closed the connection at once ({text}); check the credentials and TLS"
            )
        if isinstance(error, ImportError):
            return ConnectError(f"credentials and nkey need one more package ({error}): pip install nkeys")
        if "offers no TLS" in text:
            return ConnectError(
                f"NATS at {where} offers no TLS; use nats:// without ca_file and cert_file, or turn TLS on"
            )
        return ConnectError(f"cannot reach NATS at {where}: {text}; is the server running there?")

    def _lost(self, why: str) -> None:
        if self.up.is_set():
            self.up.clear()
            self._down.set()
            self.error = why
            for call in {id(call): call for call in self._calls.values()}.values():
                call.give_up(f"the connection to NATS was lost: {why}")
            self._tell()

    def _tell(self) -> None:
        for listener in list(self.listeners):
            listener()

    async def _keep(self) -> None:
        tries = 0
        while True:
            await self._down.wait()
            delay = reconnect_delay(tries, random.random())
            log.warning("the connection to NATS is lost: %s; trying again in %.2f s", self.error, delay)
            await asyncio.sleep(delay)
            if self._client is not None:
                await _abandon(self._client)
            tries += 1
            try:
                await self._connect()
            except TransportError as error:
                self.error = str(error)
            else:
                tries = 0
                log.warning("connected to NATS again; receiving goes on")
                self._tell()

    async def aclose(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        self.listeners.clear()
        if self._client is not None:
            await self.settled()
            self.up.clear()
            await _abandon(self._client)

    # -- what arrives

    def _on_frames(self, found: dict[bytes, list[Frame]]) -> None:
        for sid, frames in found.items():
            handler = self.handlers.get(sid)
            if handler is not None:
                handler(frames)

    def _on_answers(self, frames: list[Frame]) -> None:
        for frame in frames:
            number = int(frame[0].rpartition(b".")[2])
            call = self._calls.get(number)
            if call is not None and call.answers[number - call.first] is None:
                call.answers[number - call.first] = frame
                call.missing -= 1
                if not call.missing and not call.done.done():
                    call.done.set_result(None)


async def _abandon(client: WireClient) -> None:
    """Close it, however far it came. After a TLS handshake that failed, asyncio never says that it is closed."""
    try:
        await asyncio.wait_for(client.close(), 2)
    except Exception as error:
        log.debug("nats: closing the connection: %s %s", type(error).__name__, error)
