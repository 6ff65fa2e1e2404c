"""The contract of a transport: one broker's adapter. All that differs between brokers is behind it and `source`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, Protocol, Self, runtime_checkable

from msgspec import Struct
from msgspec.structs import replace

from .errors import PayloadTooLarge
from .message import Outgoing, Stored
from .source import Source, Subscription


class Features(Struct, frozen=True, kw_only=True):
    """What a broker gives. The runtime asks these, never which broker it has.

    - `durable`: a publish that returned survives the death of every process.
    - `retains`: messages are kept whether a group wants them or not: one that was published before there is any group
      waits for it, and a group may `start` before it was made. Without it a publish that no group wants raises
      PublishError, a group begins when it is made (another `start` is refused), and only dead letters wait unwanted.
    - `order`: how far `order_by` holds: not at all, within one process, or over the whole group.
    - `delay`: how a delayed message waits: natively, on a ladder of delay queues, on retry topics, or not at all.
    - `atomic`: outputs and settle are one transaction.
    - `park`: a message can be handed back until the earlier one of its key is settled, and really waits at the broker;
      one that only requeues would have it back at once, again and again.
    - `release`: a message can be handed back at once, uncounted.
    - `lease`: a delivery comes back when it is not renewed.
    - `max_payload`: body bytes, the most one message may have.
    - `wildcards`: topics may be patterns.
    - `browse`: messages at rest can be read without consuming them.
    - `backlog`: the broker can say what waits.
    - `shares`: the processes of a group share its messages one by one; else each has whole partitions, and others get
      what is in them when it leaves or stands still.
    """

    durable: bool
    retains: bool
    order: Literal["none", "process", "group"]
    delay: Literal["native", "ladder", "topic", "none"]
    atomic: bool
    park: bool
    release: bool
    lease: bool
    max_payload: int
    wildcards: bool
    browse: bool
    backlog: bool
    shares: bool = True

    @classmethod
    def all_but(cls, *, max_payload: int, **lacking: Any) -> Self:
        """Of a broker that gives everything, with order over the whole group, but for what is said. Raises TypeError
        for a feature that there is not."""
        everything = cls(
            durable=True, retains=True, order="group", delay="native", atomic=True, park=True, release=True,
            lease=True, max_payload=max_payload, wildcards=True, browse=True, backlog=True,
        )  # fmt: skip
        return replace(everything, **lacking)

    def check_sizes(self, messages: Sequence[Outgoing]) -> None:
        """Raise PayloadTooLarge when one of them has a larger body than `max_payload`."""
        large = [message for message in messages if len(message.body) > self.max_payload]
        if large:
            first = large[0]
            raise PayloadTooLarge(
                f"message {first.id} to {first.topic!r} has a body of {len(first.body)} bytes and the limit is "
                f"{self.max_payload} (max_payload); nothing of the call was published",
                large,
            )


class Finding(Struct, frozen=True):
    """Something that `ensure` saw at the broker. An `error` stops the start; a `warning` is logged."""

    level: Literal["info", "warning", "error"]
    text: str


@runtime_checkable
class Transport(Protocol):
    """One broker's adapter: connects, publishes, subscribes.

    It may have one method more, which is looked up: `async dead_letter_topics() -> Sequence[str]`, the dead-letter
    topics (last word `dead`) that there are. Without it those of a pattern's consumer have to be named one by one.

    A topic is words joined by dots. In a subscription `*` stands for one word and `#` for any number of words; a
    pattern never matches a dead-letter topic (last word `dead`), which must be named in full. Within a group a message
    reaches one subscription: the exact topic before a pattern.
    """

    features: Features

    async def connect(self) -> None:
        """Open the broker. Raises ConnectError that says what to do. Idempotent."""
        ...

    async def ensure(self, subscriptions: Sequence[Subscription], *, create: bool) -> Sequence[Finding]:
        """Make sure that topics, groups and what retries need are there; with `create` make what is missing.

        An app asks once for all consumers that start with it. What is found names the group and the topic.
        """
        ...

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish, in order. Durable when it returns (where the broker is). Raises PublishError with `.failed`."""
        ...

    async def subscribe(self, subscription: Subscription) -> Source:
        """Open a source. The group exists when this returns: what is published from now on reaches it."""
        ...

    def browse(self, topic: str, *, after: str | None = None) -> AsyncIterator[Stored]:
        """The messages at rest in `topic`, oldest first, from behind position `after`. Consumes nothing."""
        ...

    async def remove(self, stored: Sequence[Stored]) -> None:
        """Delete messages that `browse` showed. One that is gone already is no error."""
        ...

    async def aclose(self) -> None:
        """Close all connections. Sources must be closed before. Idempotent."""
        ...
