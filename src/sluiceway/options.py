"""Every option of a consumer, declared once: name, default, meaning, what is allowed.

`ConsumerOptions` is the same list for type checkers; a test holds the two together, and the docs table is made from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import msgspec
from msgspec import Struct

from . import option_checks as checks
from .acknowledger import Acknowledger
from .batch import Split
from .errors import OptionError, unknown
from .gate import Gate
from .middleware import BatchMiddleware, Middleware
from .retry import ByName, Retry
from .source import OrderBy, Start


class Batching(Struct, metaclass=ByName, frozen=True, kw_only=True):
    """One batcher: a batch goes after `size` messages or `timeout` seconds.

    `key(value)` splits it by what the handler returned; `split` makes a batch full before it has its size, by what is
    in it; `concurrency` batches of it run at once. Raises OptionError.
    """

    size: int = 100
    timeout: float = 1.0
    key: Callable[[Any], Hashable] | None = None
    split: Split[Any] | None = None
    concurrency: int = 1

    def __post_init__(self) -> None:
        for name, check in (("size", checks.count), ("timeout", checks.seconds), ("concurrency", checks.count)):
            problem = check(getattr(self, name))
            if problem:
                raise OptionError(f"Batching: {name} must be {problem}, got {getattr(self, name)!r}")
        if self.key is not None and not callable(self.key):
            raise OptionError(f"Batching: key must be a function of what the handler returned, got {self.key!r}")
        if self.split is not None and not isinstance(self.split, Split):
            raise OptionError(f"Batching: split must be a Split(start, step) or Split.bytes(n), got {self.split!r}")


class ConsumerOptions(TypedDict, total=False):
    """The keyword arguments of a consumer. Their meanings and defaults are in `OPTIONS`."""

    name: str
    group: str
    concurrency: int
    executor: Literal["auto", "process"]
    batch_size: int
    batch_timeout: float
    batchers: Mapping[str, Batching]
    retry: Retry
    dead_letter_topic: str
    exhausted: Literal["dead_letter", "drop", "retry"]
    timeout: float | None
    middleware: Sequence[Middleware]
    batch_middleware: Sequence[BatchMiddleware]
    acknowledgers: Sequence[Acknowledger]
    gates: Sequence[Gate]
    order_by: OrderBy | None
    start: Start
    sources: int
    max_demand: int | None
    max_buffer_bytes: int
    max_payload: int | None
    buffer_time: float
    payload: Any


class Option(Struct, frozen=True):
    """One option: its default, what it means, and `check`, which returns what is allowed when a value is not.

    `parse` reads what the command line says. `guarantees` names those of the design that it bears on.
    """

    default: Any
    meaning: str
    check: Callable[[Any], str | None]
    parse: Callable[[str], Any] | None = None
    guarantees: tuple[str, ...] = ()


class Resolved(Struct, frozen=True):
    """An option's effective value and where it comes from: default, consumer, or the command line."""

    value: Any
    origin: Literal["default", "consumer", "command line"]


def _batchers(value: Any) -> str | None:
    good = isinstance(value, Mapping) and all(
        checks.text(name) is None and isinstance(one, Batching) for name, one in value.items()
    )
    return None if good else "a mapping from batcher names to Batching(...)"


