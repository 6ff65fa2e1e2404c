"""From a failure to a settlement."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from msgspec import Struct

from ..errors import DecodeError, Reject, Release, RetryLater
from ..message import Message, Outgoing, Reason, Settlement
from ..retry import Retry
from .backoff import retry_delay
from .topics import dead_letter_topic

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
MAX_REASON = 8 * 1024  # bytes: AMQP headers fit one frame, Kafka and NATS have message limits
DEAD_PREFIX = "sluiceway-dead-"  # the headers that a dead letter has beyond its message's own


class FailureRules(Struct, frozen=True, kw_only=True):
    """What a consumer says about failures. `exhausted`: what happens when the attempts are used up."""

    consumer: str
    group: str
    retry: Retry
    dead_letter_topic: str | None = None  # None: {topic}.{group}.dead
    exhausted: Literal["dead_letter", "drop", "retry"] = "dead_letter"


def settle_failure(
    message: Message[Any], error: BaseException, rules: FailureRules, *, draw: float, now: float
) -> Settlement:
    """How a failed message ends. `draw` is a random number between 0 and 1, `now` seconds since 1970."""
    if isinstance(error, Release):
        return Settlement(message, "release", counted=False)
    if isinstance(error, RetryLater) and not error.counted:
        return Settlement(message, "retry", _later(message, error, rules, draw), counted=False)
    hopeless = isinstance(error, (Reject, DecodeError, *rules.retry.never))
    if hopeless or (message.attempt >= rules.retry.attempts and rules.exhausted != "retry"):
        return give_up(message, error, rules, now=now)
    return Settlement(message, "retry", _later(message, error, rules, draw), reason=reason_of(error))


def give_up(message: Message[Any], error: BaseException, rules: FailureRules, *, now: float) -> Settlement:
    """The settlement of a message that is not tried again: its dead letter, or nothing with `exhausted="drop"`."""
    reason = reason_of(error)
    if rules.exhausted == "drop":
        return Settlement(message, "dead_letter", reason=reason)
    return Settlement(message, "dead_letter", reason=reason, outputs=(dead_letter(message, reason, rules, now),))


def dead_letter(message: Message[Any], reason: Reason, rules: FailureRules, now: float) -> Outgoing:
    """The dead letter of a message: its own body, key, id and headers, and beside them why, where and when."""
    why = {
        "type": reason.type,
        "error": reason.message,
        "traceback": reason.traceback,
        "topic": message.topic,
        "group": rules.group,
        "consumer": rules.consumer,
        "attempts": str(message.attempt),
        "deliveries": str(message.deliveries),
        "published-at": repr(message.timestamp),
        "failed-at": repr(now),
    }
    return Outgoing(
        topic=rules.dead_letter_topic or dead_letter_topic(message.topic, rules.group),
        body=message.body,
        key=message.key,
        headers={**message.headers, **{DEAD_PREFIX + name: value for name, value in why.items()}},
        id=message.id,
        timestamp=now,
    )


def without_dead_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that a dead letter's message had before it died."""
    return {name: value for name, value in headers.items() if not name.startswith(DEAD_PREFIX)}


def reason_of(error: BaseException) -> Reason:
    """What is kept of an error: type, text and traceback, at most 8 KiB in all, cut in the middle."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    trace = "" if isinstance(error, Reject) else _cut(_safely(_traceback, error), MAX_REASON - MAX_REASON // 4 - 512)
    return Reason(_cut(name, 256), _cut(_safely(str, error), MAX_REASON // 4), trace)


def users_traceback(error: BaseException) -> TracebackType | None:
    """The traceback without our own frames in front of the user's line; None when it has no other."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        trace = trace.tb_next
    return trace


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, users_traceback(error), limit=-20))


def _safely(say: Callable[[BaseException], str], error: BaseException) -> str:
    try:
        return say(error)
    except BaseException as other:  # whatever a broken __str__ raises, it must not cost the message its dead letter
        return f"<no text: {type(error).__name__} raised {type(other).__name__} when asked for it>"


def _cut(text: str, limit: int) -> str:
    """`text` in at most `limit` bytes of UTF-8; what is too much goes from the middle."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return data.decode()
    mark = " … "
    half = (limit - len(mark.encode())) // 2
    return data[:half].decode(errors="ignore") + mark + data[-half:].decode(errors="ignore")


def _later(message: Message[Any], error: BaseException, rules: FailureRules, draw: float) -> float:
    if isinstance(error, RetryLater) and error.delay is not None:
        return error.delay
    return retry_delay(rules.retry, message.attempt, draw)
