"""What a user declares: a consumer, as a function or as a class, with one list of options."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, Unpack, cast, overload

from msgspec import Struct
from msgspec.structs import replace

from ._decisions.topics import check_topic, dead_letter_topic, is_dead_letter_topic, is_pattern, matches
from ._runtime.spec import ErrorChoice
from .batch import Batch, Split
from .errors import AppError, OptionError
from .message import DEFAULT_BATCHER, Message
from .options import Batching, ConsumerOptions, Resolved, resolve
from .signatures import (
    NO_CONTEXT,
    check_call,
    class_payload_type,
    is_async,
    method_of,
    name_of,
    payload_type,
    takes,
    with_context,
)

T = TypeVar("T")
R = TypeVar("R")
C = TypeVar("C")
ConsumerT = TypeVar("ConsumerT", bound="Consumer[Any]")
BatchF = TypeVar("BatchF", bound=Callable[..., Any])
HookF = TypeVar("HookF", bound=Callable[..., Any])


class Consumer(Generic[T]):
    """A consumer as a class: override `handle`, or `handle_batch`, or both.

        @app.consumer("payments.created", concurrency=10, batch_size=50, batch_timeout=1.0)
        class Payments(Consumer[Payment]):
            async def handle(self, message: Message[Payment]) -> Entry: ...
            async def handle_batch(self, batch: Batch[Entry]) -> None: ...

    Its constructor takes what the app's `lifespan` yields, if it takes anything. One object serves the whole pipeline.
    Each method may also be a plain `def`; `handle` and `handle_batch` then run on threads.
    """

    def handle(self, message: Message[T]) -> Any:
        """Handle one message. What it returns is what the batch receives; what it raises fails the message."""
        raise NotImplementedError

    def handle_batch(self, batch: Batch[Any]) -> Any:
        """Handle one batch. What it raises fails the whole batch; `batch[i].fail(error)` fails one message."""
        raise NotImplementedError

    def prepare(self, messages: Sequence[Message[T]]) -> Awaitable[None] | None:
        """See all messages of one receive before their handlers run: to load at once what each of them needs.

        Their payloads are decoded (unless a middleware decodes), and what cannot be decoded has failed already and
        is not here. What it loads for a message it may leave in `message.value`, where the handler finds it. It
        returns nothing: all messages go on. After `message.fail(...)` a message's handler does not run. When `prepare`
        raises or runs over the consumer's `timeout`, all its messages fail as if their handlers had. One call at a
        time, in order; the next receive waits for it. A plain `def` runs on a thread.
        """
        return None

    def handle_error(self, message: Message[T], error: BaseException) -> Awaitable[ErrorChoice] | ErrorChoice:
        """Say how a failed message ends: "ack", Reject, RetryLater or Release; None: as the retry policy says."""
        return None

    def handle_failed(self, messages: Sequence[Message[T]]) -> Awaitable[None] | None:
        """Learn of messages that are not tried again, before they are dead-lettered. `message.error` says why.

        Not called for a message that killed its process, since it would be in hand here too; but for one that killed a
        worker process (`executor="process"`), where this runs elsewhere.
        """
        return None


_METHODS = {
    "handle": ("message",),
    "handle_batch": ("batch",),
    "prepare": ("messages",),
    "handle_error": ("message", "error"),
    "handle_failed": ("messages",),
}


class BatcherDef(Struct, frozen=True):
    """A batcher as declared: its batch handler and the sizes given with it."""

    handle: Callable[..., Any]
    batching: Batching


class ConsumerDef:
    """A consumer as declared, before it runs. `options` are its effective options with their origin."""

    def __init__(self, topics: tuple[str, ...], given: Mapping[str, Any], default_name: str) -> None:
        self.name: str = given.get("name") or default_name
        for topic in topics:
            _checked_topic(self.name, topic)
        if not topics:
            raise OptionError(f"{self.name}: name at least one topic")
        self._check_circle(topics, given.get("dead_letter_topic"))
        self.topics = topics
        self.given = dict(given)
        self.overrides: dict[str, str] = {}
        self.batchers: dict[str, BatcherDef] = {}
        self.options: dict[str, Resolved] = resolve(self.name, given)
        self.payload_type: Any = Any
        self.is_async = True
        self.has_prepare = False

    def _check_circle(self, topics: tuple[str, ...], dead: object) -> None:
        if isinstance(dead, str) and any(matches(topic, dead) for topic in topics):
            raise OptionError(
                f"{self.name}: dead_letter_topic {dead!r} is one that this consumer reads: what fails would come back "
                f"for ever; choose another, such as {dead_letter_topic(topics[0], 'GROUP')!r}"
            )

    def override(self, name: str, text: str) -> None:
        """Change an option from the command line. Raises OptionError."""
        overrides = {**self.overrides, name: text}
        self.options = resolve(self.name, self.given, overrides)
        self.overrides = overrides

    def value(self, name: str) -> Any:
        return self.options[name].value

    def default_batching(self) -> Batching:
        return Batching(size=self.value("batch_size"), timeout=self.value("batch_timeout"))

    def batchings(self) -> dict[str, Batching]:
        """The sizes that each batcher runs with: what the command line says of batches is the default batcher's."""
        sizes = {name: one.batching for name, one in self.batchers.items()}
        said = {
            field: self.value(option)
            for option, field in (("batch_size", "size"), ("batch_timeout", "timeout"))
            if self.options[option].origin == "command line"
        }
        if DEFAULT_BATCHER in sizes and said:
            sizes[DEFAULT_BATCHER] = replace(sizes[DEFAULT_BATCHER], **said)
        return sizes

    def bind(self, context: Any) -> Bound:
        """The functions that run, with the context that the app's lifespan yields."""
        raise NotImplementedError

    def check_without_context(self) -> None:
        """Raise OptionError when something here takes a context: for an app that has no lifespan."""
        raise NotImplementedError