OPTIONS: dict[str, Option] = {
    "name": Option(
        None,
        "What the consumer is called in logs, `inspect` and `--set`; the function's or class's name unless given.",
        checks.optional(checks.text),
    ),
    "group": Option(
        None,
        "Each group gets every message once; its members share them. The app's group unless given.",
        checks.optional(checks.topic),
        str,
    ),
    "concurrency": Option(
        10,
        'How many messages are handled at once: tasks, or threads for a plain `def`. With `executor="process"` the '
        "number of worker processes, one per CPU unless given.",
        checks.count,
        int,
        guarantees=("G1",),
    ),
    "executor": Option(
        "auto",
        "Where handlers run: `auto`, an `async def` in the loop and a plain `def` on threads; `process`, both in "
        "worker processes, one message at a time in each: for handlers that keep a CPU busy.",
        checks.one_of("auto", "process"),
        str,
        guarantees=("G7",),
    ),
    "batch_size": Option(100, "Messages in a batch of the default batcher.", checks.count, int, guarantees=("G2",)),
    "batch_timeout": Option(
        1.0,
        "Seconds after which a batch of the default batcher goes though it is not full.",
        checks.seconds,
        float,
        guarantees=("G2",),
    ),
    "batchers": Option({}, "More batchers by name, each a `Batching`.", _batchers, guarantees=("G2",)),
    "retry": Option(
        Retry(),
        "How often and how late a failed message is tried again.",
        checks.instance(Retry, "a Retry(...), like Retry(attempts=3)"),
        guarantees=("G7", "G8"),
    ),
    "dead_letter_topic": Option(
        None,
        "Where messages go that are not tried again; `{topic}.{group}.dead` if not given.",
        checks.optional(checks.topic),
        str,
        guarantees=("G7", "G13"),
    ),
    "exhausted": Option(
        "dead_letter",
        "What happens when the attempts are used up: `dead_letter`; `drop`, which loses "
        "the message with an error in the log; `retry`, which goes on for ever.",
        checks.one_of("dead_letter", "drop", "retry"),
        str,
        guarantees=("G2", "G7"),
    ),
    "timeout": Option(
        None,
        "Seconds that a handler or batch handler may run; None: for ever.",
        checks.optional(checks.seconds),
        float,
        guarantees=("G4",),
    ),
    "middleware": Option(
        (), "Functions round the handler, the first outermost.", checks.middlewares("message", "Logging")
    ),
    "batch_middleware": Option(
        (), "Functions round every batch handler, the first outermost.", checks.middlewares("batch", "Metrics")
    ),
    "acknowledgers": Option(
        (),
        "What is told of every settle, before and after the broker has it.",
        checks.acknowledgers,
        guarantees=("G3",),
    ),
    "gates": Option(
        (),
        "What limits demand from outside: a `RateLimit`, a `CircuitBreaker`, a `Pause`.",
        checks.gates,
        guarantees=("G1",),
    ),
    "order_by": Option(
        None,
        "`key`: messages of one key are handled one at a time, in order, also over retries.",
        checks.one_of("key", None),
        str,
        guarantees=("G9",),
    ),
    "start": Option(
        "earliest",
        "Where a group begins that the broker has never seen: `earliest`, with what is still there; `latest`, with "
        "what comes from then on; or a time.",
        checks.start,
        checks.parse_start,
    ),
    "sources": Option(
        1,
        "How many sources receive side by side for one pipeline, each a subscription of its own; more than 1 where one "
        "connection is the limit.",
        checks.count,
        int,
        guarantees=("G1",),
    ),
    "max_demand": Option(
        None,
        "The window: the most messages held unsettled; None: it follows the measured rate, up to 1,000 or more.",
        checks.optional(checks.count),
        int,
        guarantees=("G1", "G6"),
    ),
    "max_buffer_bytes": Option(64 * 1024 * 1024, "The most body bytes held.", checks.count, int, guarantees=("G12",)),
    "max_payload": Option(
        None,
        "Body bytes over which a message goes to dead letters undecoded; None: the broker's limit.",
        checks.optional(checks.count),
        int,
        guarantees=("G13",),
    ),
    "buffer_time": Option(
        0.25, "Seconds of work that the automatic window holds.", checks.seconds, float, guarantees=("G1",)
    ),
    "payload": Option(
        None, "The payload's type, where it cannot be read from the handler's annotation.", checks.anything
    ),
}


def check_group(where: str, value: Any) -> None:
    """Raise OptionError when `value` cannot be a group: it is a part of its dead-letter topics' names."""
    problem = checks.topic(value)
    if problem:
        raise OptionError(f"{where}: group must be {problem}; got {value!r}")


