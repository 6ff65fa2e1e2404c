"""The words of the flow: messages in, messages out, and the ways a delivery ends."""

from __future__ import annotations

import enum
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import Struct

from .errors import AlreadySettled, MessageFailed, OptionError
from .retry import Retry

T = TypeVar("T")
R = TypeVar("R")

Scope = Hashable
"""What dies together: a connection epoch, or (topic, partition, generation). A settle of a dead scope is dropped."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
DEFAULT_BATCHER = "default"

Outcome = Literal["ack", "retry", "dead_letter", "release", "park"]
OnSuccess = Literal["ack", "dead_letter", "release"]
OnFailure = Literal["retry", "dead_letter", "drop", "release"]


class State(enum.IntEnum):
    """Where a delivery stands. It only moves forward, and reaches SETTLED once.

    RUNNING: its handler was entered; also while it is in a batch. SETTLED: how it ends is decided, once and for all.
    Whether the broker has it is for the settler's `held` to say: one more attribute written per message would cost 4 %
    of the whole path.
    """

    QUEUED = 0
    RUNNING = 1
    SETTLED = 2


QUEUED, RUNNING, SETTLED = (int(state) for state in State)  # plain ints: the hot path compares them


class _IdMaker:
    """Ids that no other process makes: a random prefix per process and a counter; 0.1 µs where uuid4 takes 1.5."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        self._prefix = os.urandom(9).hex()
        self._count = 0

    def __call__(self) -> str:
        self._count += 1
        return f"{self._prefix}-{self._count:x}"


new_id = _IdMaker()


class Outgoing(Struct, eq=False, gc=False):  # it can hold no cycle, and publishing makes many
    """A message on its way to a broker.

    `topic` is where it goes; `body` its bytes. `key` orders and partitions it. `id` is stable: it stays with the
    message through retries and dead letters. `timestamp` is seconds since 1970. `delay` seconds pass before anyone
    receives it. With `group` only that group receives it, which is how retries and replays reach the group that
    failed and no other.
    """

    topic: str
    body: bytes
    key: str | None = None
    headers: Mapping[str, str] = NO_HEADERS
    id: str = msgspec.field(default_factory=new_id)
    timestamp: float = msgspec.field(default_factory=time.time)
    delay: float = 0.0
    group: str | None = None


_WORD = re.compile(r"[A-Za-z0-9_\-:/@+=~]+")


def check_topic(topic: object, *, pattern: bool) -> str:
    """Return `topic`, or raise OptionError that says what is wrong with it."""
    if not isinstance(topic, str) or not topic:
        raise OptionError(f"topic must be a non-empty string, got {topic!r}")
    return _check_words(topic, pattern)


@lru_cache(maxsize=10_000)
def _check_words(topic: str, pattern: bool) -> str:
    for word in topic.split("."):
        if word in ("*", "#"):
            if not pattern:
                raise OptionError(f"topic {topic!r} is a pattern; a message is published to one topic")
        elif not _WORD.fullmatch(word):
            raise OptionError(
                f"topic {topic!r} has the word {word!r}; words are letters, digits and any of _-:/@+=~, joined by dots"
            )
    return topic


def make_outgoing(
    topic: str, body: bytes, *, key: str | None = None, headers: Mapping[str, str] | None = None, delay: float = 0.0
) -> Outgoing:
    """A message to publish. Raises OptionError for a topic, key, header or delay that is not allowed."""
    check_topic(topic, pattern=False)
    if key is None and headers is None and delay.__class__ is float and delay == 0.0:
        return Outgoing(topic, body)
    if key is not None and not _is_text(key, "surrogateescape"):
        raise OptionError(f"publish to {topic!r}: key must be a string or None, got {key!r}")
    if not _is_seconds(delay):
        raise OptionError(f"publish to {topic!r}: delay must be 0 or more seconds, got {delay!r}")
    given: Any = headers or {}
    if not isinstance(given, Mapping):
        raise OptionError(f"publish to {topic!r}: headers must be a mapping from strings to strings, got {headers!r}")
    for name, value in given.items():
        if not (_is_text(name) and _is_text(value)):
            raise OptionError(f"publish to {topic!r}: headers are strings, got {name!r}: {value!r}")
    return Outgoing(topic, body, key, dict(headers) if headers else NO_HEADERS, delay=delay)


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _is_text(value: object, errors: str = "strict") -> bool:
    try:
        return isinstance(value, str) and value.encode("utf-8", errors) is not None
    except UnicodeEncodeError:
        return False