class Bound(Struct, frozen=True):
    """A consumer's functions for one run."""

    handle: Callable[[Message[Any]], Any]
    is_async: bool
    payload_type: Any
    batchers: Mapping[str, tuple[Callable[[Batch[Any]], Any], Batching]]
    on_error: Callable[[Message[Any], BaseException], Any] | None
    on_failed: Callable[[Sequence[Message[Any]]], Any] | None
    prepare: Callable[[Sequence[Message[Any]]], Any] | None = None


class FunctionConsumer(ConsumerDef, Generic[T, R]):
    """A consumer as a function. Calling it calls the function, so that it can be tested by itself."""

    def __init__(self, function: Callable[..., Any], topics: tuple[str, ...], given: Mapping[str, Any]) -> None:
        super().__init__(topics, given, name_of(function))
        check_call(self.name, function, "a handler takes (message) or (message, context)", 1, 2)
        self.function = function
        self.payload_type = given.get("payload") or payload_type(self.name, function)
        self.is_async = is_async(function)
        self._on_error: Callable[..., Any] | None = None
        self._on_failed: Callable[..., Any] | None = None
        self._prepare: Callable[..., Any] | None = None
        self.__doc__ = function.__doc__
        for name in self.value("batchers"):
            raise OptionError(f"{self.name}: declare batcher {name!r} with @{self.name}.batch({name!r}, ...)")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def batch(
        self,
        name: str = DEFAULT_BATCHER,
        *,
        size: int | None = None,
        timeout: float | None = None,
        key: Callable[[R], Hashable] | None = None,
        split: Split[Any] | None = None,
        concurrency: int = 1,
    ) -> Callable[[BatchF], BatchF]:
        """Declare a batcher and its batch handler.

        A batch goes after `size` messages (default 100) or `timeout` seconds (default 1.0). `key` takes what the
        handler returned; messages of one key share batches. `split` makes a batch full before it has its size, by what
        is in it: `Split.bytes(1_000_000)`, or a function of your own. `concurrency` batches run at once. Raises
        OptionError.
        """
        if not (name and isinstance(name, str)):
            raise OptionError(f"{self.name}: a batcher's name is a non-empty string, got {name!r}; write .batch(...)")
        default = self.default_batching()

        def declare(function: BatchF) -> BatchF:
            where = f"{self.name}, batcher {name!r}"
            if name in self.batchers:
                raise OptionError(f"{self.name}: batcher {name!r} is declared twice")
            check_call(where, function, "a batch handler takes (batch) or (batch, context)", 1, 2)
            try:
                batching = Batching(
                    size=default.size if size is None else size,
                    timeout=default.timeout if timeout is None else timeout,
                    key=key,
                    split=split,
                    concurrency=concurrency,
                )
            except OptionError as error:
                raise OptionError(f"{where}: {error}") from None
            self.batchers[name] = BatcherDef(function, batching)
            return function

        return declare

    def prepare(self, function: HookF) -> HookF:
        """Declare `prepare(messages)` or `prepare(messages, context)`; see Consumer.prepare."""
        check_call(self.name, function, "prepare takes (messages) or (messages, context)", 1, 2)
        self._prepare = function
        self.has_prepare = True
        return function

    def handle_error(self, function: HookF) -> HookF:
        """Declare `handle_error(message, error)`; see Consumer.handle_error."""
        check_call(self.name, function, "handle_error takes (message, error)", 2)
        self._on_error = function
        return function

    def handle_failed(self, function: HookF) -> HookF:
        """Declare `handle_failed(messages)`; see Consumer.handle_failed."""
        check_call(self.name, function, "handle_failed takes (messages)", 1)
        self._on_failed = function
        return function

    def bind(self, context: Any) -> Bound:
        sizes = self.batchings()
        batchers = {name: (with_context(one.handle, context), sizes[name]) for name, one in self.batchers.items()}
        return Bound(
            handle=with_context(self.function, context),
            is_async=self.is_async,
            payload_type=self.payload_type,
            batchers=batchers,
            on_error=self._on_error,
            on_failed=self._on_failed,
            prepare=None if self._prepare is None else with_context(self._prepare, context),
        )

    def check_without_context(self) -> None:
        for one in (self.function, *(one.handle for one in self.batchers.values()), self._prepare):
            if one is not None:
                takes(one, 1, NO_CONTEXT)