def resolve(consumer: str, given: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> dict[str, Resolved]:
    """The effective options of a consumer.

    `given` are its own keyword arguments, `overrides` what the command line's `--set` says, as text. Raises OptionError
    that names consumer, option, value and what is allowed.
    """
    result = {name: Resolved(option.default, "default") for name, option in OPTIONS.items()}
    for name, value in given.items():
        result[name] = Resolved(_checked(consumer, name, value), "consumer")
    for name, text in (overrides or {}).items():
        result[name] = Resolved(_checked(consumer, name, _parsed(consumer, name, text)), "command line")
    if result["executor"].value == "process" and result["concurrency"].origin == "default":
        result["concurrency"] = Resolved(_cpus(), "default")
    return result


def _cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What is no option, but looked for as one: what to write instead.
INSTEAD = {
    "acknowledger": "write acknowledgers=[...], a list",
    "ack_deadline": "leases are renewed while a handler runs; timeout=SECONDS limits it",
    "attempts": "write retry=Retry(attempts=N)",
    "batch": "declare it with @{consumer}.batch(size=N), or with handle_batch in a class",
    "batch_concurrency": "write @{consumer}.batch(concurrency=N), or batchers={{'default': Batching(concurrency=N)}}",
    "batch_key": "write @{consumer}.batch(key=...), or batchers={{'default': Batching(key=...)}}",
    "circuit_breaker": "write gates=[CircuitBreaker(...)]",
    "dead_letter": "write dead_letter_topic='TOPIC', or exhausted='drop' or 'retry'",
    "gate": "write gates=[...], a list",
    "handle_batch": "declare it with @{consumer}.batch(size=N), or with a method handle_batch in a class",
    "handle_error": "declare it with @{consumer}.handle_error, or as a method of the class",
    "handle_failed": "declare it with @{consumer}.handle_failed, or as a method of the class",
    "key": "write order_by='key' for order; @{consumer}.batch(key=...) splits batches",
    "lifespan": "write App(lifespan=...)",
    "max_retries": "write retry=Retry(attempts=N), the first attempt included",
    "prefetch": "the window follows the measured rate; max_demand=N pins it",
    "prepare": "declare it with @{consumer}.prepare, or as a method of the class",
    "rate_limit": "write gates=[RateLimit(messages, seconds)]",
    "retry_delay": "write retry=Retry(base_delay=SECONDS)",
    "topic": "name topics first: consumer('TOPIC', ...)",
    "topics": "name topics first: consumer('TOPIC', ...)",
    "workers": "write concurrency=N, or `sluiceway run --workers N` for processes",
}


def _no_option(consumer: str, name: str) -> OptionError:
    if name in INSTEAD:
        return OptionError(f"{consumer}: there is no option {name!r}; {INSTEAD[name].format(consumer=consumer)}")
    return unknown(consumer, name, OPTIONS)


def _checked(consumer: str, name: str, value: Any) -> Any:
    option = OPTIONS.get(name)
    if option is None:
        raise _no_option(consumer, name)
    allowed = option.check(value)
    if allowed:
        raise OptionError(f"{consumer}: {name} must be {allowed}; got {value!r}")
    return value


def _parsed(consumer: str, name: str, text: str) -> Any:
    option = OPTIONS.get(name)
    if option is None:
        raise _no_option(consumer, name)
    if name == "retry":
        try:
            return msgspec.json.decode(text, type=Retry)
        except msgspec.DecodeError as error:
            raise OptionError(f'{consumer}: retry is set by JSON like {{"attempts": 3}}: {error}') from error
    if option.parse is None:
        raise OptionError(f"{consumer}: {name} cannot be set on the command line")
    if text.lower() in ("none", "null"):
        return None
    try:
        return option.parse(text)
    except ValueError:
        raise OptionError(f"{consumer}: {name} must be {option.check(text) or 'a number'}; got {text!r}") from None
