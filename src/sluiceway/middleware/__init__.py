"""Middleware: one function type, for messages and for batches, and how it is composed.

A middleware takes the message and the next step, and returns what the next step returns:

    async def timed(message: Message[Any], call_next: Handler) -> Any:
        started = time.monotonic()
        try:
            return await call_next(message)
        finally:
            print(time.monotonic() - started)

The modules of this package are the built-in ones; each is imported by who uses it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypeVar

from msgspec import Struct

from ..batch import Batch, BatchHandler
from ..errors import OptionError
from ..message import Handler, Message

S = TypeVar("S")  # what is handled: a message or a batch
Step = Callable[[S], Awaitable[Any]]


class ConsumerInfo(Struct, frozen=True, kw_only=True):
    """What a middleware made for one consumer may know of it.

    - `name`, `group`: the consumer's.
    - `batchers`: the names of its batchers; `batcher`: the one whose batches are handled, None round the handler.
    - `is_async`: whether its handler runs on the loop; else it runs on threads, which nobody can cancel.
    - `payload_type`: what its handler says the payload is.
    - `decoder(format)`: what turns a body in "json" or "msgpack" into that type, and raises DecodeError. Raises
      OptionError for a type that cannot be read from that format.
    - `stats()`: the PipelineStats of this moment, or None.
    """

    name: str
    group: str
    batchers: tuple[str, ...]
    is_async: bool
    payload_type: Any
    decoder: Callable[[Literal["json", "msgpack"]], Callable[[bytes], Any]]
    stats: Callable[[], Any]
    batcher: str | None = None


class MiddlewareFor(Protocol):
    """A middleware that is made for each consumer: `for_consumer` is asked when its pipeline is made.

    One whose `decodes` is true sets `message.payload` itself; it finds the body there, undecoded.
    """

    def for_consumer(self, consumer: ConsumerInfo) -> Callable[[Message[Any], Handler], Awaitable[Any]]: ...


class BatchMiddlewareFor(Protocol):
    """A batch middleware that is made for each batcher of a consumer, when its pipeline is made."""

    def for_consumer(self, consumer: ConsumerInfo) -> Callable[[Batch[Any], BatchHandler], Awaitable[Any]]: ...


Middleware = Callable[[Message[Any], Handler], Awaitable[Any]] | MiddlewareFor
"""Takes a message and the next step; what it raises fails the message, what it returns is the message's value.

It may answer without the next step, whose handler is skipped then, and call it again, which runs the handler again.
"""

BatchMiddleware = Callable[[Batch[Any], BatchHandler], Awaitable[Any]] | BatchMiddlewareFor
"""Takes a batch and the next step; what it raises fails the whole batch, what it returns is of no account.

It may hand on a batch with fewer messages; those left out end as successes unless they fail by `message.fail`.
"""


def compose(middlewares: Sequence[Callable[[S, Step[S]], Awaitable[Any]]], handler: Step[S]) -> Step[S]:
    """The handler with the middlewares round it; the first is the outermost.

    One that has a method `around(call_next)` makes its step itself, which saves a call per message.
    """
    for middleware in reversed(middlewares):
        around = getattr(middleware, "around", None)
        handler = _around(middleware, handler) if around is None else around(handler)
    return handler


def _around(middleware: Callable[[S, Step[S]], Awaitable[Any]], call_next: Step[S]) -> Step[S]:
    def step(subject: S) -> Awaitable[Any]:  # a closure: a sixth cheaper per layer than functools.partial
        return middleware(subject, call_next)

    return step


def made_for(consumer: ConsumerInfo, middlewares: Iterable[Any]) -> list[Any]:
    """The middlewares as functions, each made for `consumer` that can be."""
    return [one.for_consumer(consumer) if hasattr(one, "for_consumer") else one for one in middlewares]


def refuse_batches(what: str, consumer: ConsumerInfo) -> None:
    """Raise OptionError where a middleware of messages stands among those of batches."""
    if consumer.batcher is not None:
        raise OptionError(f"{consumer.name}: {what} goes round messages; move it from batch_middleware to middleware")


def decodes(middlewares: Iterable[Any]) -> bool:
    """Whether one of the middlewares makes the payload, so that the processor leaves the body as it is."""
    return any(getattr(one, "decodes", False) for one in middlewares)
