"""The transport: one file, as the event loop sees it."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import apsw

from ..._decisions.topics import check_topic
from ...address import Convert, url_options
from ...errors import OptionError, PublishError, TransportError
from ...message import Outgoing, Stored
from ...source import Subscription
from ...transport import Features, Finding
from .io_thread import IOThread
from .schema import explain
from .source import SQLiteSource, open_queues
from .store import Store

_PAGE = 500  # messages per step of browse
_MAX_PAYLOAD = 16 * 1024 * 1024


class SQLiteTransport:
    """A broker in one file. Every process of the machine that opens `path` takes part in it.

    - `path`: the database; made when it is not there (its folder must be). Beside it live `-wal` and `-shm`, and one
      empty `-live-…` file per process that receives. All get the mode that the umask says. Network file systems
      cannot hold it.
    - `lease`: seconds, more than 0, that a delivery stays with a consumer that lives but does not renew. A process
      that dies is noticed within about a second, whatever the lease.
    - `max_payload`: bytes, the most one body may have.
    - `busy_timeout`: seconds to wait for another process's transaction before giving up.

    What `publish` returned from survives a power cut. A settle survives the death of every process; a power cut can
    undo the last acks, never a retry, a dead letter or an output.

    Raises OptionError for a value that is not allowed; the file is opened by `connect`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        lease: float = 30.0,
        max_payload: int = _MAX_PAYLOAD,
        busy_timeout: float = 30.0,
    ) -> None:
        _check("lease", lease, 0 < lease < math.inf, "more than 0 seconds")
        _check("max_payload", max_payload, 1 <= max_payload <= 900_000_000, "1 to 900000000 bytes")
        _check("busy_timeout", busy_timeout, 0 <= busy_timeout < math.inf, "0 or more seconds")
        name = os.fspath(path)
        if not name or name == ":memory:":
            raise OptionError(f"SQLiteTransport: path must name a file, got {name!r}; for memory there is memory://")
        self.path = os.path.realpath(name)
        self.lease = lease
        self.features = Features.all_but(max_payload=max_payload)
        self._busy_timeout = busy_timeout
        self._open_thread: IOThread | None = None
        self._connecting = asyncio.Lock()
        self._sources: list[SQLiteSource] = []

    @classmethod
    def from_url(cls, url: str) -> Self:
        """A transport for `sqlite:///relative.db` or `sqlite:////absolute.db`; options follow as `?lease=10`.

        Raises OptionError that says what is wrong with the URL.
        """
        parts = urlsplit(url)
        if parts.scheme != "sqlite" or parts.netloc or len(parts.path) < 2 or parts.fragment:
            raise OptionError(f"{url!r} names no SQLite file; write sqlite:///relative.db or sqlite:////absolute.db")
        return cls(unquote(parts.path[1:]), **url_options("a sqlite URL", parts.query, _URL_OPTIONS))

    async def connect(self) -> None:
        """Open the database, and make it when it is not there. Idempotent.

        Raises ConnectError: no folder, not writable, no database, another program's, damaged, of a newer Sluiceway.
        """
        async with self._connecting:
            if self._open_thread is None:
                self._open_thread = await asyncio.to_thread(
                    IOThread, self.path, lease=self.lease, busy_timeout=self._busy_timeout
                )

    @property
    def _thread(self) -> IOThread:
        if self._open_thread is None:
            raise TransportError(f"the SQLite transport of {self.path} is not connected; await connect() first")
        return self._open_thread

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        """Make the groups' queues, or say which are missing. What is published from now on is kept for them.

        Raises OptionError for a topic that cannot be.
        """

        def work(store: Store) -> list[Finding]:
            findings: list[Finding] = []
            for subscription in subscriptions:
                group = subscription.group
                missing = store.routing.missing(group, subscription.topics)
                findings.extend(_finding(group, topic, create=create) for topic in missing)
                if create:
                    open_queues(store, subscription)
            return findings

        _check_topics(subscriptions)
        found: list[Finding] = await self._run("prepare the groups", work, full=create, reads=not create)
        return found

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish all or none, in order. On disk when it returns.

        Raises PayloadTooLarge, and OptionError for a topic that cannot be; PublishError when the database takes
        nothing now: a full disk, a lock that nobody lets go of. Nothing was published then.
        """
        if not messages:
            return
        thread = self._thread
        self.features.check_sizes(messages)
        try:
            await thread.run(lambda store: store.publish(messages), full=True)
        except apsw.ConstraintError as error:
            text = f"a body is not bytes, or a timestamp is not a number ({error})"
            raise PublishError.unconfirmed(messages, len(messages), text) from error
        except apsw.Error as error:
            raise PublishError.unconfirmed(messages, len(messages), explain(error, self.path)) from error

    async def subscribe(self, subscription: Subscription) -> SQLiteSource:
        """Open a source. The group exists when this returns. Raises OptionError for a topic that cannot be."""
        _check_topics([subscription])
        source = SQLiteSource(
            self._thread, subscription, path=self.path, lease=self.lease, max_payload=self.features.max_payload
        )
        await source.open()
        self._sources = [other for other in self._sources if not other.closed]
        self._sources.append(source)
        return source

    async def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        """The messages at rest in `topic`, oldest first, from behind position `after`. Consumes nothing.

        `topic` is exact. A message that several groups have yet to settle is shown once for each, also while a
        consumer has it in hand. Raises OptionError for an `after` that is no position.
        """
        check_topic(topic, pattern=False)
        position = 0 if after is None else _position(after)
        while page := await self._page(topic, position):
            for stored in page:
                yield stored
            position = int(page[-1].position)

    async def _page(self, topic: str, position: int) -> list[Stored]:
        page: list[Stored] = await self._run(
            f"browse {topic!r}", lambda store: store.browse(topic, position, _PAGE), reads=True
        )
        return page

    async def dead_letter_topics(self) -> Sequence[str]:
        """The dead-letter topics that have messages at rest, or a group that reads them; sorted."""
        found: list[str] = await self._run("list topics", lambda store: store.dead_letter_topics(), reads=True)
        return found

    async def remove(self, stored: Sequence[Stored]) -> None:
        """Delete messages that `browse` showed, except what a consumer has in hand. One that is gone is no error."""
        seqs = [_position(one.position) for one in stored]
        if seqs:
            await self._run("remove messages", lambda store: store.remove(seqs), full=True)

    async def aclose(self) -> None:
        """Close the sources that are still open, and the file. Idempotent.

        Raises TransportError when a source cannot give back what it holds (a full disk); that comes back to others as
        if this process had died.
        """
        try:
            while self._sources:
                await self._sources.pop().aclose()
        finally:
            thread, self._open_thread = self._open_thread, None
            if thread is not None:
                await thread.stop()

    async def _run(self, what: str, work: Callable[[Store], Any], *, full: bool = False, reads: bool = False) -> Any:
        try:
            return await self._thread.run(work, full=full, reads=reads)
        except apsw.Error as error:
            raise TransportError(f"cannot {what}: {explain(error, self.path)}") from error


def _finding(group: str, topic: str, *, create: bool) -> Finding:
    if create:
        return Finding("info", f"made a queue for group {group!r} and topic {topic!r}")
    return Finding("error", f"group {group!r} has no queue for topic {topic!r}; start once with create to make it")


def _check_topics(subscriptions: Sequence[Subscription]) -> None:
    for subscription in subscriptions:
        if not subscription.topics:
            raise OptionError(f"the subscription of group {subscription.group!r} names no topic")
        for topic in subscription.topics:
            check_topic(topic, pattern=True)


def _position(position: str) -> int:
    try:
        return int(position)
    except ValueError:
        raise OptionError(f"{position!r} is no position in a SQLite queue; use one that browse showed") from None


def _check(name: str, value: object, allowed: bool, what: str) -> None:
    if not allowed:
        raise OptionError(f"SQLiteTransport: {name} must be {what}, got {value!r}")


_URL_OPTIONS: dict[str, Convert] = {"lease": float, "max_payload": int, "busy_timeout": float}
