"""One message, or some, through a consumer: what was acked, and what failed and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from msgspec import Struct

from .._decisions.topics import is_pattern, matches
from ..app import App
from ..batch import Batch
from ..codec import encode
from ..consumer import ConsumerDef
from ..errors import AppError, OptionError
from ..message import Outgoing, make_outgoing
from ..signatures import NO_CONTEXT
from ..transports.memory import MemoryTransport
from .harness import harnessed
from .observing import as_app
from .record import Delivery, Recorder

F = TypeVar("F", bound=Callable[..., Any])


class Result(Struct, frozen=True, kw_only=True):
    """How the messages of `test_batch` ended.

    - `deliveries`: one for each payload, in the order given.
    - `batches`: those whose batch handler was called, in that order.
    - `published`: what handlers published, by `app.publish` and `message.publish`, in order.
    """

    deliveries: tuple[Delivery, ...]
    batches: tuple[Batch[Any], ...] = ()
    published: tuple[Outgoing, ...] = ()

    @property
    def acked(self) -> list[Delivery]:
        """Those that succeeded."""
        return [one for one in self.deliveries if one.outcome == "ack"]

    @property
    def failed(self) -> list[Delivery]:
        """Those that did not: retried, dead-lettered, released or parked."""
        return [one for one in self.deliveries if one.outcome != "ack"]


def _no_test(function: F) -> F:
    """Its name begins with `test_`, and a test module imports it: pytest must not take it for a test."""
    function.__test__ = False  # type: ignore[attr-defined]
    return function


@_no_test
async def test_message(
    target: Any,
    payload: Any,
    *,
    topic: str | None = None,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    attempt: int = 1,
    context: Any = NO_CONTEXT,
) -> Delivery:
    """Send one message through a consumer and return how its delivery ended; a batch goes at once.

    `target` is a consumer, or an app that has one for `topic` (not needed when it has a single one). Give the app when
    a handler uses it: what `app.publish` sends is caught then, and is in `published` of what is returned. `payload`
    becomes JSON, bytes go as they are. `attempt` is the number of this attempt. `context` is handed to the handlers in
    place of what the app's lifespan yields.

    The message is delivered once: what would be tried again is not. Raises OptionError and AppError.
    """
    result = await _deliver(target, [(payload, key)], topic, headers, attempt, context, flush=True)
    (delivery,) = result.deliveries
    delivery.published = result.published
    return delivery


@_no_test
async def test_batch(
    target: Any,
    payloads: Iterable[Any],
    *,
    mode: Literal["bulk", "flush"] = "bulk",
    topic: str | None = None,
    key: Callable[[Any], str | None] | None = None,
    headers: Mapping[str, str] | None = None,
    attempt: int = 1,
    context: Any = NO_CONTEXT,
) -> Result:
    """Send messages through a consumer, all at once and in order, and return how each delivery ended.

    `mode`: with `bulk` batches go as in production, when they are full or their timeout has passed, which takes no time
    in virtual time; with `flush` they go once all messages are handled. `key` makes the key of each payload. The rest
    is as with `test_message`.
    """
    if mode not in ("bulk", "flush"):
        raise OptionError(f"test_batch: mode must be 'bulk' or 'flush', got {mode!r}")
    messages = [(payload, key(payload) if key is not None else None) for payload in payloads]
    return await _deliver(target, messages, topic, headers, attempt, context, flush=mode == "flush")


async def _deliver(
    target: Any,
    messages: list[tuple[Any, str | None]],
    topic: str | None,
    headers: Mapping[str, str] | None,
    attempt: int,
    context: Any,
    *,
    flush: bool,
) -> Result:
    if not (type(attempt) is int and attempt >= 1):
        raise OptionError(f"attempt must be a whole number, 1 or more; got {attempt!r}")
    app = as_app(target)
    consumer, topic = _destination(app, topic)
    outgoing = [make_outgoing(topic, encode(one), key=key, headers=headers) for one, key in messages]
    recorder = Recorder(MemoryTransport(), once=True, attempt=attempt)
    async with harnessed(app, (consumer.name,), recorder, context=context) as harness:
        await recorder.wrapped.publish(outgoing)

        def settled() -> bool:
            done = len(recorder.deliveries)
            if flush and done < len(outgoing):
                (stats,) = [one for one in harness.manager.stats() if one.consumer == consumer.name]
                if stats.forming and stats.forming + done == len(outgoing):
                    harness.flush(consumer.name)
            return done == len(outgoing)

        await harness.until(settled)
    by_id = {one.message.id: one for one in recorder.deliveries}
    return Result(
        deliveries=tuple(by_id[one.id] for one in outgoing),
        batches=tuple(recorder.batches),
        published=tuple(recorder.published),
    )


def _destination(app: App, topic: str | None) -> tuple[ConsumerDef, str]:
    """The consumer meant, and the topic to publish to."""
    consumers = list(app.consumers.values())
    if topic is not None:
        consumers = [one for one in consumers if any(matches(pattern, topic) for pattern in one.topics)]
    if len(consumers) != 1:
        known = ", ".join(f"{one.name} on {', '.join(one.topics)}" for one in app.consumers.values()) or "none"
        found = "none" if not consumers else f"{len(consumers)}"
        where = "a topic is needed to choose a consumer" if topic is None else f"topic {topic!r} reaches {found}"
        raise AppError(f"one message is for one consumer: {where}; consumers: {known}. Hand in the consumer itself")
    (consumer,) = consumers
    if topic is None:
        topic = next((one for one in consumer.topics if not is_pattern(one)), None)
    if topic is None:
        raise AppError(f"{consumer.name} reads {', '.join(consumer.topics)}: say topic=... that the message comes by")
    return consumer, topic