PublishHeaders = Callable[[], Mapping[str, str]]
"""Makes headers for a message that is being published here and now, such as those that carry a trace on."""


def with_headers(more: PublishHeaders | None, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """`headers` and those of `more()` that they do not name."""
    if more is None:
        return headers
    given: Any = headers or {}
    return {**more(), **given} if isinstance(given, Mapping) else given  # make_outgoing refuses what is no mapping


class Routing(NamedTuple):
    """Which batch a message goes to, and whether that is emitted at once."""

    batcher: str = DEFAULT_BATCHER
    key: Hashable = None
    flush: bool = False


class Ending(NamedTuple):
    """What `message.configure` said of how its message ends."""

    on_success: OnSuccess = "ack"
    on_failure: OnFailure | None = None
    retry: Retry | None = None


class Settler(Protocol):
    """What a running message can ask of its pipeline."""

    async def settle_now(self, messages: Sequence[Message[Any]]) -> None: ...
    def encode(self, payload: Any) -> bytes: ...
    def with_headers(self, headers: Mapping[str, str] | None) -> Mapping[str, str] | None: ...
    def check_batcher(self, name: str) -> None: ...


class Message(Struct, Generic[T], eq=False, weakref=True):
    """One delivery of one message: what the broker gave, what it was decoded to, and where it stands.

    - `body`: the bytes the broker gave. It never changes; dead letters carry it.
    - `payload`: the body decoded to the consumer's type, set when a processor takes the message.
    - `key`, `headers`: as published. A key that is not UTF-8 is kept by `surrogateescape`.
    - `id`: stable over retries and redeliveries; ours, never the broker's key.
    - `timestamp`: when it was published, seconds since 1970.
    - `attempt`: 1 for the first; 1 + failures + suspicions, both kept by the broker.
    - `value`: what the handler returned; what its batch receives. Before that, what `prepare` left for the handler.
    - `error`: what failed it; None before that, and again when it is settled.
    - `deliveries`: how often the broker handed it over, without releases; evidence, not the count of attempts.
    """

    topic: str
    body: bytes
    id: str
    key: str | None = None
    headers: Mapping[str, str] = NO_HEADERS
    timestamp: float = 0.0
    scope: Scope = None
    token: Any = None  # plain and picklable: another thread or process can renew or settle by it
    deliveries: int = 1
    failures: int = 0
    suspicions: int = 0
    suspect: bool = False  # the transport's word: it was in hand when a process died, and that is not yet written down
    payload: T = None  # type: ignore[assignment]  # set by the processor before any user code sees it
    value: Any = None
    routing: Routing | None = None  # None: the default batcher, no key of its own, no flush
    error: BaseException | None = None
    state: int = QUEUED
    outputs: list[Outgoing] | None = None
    settler: Settler | None = None
    ending: Ending | None = None  # None: as the consumer's options say

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1: 1 + failures + suspicions."""
        return 1 + self.failures + self.suspicions

    @property
    def published_at(self) -> datetime:
        """`timestamp` as an aware datetime in UTC."""
        return datetime.fromtimestamp(self.timestamp, UTC)

    def to(self, batcher: str = DEFAULT_BATCHER, *, key: Hashable = None, flush: bool = False) -> None:
        """Send the message to `batcher` once its handler returns.

        Messages of one `key` share batches; with `flush` the batch is emitted at once, with all that is in it: every
        message of the key whose handler returned before. Those still being handled go to the next batch.
        Raises RoutingError, here and now, when there is no such batcher, and TypeError for a key without a hash.
        A later call replaces an earlier one.
        """
        hash(key)
        if self.settler is not None:
            self.settler.check_batcher(batcher)
        self.routing = Routing(batcher, key, flush)

    def fail(self, error: BaseException | type[BaseException] | str) -> None:
        """Fail this message: in a batch handler exactly what `raise error` is in a handler.

        A string stands for an exception with that text. The last call counts. Raises AlreadySettled when the message
        was settled.
        """
        if self.state >= SETTLED:
            raise AlreadySettled(f"message {self.id} of {self.topic!r} is settled already and cannot fail any more")
        if isinstance(error, type) and issubclass(error, BaseException):
            error = error()  # as `raise` does
        self.error = error if isinstance(error, BaseException) else MessageFailed(error)

    def configure(
        self,
        *,
        on_success: OnSuccess = "ack",
        on_failure: OnFailure | None = None,
        retry: Retry | None = None,
    ) -> None:
        """Change how this delivery ends; call it in the handler, in `prepare`, or in the batch handler.

        `on_success`: "ack"; "dead_letter", where the message goes though it succeeded; or "release", which hands it
        back untouched. What it published goes out with an ack only.

        `on_failure`: "dead_letter" at this failure, whatever attempts are left; "drop", which loses the message with an
        error in the log; "retry", also when the attempts are used up; "release", which hands it back and counts
        nothing. None: as the consumer's options say. `retry` takes the place of the consumer's for this failure.
        Reject, RetryLater, Release and what `handle_error` answers come before all these.

        A later call replaces an earlier one. A delivery that comes again knows nothing of it. Raises OptionError, here
        and now, for a value that is not allowed, and AlreadySettled when the message was settled.
        """
        for name, value, allowed in (
            ("on_success", on_success, ("ack", "dead_letter", "release")),
            ("on_failure", on_failure, (None, "retry", "dead_letter", "drop", "release")),
        ):
            if value not in allowed:
                listed = ", ".join(map(repr, allowed))
                raise OptionError(f"message.configure: {name} must be one of {listed}; got {value!r}")
        if not (retry is None or isinstance(retry, Retry)):
            raise OptionError(f"message.configure: retry must be a Retry(...) or None; got {retry!r}")
        if self.state >= SETTLED:
            raise AlreadySettled(f"message {self.id} of {self.topic!r} is settled already; configure it before")
        self.ending = Ending(on_success, on_failure, retry)
        if self.outputs is None:
            self.outputs = []  # not None sends a success the long way, which looks at `ending`

    def publish(
        self,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
    ) -> None:
        """Publish together with this message's settle: atomic where the broker can, else confirmed before the ack.

        It only notes what goes out, so it is not awaited. Nothing is published when the handler fails. `payload` is
        encoded now; `delay` is in seconds. Raises OptionError and PayloadTooLarge, here and now, for what no broker
        takes.
        """
        if self.settler is None:
            raise AlreadySettled(f"message {self.id} is not in a running pipeline; use app.publish")
        if self.state >= SETTLED:
            raise AlreadySettled(f"message {self.id} of {self.topic!r} is settled already; use app.publish")
        body = self.settler.encode(payload)
        outgoing = make_outgoing(topic, body, key=key, headers=self.settler.with_headers(headers), delay=delay)
        self.outputs = [*(self.outputs or ()), outgoing]

    async def ack(self) -> None:
        """Settle the message as a success now; what its handler does later no longer counts.

        Returns when the broker has taken it. Raises AlreadySettled when it was settled before.
        """
        if self.settler is None:
            raise AlreadySettled(f"message {self.id} of {self.topic!r} is not in a running pipeline; nothing to settle")
        if self.state >= SETTLED:
            raise AlreadySettled(f"message {self.id} of {self.topic!r} is settled already")
        await self.settler.settle_now((self,))


class Reason(Struct, frozen=True):
    """Why a message failed: what its dead letter says. All texts together stay within 8 KiB."""

    type: str
    message: str
    traceback: str = ""


class Settlement(Struct, eq=False):
    """How one delivery ends, for everything but a plain ack.

    - `retry`: again after `delay` seconds; `failures` grows by one when `counted`. Suspicions end, since the handler
      did.
    - `dead_letter`: `outputs` holds the dead letter (none: drop it); the delivery ends when the broker has it.
    - `release`: back to the broker untouched, to come again after `delay` seconds.
    - `park`: back to the broker until the earlier message of its key is settled for good; a retry of that one keeps it
      waiting, and with no earlier one it comes straight back.
    - `ack`: a success that has `outputs`.

    `outputs` are published with the settle: in one transaction if the transport is atomic, else confirmed first.
    """

    message: Message[Any]
    outcome: Outcome
    delay: float = 0.0
    counted: bool = True
    reason: Reason | None = None
    outputs: tuple[Outgoing, ...] = ()


class Refused(Struct, eq=False):
    """A delivery that the broker did not let us settle.

    `lost`: its lease or scope is gone, another consumer has it; nothing more to do. `rejected`: the broker would not
    take what belongs to the settle (a dead letter over its size limit, a full disk); the delivery stays ours.
    """

    message: Message[Any]
    kind: Literal["lost", "rejected"]
    detail: str = ""


class Stored(Struct, eq=False):
    """A message at rest in a topic, as `browse` shows it. `position` is the broker's own and opaque."""

    position: str
    topic: str
    body: bytes
    id: str
    key: str | None = None
    headers: Mapping[str, str] = NO_HEADERS
    timestamp: float = 0.0


Handler = Callable[[Message[Any]], Awaitable[Any]]
"""What a processor runs for one message: middleware and the user's handler, composed."""
