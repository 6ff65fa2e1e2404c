"""Sources of your own with little code: a `Feed` is anything that can be asked for events.

class Lines(Feed):
    def __init__(self, path: str) -> None:
        self.file = open(path, "rb")

    async def fetch(self, demand: int) -> list[bytes] | None:
        return list(itertools.islice(self.file, demand)) or None

lines = Lines("access.log")
async with Pipeline(lines.open, handle, exhausted="drop").running():
    await lines.finished()
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

from ..codec import encode
from ..errors import TransportError, Unsupported
from ..message import Message, Outgoing, new_id
from ..source import Backlog, Source, SourceInfo
from ._iterated import Publish, Pump
from ._ledger import Ledger
from ._source import FeedSource

__all__ = ["Feed"]


class Feed:
    """Something that can be asked for events: override `fetch`, and of the other methods what you need.

    `Pipeline(feed.open, handler)` handles its events. The feed lives longer than its sources: it keeps what was fetched
    and is not settled, so that a pipeline that crashes and starts anew goes on where it was.

    What it guarantees: `fetch` is never asked for more than the window has room for; each event is handled until it
    ends, in the order of fetching; what is retried or released comes again, after its delay, from memory. Nothing is
    durable: what was fetched and is not settled is gone when the process ends, unless wherever it came from gives it
    out again. So take it away there in `ended`, not in `fetch`.
    """

    topic: ClassVar[str] = "feed"
    """The topic of its messages; dead letters go to `{topic}.{group}.dead`."""

    poll_interval: ClassVar[float] = 1.0
    """Seconds from a `fetch` that returned nothing to the next."""

    max_waiting: ClassVar[int] = 10_000
    """While so many messages wait here, for their retry mostly, nothing more is fetched."""

    transient: ClassVar[tuple[type[Exception], ...]] = (OSError, TransportError)
    """What `fetch` may raise and be called again, with capped backoff. All else crashes the pipeline, which starts
    anew up to its `max_restarts`."""

    @classmethod
    def of(cls, events: AsyncIterable[Any] | Iterable[Any], *, publish: Publish | None = None) -> Feed:
        """A feed of what an iterator gives, until it ends. A plain one is read in the loop, so it should not block.

        `publish` is where dead letters go, and what handlers publish: the method of a transport, for instance.
        """
        return _Iterated(events, publish)

    # -- what a feed is made of ----------------------------------------------------------------------------------

    async def fetch(self, demand: int) -> Sequence[Any] | None:
        """Up to `demand` new events; none when there is nothing now; None when there will never be any more.

        It may wait. There is one call at a time for each source of the pipeline. It is cancelled when its source is
        closed, and not when a pipeline pauses.
        """
        raise NotImplementedError(f"{type(self).__name__} must override fetch")

    def message(self, event: Any) -> Message[Any]:
        """The message of an event. Unless overridden: a Message as it is, bytes as a body, anything else as JSON.

        `message.token` is the event, unless set here. What it raises dead-letters that event alone, with the reason.
        """
        return event if isinstance(event, Message) else Message(self.topic, encode(event), new_id())

    # -- how deliveries end --------------------------------------------------------------------------------------

    async def ended(self, messages: Sequence[Message[Any]]) -> None:
        """These have ended for good: handled, dead-lettered or dropped. When it raises, it is called again."""

    async def retried(self, message: Message[Any], delay: float) -> bool:
        """A failed message is to come again after `delay` seconds. True: from here; False: this call saw to it, and
        it is forgotten here. When it raises, it is called again."""
        return True

    async def released(self, message: Message[Any], delay: float) -> bool:
        """A message goes back untouched, mostly by a drain. True: it stays here, for the next run; False: this call
        handed it back. When it raises, it is called again."""
        return True

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish dead letters, and what handlers publish through their message. They are durable when it returns.

        A feed that does not override it needs `exhausted="drop"`. Raises PublishError for what is never accepted.
        """
        raise Unsupported(f"{type(self).__name__} has nowhere to publish to: override its publish()")

    @property
    def publishes(self) -> bool:
        """Whether there is somewhere to publish to: whether `publish` is overridden."""
        return self.overrides("publish")

    # -- start and drain -----------------------------------------------------------------------------------------

    async def prepare_for_start(self, info: SourceInfo) -> None:
        """Called before a source of this feed receives. What it raises is a failed start."""

    async def prepare_for_draining(self) -> Sequence[Any]:
        """Called when a drain begins; the events that it returns are handled before the pipeline ends."""
        return ()

    async def backlog(self) -> Backlog | None:
        """What waits where the events come from; None: it cannot be said."""
        return None

    # -- what a pipeline and its users call ----------------------------------------------------------------------

    async def open(self) -> Source:
        """A new source of this feed: what `Pipeline` takes. Several may be open at once; each event goes to one."""
        return FeedSource(self, self._ledger)

    def overrides(self, name: str) -> bool:
        """Whether a method of this class is overridden."""
        return getattr(type(self), name) is not getattr(Feed, name)

    async def finished(self) -> None:
        """Return when the feed has come to its end and every message of it has ended for good."""
        await self._ledger.finished.wait()

    @cached_property
    def _ledger(self) -> Ledger:
        return Ledger()


class _Iterated(Feed):
    def __init__(self, events: AsyncIterable[Any] | Iterable[Any], publish: Publish | None) -> None:
        self._pump = Pump(events)
        self._publish = publish

    async def fetch(self, demand: int) -> Sequence[Any] | None:
        return await self._pump.take(demand)

    @property
    def publishes(self) -> bool:
        return self._publish is not None

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        await (super().publish if self._publish is None else self._publish)(messages)