class ClassConsumer(ConsumerDef):
    """A consumer as a class."""

    def __init__(self, kind: type[Consumer[Any]], topics: tuple[str, ...], given: Mapping[str, Any]) -> None:
        super().__init__(topics, given, kind.__name__)
        self.kind = kind
        self.has_handle = kind.handle is not Consumer.handle
        self.has_batch = kind.handle_batch is not Consumer.handle_batch
        _check_names(self.name, kind)
        if not (self.has_handle or self.has_batch):
            raise OptionError(f"{self.name}: define handle, handle_batch or both")
        if self.value("batchers") and not self.has_batch:
            raise OptionError(f"{self.name}: batchers need a handle_batch")
        check_call(self.name, kind, "the constructor takes nothing or the context", 0, 1)
        for method, arguments in _METHODS.items():
            rule = f"{method} takes (self, {', '.join(arguments)})"
            check_call(self.name, method_of(kind, method), rule, len(arguments))
        self.payload_type = given.get("payload") or class_payload_type(self.name, kind, Consumer, self.has_handle)
        self.is_async = is_async(kind.handle) if self.has_handle else True
        self.has_prepare = kind.prepare is not Consumer.prepare
        if self.has_batch:
            named = self.value("batchers") or {}
            batchers = named if DEFAULT_BATCHER in named else {DEFAULT_BATCHER: self.default_batching(), **named}
            self.batchers = {name: BatcherDef(kind.handle_batch, batching) for name, batching in batchers.items()}

    def bind(self, context: Any) -> Bound:
        make = cast("Callable[..., Consumer[Any]]", self.kind)
        consumer = make(context) if takes(make, 0, context) else make()
        sizes = self.batchings()
        return Bound(
            handle=consumer.handle if self.has_handle else _payload,
            is_async=self.is_async,
            payload_type=self.payload_type,
            batchers={name: (consumer.handle_batch, sizes[name]) for name in self.batchers},
            on_error=consumer.handle_error if self.kind.handle_error is not Consumer.handle_error else None,
            on_failed=consumer.handle_failed if self.kind.handle_failed is not Consumer.handle_failed else None,
            prepare=consumer.prepare if self.has_prepare else None,
        )

    def check_without_context(self) -> None:
        takes(self.kind, 0, NO_CONTEXT)


