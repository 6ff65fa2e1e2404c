"""From a failure to a settlement."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from ..errors import DecodeError, Directive, Reject, Release, RetryLater, SluicewayError
from ..message import Ending, Message, Outgoing, Reason, Settlement
from ..retry import Retry
from .backoff import retry_delay
from .topics import dead_letter_topic

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
MAX_REASON = 8 * 1024  # bytes: AMQP headers fit one frame, Kafka and NATS have message limits
DEAD_PREFIX = "sluiceway-dead-"  # the headers that a dead letter has beyond its message's own
TRACEBACK = (
    "__sluiceway_traceback__"  # the attribute in which an error from a worker process has its traceback, as text
)


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
    if message.ending is not None:
        rules = _changed(rules, message.ending, error)
    said = None if message.ending is None or isinstance(error, Directive) else message.ending.on_failure
    if isinstance(error, Release) or said == "release":
        return Settlement(message, "release", counted=False)
    if said in ("dead_letter", "drop"):
        return give_up(message, error, rules, now=now)
    if isinstance(error, RetryLater) and not error.counted:
        return Settlement(message, "retry", _later(message, error, rules, draw), counted=False)
    hopeless = isinstance(error, (Reject, DecodeError, *rules.retry.never))
    if hopeless or (message.attempt >= rules.retry.attempts and rules.exhausted != "retry"):
        return give_up(message, error, rules, now=now)
    return Settlement(message, "retry", _later(message, error, rules, draw), reason=reason_of(error))


def settle_success(message: Message[Any], rules: FailureRules, *, now: float) -> Settlement | None:
    """How a message ends whose handler succeeded; None: a plain ack. `now` is in seconds since 1970."""
    said = "ack" if message.ending is None else message.ending.on_success
    if said == "release":
        return Settlement(message, "release", counted=False)
    if said == "dead_letter":
        reason = Reject("it succeeded, and was configured to end here")
        return give_up(message, reason, replace(rules, exhausted="dead_letter"), now=now)
    return Settlement(message, "ack", outputs=tuple(message.outputs)) if message.outputs else None


def _changed(rules: FailureRules, ending: Ending, error: BaseException) -> FailureRules:
    """The rules for one message: what it was configured to, over its consumer's."""
    if ending.retry is not None:
        rules = replace(rules, retry=ending.retry)
    if ending.on_failure in ("dead_letter", "drop", "retry") and not isinstance(error, Directive):
        rules = replace(rules, exhausted=ending.on_failure)
    return rules


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


def unusable(what: str, error: BaseException) -> BaseException:
    """The failure of an event that `what` could not make a message of: hopeless, for its attempts cannot be counted."""
    if isinstance(error, (Directive, DecodeError, KeyboardInterrupt)):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    failure = DecodeError(f"{what} raised {type(error).__name__}: {_safely(str, error)}{where}")
    failure.__cause__ = error
    return failure


def without_dead_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that a dead letter's message had before it died."""
    return {name: value for name, value in headers.items() if not name.startswith(DEAD_PREFIX)}


def reason_of(error: BaseException) -> Reason:
    """What is kept of an error: type, text and traceback, at most 8 KiB in all, cut in the middle."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    trace = "" if isinstance(error, Reject) else _cut(_safely(_traceback, error), MAX_REASON - MAX_REASON // 4 - 512)
    return Reason(_cut(name, 256), _cut(_safely(str, error), MAX_REASON // 4), trace)


def explain(error: BaseException) -> None:
    """Note what to write instead of `await message.publish(...)`: Python only says that None is not awaited."""
    if type(error) is not TypeError or "NoneType" not in (text := _safely(str, error)) or "await" not in text:
        return
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and "publish" in trace.tb_frame.f_code.co_names:
        error.add_note(
            "message.publish(...) is not awaited: it goes out when its message is settled. Write it without await, "
            "or publish at once with `await app.publish(...)`."
        )


def users_traceback(error: BaseException) -> TracebackType | None:
    """The traceback without our own frames in front of the user's line.

    Where it has no others: None for an error of ours, whose text says it all; else the whole, since what one of the
    user's functions returned may have been wrong.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        trace = trace.tb_next
    ours = isinstance(error, (SluicewayError, Directive))
    return error.__traceback__ if trace is None and not ours else trace


def remote_traceback(error: BaseException) -> str:
    """The text of the traceback that an error from a worker process has; "" when it has none."""
    text: str = vars(error).get(TRACEBACK, "")
    return text


def _traceback(error: BaseException) -> str:
    return remote_traceback(error) or "".join(
        traceback.format_exception(type(error), error, users_traceback(error), limit=-20)
    )


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
