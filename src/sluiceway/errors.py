"""Every exception Sluiceway raises or understands.

SluicewayError
├── OptionError            an option has a value that is not allowed (also a ValueError)
├── AppError               the app is declared or used wrongly
├── TransportError         a broker cannot do what was asked
│   ├── ConnectError       it cannot be reached, opened or trusted
│   ├── PublishError       some messages were not accepted; `.failed` says which
│   │   └── PayloadTooLarge  a body is over the broker's limit
│   └── Unsupported        the broker lacks a feature that an option needs
├── DecodeError            a body is not what the consumer's payload type says
├── HandlerTimeout         a handler ran longer than the consumer's `timeout` (also a TimeoutError)
├── RoutingError           a message was sent to a batcher that does not exist
├── ForeignMessage         a batch handler failed a message of another batch
├── AlreadySettled         a message was settled before
├── LeaseLost              an early ack came too late: another consumer has the message
├── KilledItsProcess       a message's process died under it
└── PipelineFailed         a pipeline crashed more often than `max_restarts` allows

Directive                  raised by handlers to say how their message ends
├── Reject                 dead letter now, no retry
├── RetryLater             try again after a delay
└── Release                hand back untouched, nothing counted

MessageFailed              what `message.fail("text")` stands for
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any


class SluicewayError(Exception):
    """The root of all errors that Sluiceway raises."""


class OptionError(SluicewayError, ValueError):
    """An option has a name, a type or a value that is not allowed. Raised at definition or at start."""


def unknown(where: str, name: str, known: Iterable[str], kind: str = "option") -> OptionError:
    """The error for a name that is not known, with the nearest right one."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return OptionError(f"{where}: there is no {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}")


class AppError(SluicewayError):
    """The app is declared or used wrongly: two consumers with one name, publishing after close."""


class TransportError(SluicewayError):
    """A broker cannot do what was asked of it."""


class ConnectError(TransportError):
    """The broker cannot be reached, opened or trusted."""


class PublishError(TransportError):
    """Some messages are not confirmed: the broker has them or not. The others were accepted, durably.

    `failed` holds the outgoing messages that are not confirmed, in the order given.
    """

    def __init__(self, message: str, failed: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.failed = tuple(failed)

    @classmethod
    def unconfirmed(cls, failed: Sequence[Any], total: int, why: object) -> PublishError:
        """What a transport raises when `failed` of the `total` messages of a call are not confirmed."""
        messages, are = "message" if total == 1 else "messages", "is" if len(failed) == 1 else "are"
        return cls(f"{len(failed)} of {total} {messages} {are} not confirmed as published: {why}", failed)


class PayloadTooLarge(PublishError):
    """A body is over the broker's limit. Nothing of the call was published."""


class Unsupported(TransportError):
    """The broker lacks a feature that an option needs. Raised at start, never at the first message."""


class DecodeError(SluicewayError):
    """A body is not what the consumer's payload type says. Its message goes to dead letters without a retry."""


class HandlerTimeout(SluicewayError, TimeoutError):
    """A handler ran longer than the consumer's `timeout`."""


class RoutingError(SluicewayError):
    """A message was sent to a batcher that does not exist."""


class ForeignMessage(SluicewayError):
    """A batch handler failed a message that is not of its batch."""


class AlreadySettled(SluicewayError):
    """A message was settled before; a delivery is settled once."""


class LeaseLost(SluicewayError):
    """An early `ack()` came too late: the broker has given the message to another consumer."""


class KilledItsProcess(SluicewayError):
    """A message's process died under it, as often as it has attempts: why its dead letter is one.

    With `executor="process"` each death of a worker process fails the message that it ran with this.
    """


class PipelineFailed(SluicewayError):
    """A pipeline crashed more often than its restart rule allows; the last crash is the cause."""


class Directive(Exception):
    """What a handler raises to say how its message ends. Not an error: it is not logged as one."""


class Reject(Directive):
    """Send the message to dead letters now, without a retry.

    `reason` is kept with the dead letter.
    """

    def __init__(self, reason: str = "rejected") -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(Directive):
    """Try the message again after `delay` seconds (None: what the retry policy says).

    It counts as a failed attempt, so that a message cannot circle for ever; `counted=False` says it must not,
    for a limit that is nobody's fault.
    """

    def __init__(self, delay: float | None = None, reason: str = "retry later", *, counted: bool = True) -> None:
        super().__init__(reason)
        number = isinstance(delay, (int, float)) and not isinstance(delay, bool)
        if delay is not None and not (number and 0 <= delay <= sys.float_info.max):
            raise OptionError(f"RetryLater: delay must be 0 or more seconds, or None; got {delay!r}")
        self.delay = delay
        self.reason = reason
        self.counted = counted

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.delay, self.reason), self.__dict__  # pickle would take `args`, the text alone


class Release(Directive):
    """Hand the message back to the broker untouched: nothing is counted and any consumer may take it."""

    def __init__(self, reason: str = "released") -> None:
        super().__init__(reason)
        self.reason = reason


class MessageFailed(Exception):
    """What `message.fail("text")` stands for: a failure that the user's code tells without an exception of its own."""