def _check_names(name: str, kind: type[Consumer[Any]]) -> None:
    """Raise OptionError for a method that looks like a misspelt one: nobody would ever call it, nor miss it."""
    from difflib import get_close_matches

    for method in vars(kind):
        near = get_close_matches(method, ("handle_batch", "handle_error", "handle_failed"), n=1, cutoff=0.9)
        if near and near[0] != method:
            raise OptionError(
                f"{name}: did you mean {near[0]!r} by its method {method!r}? Nobody calls that; rename it"
            )


async def _payload(message: Message[Any]) -> Any:
    return message.payload


class ConsumerDecorator(Protocol):
    """What `consumer(...)` returns: it takes a function or a Consumer class."""

    # A class is callable too, so the first overload overlaps the last two; the first that fits is taken: the right one.
    @overload
    def __call__(self, target: type[ConsumerT]) -> type[ConsumerT]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, target: Callable[[Message[T]], Awaitable[R]]) -> FunctionConsumer[T, R]: ...
    @overload
    def __call__(self, target: Callable[[Message[T], C], Awaitable[R]]) -> FunctionConsumer[T, R]: ...
    @overload
    def __call__(self, target: Callable[[Message[T]], R]) -> FunctionConsumer[T, R]: ...
    @overload
    def __call__(self, target: Callable[[Message[T], C], R]) -> FunctionConsumer[T, R]: ...


DEFINITION = "__sluiceway_consumer__"


def consumer(*topics: str, **options: Unpack[ConsumerOptions]) -> ConsumerDecorator:
    """Declare a consumer apart from an app; list it in `App(consumers=[...])`.

    `topics` may be patterns (`*` one word, `#` any number). Raises OptionError, here and now, for what is not allowed.
    """
    for topic in topics:
        if not isinstance(topic, str):
            raise OptionError(
                f'consumer: a topic is a string, got {topic!r}; write @consumer("topic"), or @consumer("one", "other")'
            )

    def declare(target: Any) -> Any:
        if inspect.isclass(target):
            if not issubclass(target, Consumer):
                raise OptionError(f"{target.__name__}: a consumer class inherits from Consumer[payload type]")
            setattr(target, DEFINITION, ClassConsumer(target, topics, options))
            return target
        if not callable(target):
            raise OptionError(f"a consumer is a function or a class, got {target!r}")
        return FunctionConsumer(target, topics, options)

    return declare


def definition(declared: Any) -> ConsumerDef:
    """The definition behind what `consumer(...)` returned. Raises AppError for anything else."""
    found = declared if isinstance(declared, ConsumerDef) else getattr(declared, "__dict__", {}).get(DEFINITION)
    if not isinstance(found, ConsumerDef):
        raise AppError(f"{declared!r} is not a consumer; decorate it with @consumer(topic)")
    return found


def _checked_topic(name: str, topic: str) -> None:
    try:
        check_topic(topic, pattern=True)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None
    if is_pattern(topic) and is_dead_letter_topic(topic):
        raise OptionError(f"{name}: topic {topic!r} matches nothing: dead-letter topics must be named in full")
