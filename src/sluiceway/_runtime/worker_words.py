"""What a pipeline and its worker processes say to each other: pickled tuples, each with its length before it.

Pickle and not msgpack, which is half a microsecond faster: keys and error texts may hold what is not UTF-8.

To a worker:

- `("run", jobs)`: handle these, in order, after what was sent before.
- `("recall",)`: give back what was not entered.
- `("cancel", number)`: cancel this one, if it runs and can be cancelled.
- `("end",)`: end when nothing is left to do.

From a worker:

- `("ready",)`: the lifespan was entered.
- `("entered", number)`: the handler is about to be entered. Said before, so that a death can be put down to a message.
- `("ended", number, entered, seconds, more, failure)`: the handler ended; `entered` is the next one, or None. `more` is
  a pickled `More`, None when there is nothing to say; `failure` why it failed.
- `("returned", numbers)`: the answer to a recall.
- `("broken", failure)`: the app or its lifespan raised; the process ends.
"""

from __future__ import annotations

import pickle
from struct import Struct as Layout
from typing import Any, NamedTuple

from .._decisions.policy import TRACEBACK, explain, reason_of
from ..errors import MessageFailed
from ..message import NO_HEADERS, RUNNING, Ending, Message, Outgoing, Routing

PROTOCOL = 5
CAUSES = 8  # of an error's causes, how many come along

_LENGTH = Layout("!I")

Job = tuple[Any, ...]  # a message as plain fields, its number first


class More(NamedTuple):
    """What a handler said of its message, beside how it ended."""

    value: Any
    routing: Routing | None
    outputs: list[tuple[Any, ...]] | None
    ending: Ending | None


NOTHING = More(None, None, None, None)


def pack(*word: Any) -> bytes:
    """One word, ready to be sent."""
    data = pickle.dumps(word, PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class Unpacker:
    """Finds the words in what arrives."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[Any, ...]]:
        """The words that are complete with `data`."""
        self._data += data
        words: list[tuple[Any, ...]] = []
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, start)
            end = start + _LENGTH.size + length
            if len(self._data) < end:
                break
            words.append(pickle.loads(memoryview(self._data)[start + _LENGTH.size : end]))
            start = end
        del self._data[:start]
        return words


def job_of(number: int, message: Message[Any]) -> Job:
    """A message as it crosses."""
    return (
        number, message.topic, message.body, message.id, message.key, dict(message.headers) or None, message.timestamp,
        message.deliveries, message.failures, message.suspicions,
    )  # fmt: skip


def message_of(job: Job) -> Message[Any]:
    """The message of a job, in the worker."""
    _, topic, body, id_, key, headers, timestamp, deliveries, failures, suspicions = job
    return Message(
        topic, body, id_, key, headers or NO_HEADERS, timestamp, deliveries=deliveries, failures=failures,
        suspicions=suspicions, state=RUNNING,
    )  # fmt: skip


def fields_of(outgoing: Outgoing) -> tuple[Any, ...]:
    """What a handler published, as it crosses."""
    headers = dict(outgoing.headers) or None
    return (outgoing.topic, outgoing.body, outgoing.key, headers, outgoing.id, outgoing.timestamp, outgoing.delay)


def outgoing_of(fields: tuple[Any, ...]) -> Outgoing:
    topic, body, key, headers, id_, timestamp, delay = fields
    return Outgoing(topic, body, key, headers or NO_HEADERS, id_, timestamp, delay)


class Failure(NamedTuple):
    """An error as it crosses: what it says, and, where that can be, the exception itself."""

    module: str
    name: str
    text: str
    traceback: str
    pickled: bytes | None
    cause: Failure | None


def failure_of(error: BaseException, depth: int = CAUSES) -> Failure:
    """What crosses of an error."""
    explain(error)
    reason = reason_of(error)
    cause = error.__cause__
    return Failure(
        module=type(error).__module__,
        name=type(error).__qualname__,
        text=reason.message,
        traceback=reason.traceback,
        pickled=_pickled(error),
        cause=None if cause is None or depth == 0 else failure_of(cause, depth - 1),
    )


def error_of(failure: Failure) -> BaseException:
    """The exception of a failure, with its cause and the text of its traceback.

    It is of the class that was raised, unless its state cannot cross or its class is not found here: then it is one
    with the same name and text.
    """
    error = None
    if failure.pickled is not None:
        try:
            error = pickle.loads(failure.pickled)
        except Exception:  # whatever a class from elsewhere raises when it is loaded
            error = None
    if not isinstance(error, BaseException):
        names = {"__module__": failure.module, "__qualname__": failure.name}
        error = type(failure.name.rpartition(".")[2], (MessageFailed,), names)(failure.text)
    cause = None if failure.cause is None else error_of(failure.cause)
    for name, value in (("__cause__", cause), (TRACEBACK, failure.traceback)):
        object.__setattr__(error, name, value)  # also where its class lets nobody set anything
    return error


def _pickled(error: BaseException) -> bytes | None:
    """The exception, if what comes out of the pickle is the same: many cannot be made from their `args`."""
    for form in (error, _Rebuilt(error)):
        try:
            data = pickle.dumps(form, PROTOCOL)
            back = pickle.loads(data)
            if type(back) is type(error) and str(back) == str(error):
                return data
        except Exception:  # noqa: S112 - the next form, or none
            continue
    return None


class _Rebuilt:
    """Pickles an exception so that it is made without its `__init__`, from its `args` and attributes."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self._error), self._error.args, self._error.__dict__)


def _rebuild(kind: type[BaseException], arguments: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(state)
    return error
