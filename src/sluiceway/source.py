"""The contract of a source: one subscription, pulled by demand.

What each side may rely on:

- The runtime makes one `receive` call at a time and never cancels it. After `stop()` it returns promptly with what has
  arrived, perhaps nothing, and everything it returns is settled.
- `settle` is called by two tasks at most: one with acks alone, one with everything else, each one call at a time.
- A source whose `settle` never waits, since its broker is in this process, may say so with `settles_at_once = True`.
- A source may return a message that it could not make properly, with its `error` set: the runtime fails it as if its
  handler had raised that. Such a source says so with `returns_failed = True`.
- The runtime settles each delivery once. When `settle` raises, the runtime calls it again with the same messages; a
  source makes that harmless (fenced by owner and token, or dropped because the scope died).
- Messages received and not settled never exceed the demand asked for, so a source that obeys `demand` cannot overrun a
  window.
- A source reconnects by itself, with capped and jittered backoff, and says so in `status()`. It raises from `receive`
  only what it cannot mend; the pipeline then starts anew with a new source.

A source may have two methods more, which are looked up once:

- `async prepare_for_start(info: SourceInfo)` is awaited before the first `receive`. What it raises is a failed start.
- `async prepare_for_draining()` is awaited when a drain begins, while no `receive` waits. Then comes `stop()`, and
  after it `receive` is called until it returns nothing. What it returns there is handled, where a drain releases all
  else that has not started. It is not awaited when `receive` itself has raised, and its last messages are not asked
  for when a gate is closed. When it raises, that is logged and the drain goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from msgspec import Struct

from .message import Message, Refused, Scope, Settlement

Start = Literal["earliest", "latest"] | datetime
OrderBy = Literal["key"]
OnRevoke = Callable[[frozenset[Scope], float | None], Awaitable[None]]
TokenT = TypeVar("TokenT")


async def ignore_revoke(scopes: frozenset[Scope], seconds: float | None) -> None:
    """For brokers that never take a scope away."""


class Subscription(Struct, frozen=True, kw_only=True):
    """What a source is opened for.

    `topics` in one pattern language (`*` one word, `#` any number). `group`: each group gets every message once, its
    members share them. `window`: the most messages ever held; `max_bytes`: body bytes after which one `receive` should
    stop adding. `start`: where a group that the broker has never seen begins. `order_by`: the source hands out one
    message of a key only when no earlier one of it is held elsewhere or waits for its retry. `on_revoke(scopes,
    seconds)`: scopes are being taken away, in so many seconds; None: they are gone.
    """

    topics: tuple[str, ...]
    group: str
    window: int
    max_bytes: int = 64 * 1024 * 1024
    start: Start = "earliest"
    order_by: OrderBy | None = None
    on_revoke: OnRevoke = ignore_revoke


class SourceInfo(Struct, frozen=True, kw_only=True):
    """For which place in a pipeline a source is opened.

    It is number `index`, from 0, of the `count` sources of `pipeline`, for these topics and this group. A source that
    is opened again after a crash gets the same index. `options` are the consumer's effective options, by name.
    """

    pipeline: str
    topics: tuple[str, ...]
    group: str
    index: int = 0
    count: int = 1
    options: Mapping[str, Any] = {}


class SourceStatus(Struct, frozen=True, kw_only=True):
    """How a source is. `since`: seconds since 1970; `error`: the last one, as text."""

    state: Literal["connecting", "running", "paused", "blocked", "stopped"]
    since: float
    error: str | None = None
    scopes: frozenset[Scope] = frozenset()
    held_by_broker: int | None = None


class Backlog(Struct, frozen=True):
    """What waits at the broker.

    - `messages`: how many, also those that wait for a delay, and not those in anyone's hand.
    - `seconds`: the age of the oldest that is due, 0 when none is; None where the broker cannot tell it.
    """

    messages: int
    seconds: float | None


class Renewer(Protocol):
    """Keeps leases alive from a thread that no handler can block. Synchronous, on a connection of its own.

    It goes by `message.token`. No two that are in hand have the same one, also where a pipeline has several sources.
    """

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        """Renew the leases of all tokens in one go; returns those that are lost."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Source(Protocol):
    """One subscription, pulled by demand. See the module's text for what each side may rely on."""

    lease: float | None
    """Seconds a delivery stays ours without renewal; None: as long as the connection lives."""

    renewer: Callable[[], Renewer] | None
    """Picklable; makes a renewer. None: leases need no renewal by the runtime."""

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        """Wait for messages; returns 1 to `demand` of them, or nothing after `stop()` or `resize(0)`."""
        ...

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """End deliveries, in one round trip where there can be. Returns what the broker refused, per message."""
        ...

    async def suspect(self, message: Message[Any]) -> bool:
        """Write down, durably, that a suspect runs alone now.

        `_decisions.suspicion.suspicions_now` says how many suspicions there are then; they explain every death so far.

        True: it is written and `message.suspicions` says so: run it now. False: run nothing; the message is no longer
        ours, or comes again with its suspicion.
        """
        ...

    async def flush(self) -> None:
        """Return when every earlier settle has reached the broker."""
        ...

    def resize(self, window: int) -> None:
        """Change the window. 0 pauses: pushes stop, and what `receive` has not returned goes back."""
        ...

    def stop(self) -> None:
        """Receive nothing more: a waiting `receive` returns. Settling goes on. Idempotent."""
        ...

    def status(self) -> SourceStatus: ...

    async def backlog(self) -> Backlog | None:
        """What waits at the broker for this group; None where it cannot say."""
        ...

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        """Give up the subscription's connection. What is still unsettled goes back to the broker, uncounted where the
        broker can; but for `keep`, which still runs on threads and must not run twice at once: it stays ours until its
        lease or this process ends. Idempotent."""
        ...
