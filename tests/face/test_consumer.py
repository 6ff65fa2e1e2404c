"""Declaring consumers: as functions and as classes, what is read from their annotations, and what is refused."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypedDict, TypeVar
from unittest import mock

import msgspec
import pydantic
import pytest

from sluiceway import App, AppError, Batch, Batching, Consumer, FunctionConsumer, Message, OptionError, consumer
from sluiceway.consumer import Bound, ClassConsumer, ConsumerDef, definition, is_async
from tests.face import unquoted

if TYPE_CHECKING:
    from somewhere_else import Ledger  # type: ignore[import-not-found]  # only type checkers see it

T = TypeVar("T")
K = TypeVar("K")


class Payment(msgspec.Struct):
    id: str


class Model(pydantic.BaseModel):
    id: str


@dataclass
class Order:
    id: str


class Row(TypedDict):
    id: str


class Envelope(msgspec.Struct, Generic[T]):
    inside: T


Incoming = Message[Payment]


def payload_type(target: Any, **options: Any) -> Any:
    return definition(consumer("t", **options)(target)).payload_type  # type: ignore[attr-defined]


def fake(**annotations: Any) -> Callable[..., Any]:
    """An async handler whose parameters are annotated as given, with text as `from __future__` leaves it."""

    async def handle(message: Any) -> None: ...

    handle.__annotations__ = annotations
    return handle


# -- payload types of functions --------------------------------------------------------------------------------------

ANNOTATIONS: list[tuple[str, Any]] = [
    ("Message[Payment]", Payment),
    ("Message[bytes]", bytes),
    ("Message[str]", str),
    ("Message[Model]", Model),
    ("Message[Order]", Order),
    ("Message[Row]", Row),
    ("Message[Payment | None]", Payment | None),
    ("Message[list[Payment]]", list[Payment]),
    ("Message[Envelope[Payment]]", Envelope[Payment]),
    ("Message[Annotated[int, msgspec.Meta(gt=0)]]", Annotated[int, msgspec.Meta(gt=0)]),
    ("Annotated[Message[Payment], 'noted']", Payment),
    ("Message['Payment']", Payment),
    ("Message[list['Payment']]", list[Payment]),
    ("Message[None]", type(None)),
    ("Message[Any]", Any),
    ("Message[T]", Any),
    ("Message", Any),
    ("Any", Any),
    ("object", Any),
    ("Incoming", Payment),
]


@pytest.mark.parametrize(("text", "expected"), ANNOTATIONS, ids=[text for text, _ in ANNOTATIONS])
@pytest.mark.parametrize("as_text", [True, False], ids=["text", "value"])
def test_the_payloads_type_is_read_from_the_handlers_annotation(text: str, expected: Any, as_text: bool) -> None:
    assert payload_type(fake(message=text if as_text else eval(text))) == expected  # noqa: S307


def test_without_an_annotation_the_payload_is_whatever_the_json_says() -> None:
    assert payload_type(lambda message: None) is Any


def test_annotations_without_the_future_import_are_read_too() -> None:
    assert unquoted.payments.payload_type is unquoted.Payment
    assert unquoted.forward.payload_type is unquoted.Later
    assert definition(unquoted.Payments).payload_type is unquoted.Later  # type: ignore[attr-defined]


def test_other_annotations_may_be_for_type_checkers_only() -> None:
    async def payments(message: Message[Payment], ledger: Ledger) -> Ledger: ...

    assert payload_type(payments) is Payment


def test_a_type_that_cannot_be_read_says_what_to_do_about_it() -> None:
    class Local(msgspec.Struct):
        id: str

    async def payments(message: Message[Local]) -> None: ...

    with pytest.raises(OptionError) as caught:
        consumer("t")(payments)
    assert str(caught.value) == (
        "payments: the annotation 'Message[Local]' cannot be read here (name 'Local' is not defined); "
        "define the type at module level, above the consumer, or give payload=..."
    )
    assert payload_type(payments, payload=Local) is Local


def test_a_handler_of_something_else_than_a_message_is_refused_when_it_is_declared() -> None:
    async def payments(message: Payment) -> None: ...

    with pytest.raises(OptionError) as caught:
        consumer("t")(payments)  # type: ignore[arg-type]
    assert str(caught.value) == "payments: a handler takes a Message[Payment], not a Payment"


def test_a_handler_may_take_a_protocol_that_messages_keep() -> None:
    class HasBody(typing.Protocol):
        body: bytes

    async def handle(message: Any) -> None: ...

    handle.__annotations__ = {"message": HasBody}
    assert payload_type(handle) is Any


# -- payload types of classes ----------------------------------------------------------------------------------------


class Direct(Consumer[Payment]):
    async def handle(self, message: Message[Payment]) -> None: ...


class Child(Direct):
    pass


class Middle(Consumer[T], Generic[T]):
    async def handle(self, message: Message[T]) -> None: ...


class OfMiddle(Middle[Payment]):
    pass


class GrandchildOfMiddle(OfMiddle):
    pass


class Swapped(Consumer[K], Generic[T, K]):
    async def handle_batch(self, batch: Batch[Any]) -> None: ...


class OfSwapped(Swapped[int, Payment]):
    pass


class ListOf(Consumer[list[T]], Generic[T]):
    async def handle_batch(self, batch: Batch[Any]) -> None: ...


class OfListOf(ListOf[Payment]):
    pass


class Mixin(Generic[T]):
    pass


class WithMixin(Mixin[int], Direct):
    pass


class Bare(Consumer):  # type: ignore[type-arg]
    async def handle(self, message: Message[Payment]) -> None: ...


class BareBatch(Consumer):  # type: ignore[type-arg]
    async def handle_batch(self, batch: Batch[Any]) -> None: ...


class OpenMiddle(Middle):  # type: ignore[type-arg]
    pass


class Static(Consumer):  # type: ignore[type-arg]
    @staticmethod
    async def handle(message: Message[Payment]) -> None: ...


class OfClass(Consumer):  # type: ignore[type-arg]
    @classmethod
    async def handle(cls, message: Message[Payment]) -> None: ...


class Quoted(Consumer["Payment"]):
    async def handle_batch(self, batch: Batch[Any]) -> None: ...


CLASSES: list[tuple[type[Any], Any]] = [
    (Direct, Payment),
    (Child, Payment),
    (OfMiddle, Payment),
    (GrandchildOfMiddle, Payment),
    (Middle, Any),
    (OpenMiddle, Any),
    (OfSwapped, Payment),
    (OfListOf, list[Payment]),
    (WithMixin, Payment),
    (Bare, Payment),
    (BareBatch, Any),
    (Static, Payment),
    (OfClass, Payment),
    (Quoted, Payment),
]


@pytest.mark.parametrize(("kind", "expected"), CLASSES, ids=[kind.__name__ for kind, _ in CLASSES])
def test_the_payloads_type_of_a_class_is_followed_through_its_bases(kind: type[Any], expected: Any) -> None:
    assert payload_type(type(kind.__name__, (kind,), {"__module__": __name__})) == expected


def test_a_class_whose_annotation_cannot_be_read_says_what_to_do_about_it() -> None:
    class Local(msgspec.Struct):
        id: str

    class Payments(Consumer):  # type: ignore[type-arg]
        async def handle(self, message: Message[Local]) -> None: ...

    with pytest.raises(OptionError, match=r"Payments: the annotation 'Message\[Local\]' cannot be read here"):
        consumer("t")(Payments)


# -- what a function may be -------------------------------------------------------------------------------------------


async def coroutine(message: Message[Payment]) -> str:
    return message.id


def plain(message: Message[Payment]) -> str:
    return message.id


class AsyncObject:
    async def __call__(self, message: Message[Payment]) -> str:
        return message.id

    async def method(self, message: Message[Payment]) -> str:
        return message.id


class PlainObject:
    def __call__(self, message: Message[Payment]) -> str:
        return message.id


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def made_async(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


async def with_setting(setting: int, message: Message[Payment]) -> str:
    return message.id


FUNCTIONS: list[tuple[str, Any, bool, str]] = [
    ("async def", coroutine, True, "coroutine"),
    ("def", plain, False, "plain"),
    ("object with async __call__", AsyncObject(), True, "AsyncObject"),
    ("object with __call__", PlainObject(), False, "PlainObject"),
    ("bound method", AsyncObject().method, True, "method"),
    ("partial of async def", functools.partial(with_setting, 5), True, "with_setting"),
    ("partial of an object", functools.partial(AsyncObject()), True, "AsyncObject"),
    ("partial of def", functools.partial(plain), False, "plain"),
    ("async def behind a plain wrapper", logged(coroutine), True, "coroutine"),
    ("def behind an async wrapper", made_async(plain), True, "plain"),
    ("def behind a plain wrapper", logged(plain), False, "plain"),
    ("staticmethod of async def", staticmethod(coroutine), True, "coroutine"),
    ("staticmethod of def", staticmethod(plain), False, "plain"),
    ("partial of a wrapper", functools.partial(logged(coroutine)), True, "coroutine"),
]


@pytest.mark.parametrize(("function", "expected", "name"), [f[1:] for f in FUNCTIONS], ids=[f[0] for f in FUNCTIONS])
async def test_whatever_can_be_called_can_be_a_consumer(function: Any, expected: bool, name: str) -> None:
    declared = consumer("t")(function)
    assert isinstance(declared, FunctionConsumer)
    assert (declared.name, declared.payload_type) == (name, Payment)
    bound = declared.bind("context")
    assert bound.is_async is expected
    result = bound.handle(Message("t", b"", "id-1"))
    assert (await result if expected else result) == "id-1"


def test_a_mock_can_be_a_consumer() -> None:
    declared: Any = consumer("t")(mock.AsyncMock())
    assert definition(declared).name == "AsyncMock"
    assert is_async(mock.AsyncMock())
    assert not is_async(mock.Mock())


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (lambda: None, "<lambda>: a handler takes (message) or (message, context); got <lambda>()"),
        (lambda a, b, c: None, "a handler takes (message) or (message, context); got <lambda>(a, b, c)"),
        (lambda a, *, ledger: None, "a handler takes (message) or (message, context); got <lambda>(a, *, ledger)"),
        (lambda self, message: None, "a method is declared by its class, one that inherits from Consumer"),
        (5, "a consumer is a function or a class, got 5"),
        ("handle", "a consumer is a function or a class, got 'handle'"),
        (Payment, "Payment: a consumer class inherits from Consumer[payload type]"),
    ],
    ids=range(7),
)
def test_what_cannot_be_a_consumer_is_refused_when_it_is_declared(target: Any, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        consumer("t")(target)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("topics", "text"),
    [
        ((), "coroutine: name at least one topic"),
        (("a b",), "coroutine: topic 'a b' has the word 'a b'"),
        (("",), "coroutine: topic must be a non-empty string, got ''"),
        (("a", "#.dead"), "coroutine: topic '#.dead' matches nothing: dead-letter topics must be named in full"),
    ],
)
def test_a_topic_that_cannot_be_is_refused_when_the_consumer_is_declared(topics: tuple[str, ...], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        consumer(*topics)(coroutine)
    assert text in str(caught.value)


def test_patterns_and_full_dead_letter_topics_are_topics_of_a_consumer() -> None:
    declared = consumer("a.*", "b.#", "a.default.dead")(coroutine)
    assert declared.topics == ("a.*", "b.#", "a.default.dead")


def test_a_decorator_without_parentheses_is_refused_at_once() -> None:
    with pytest.raises(
        OptionError, match=r'consumer: a topic is a string, got <function .*; write @consumer\("topic"\)'
    ):
        consumer(coroutine)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a topic is a string"):
        App("memory://").consumer(coroutine)  # type: ignore[arg-type]


def test_an_option_error_names_the_consumer_by_its_function_or_by_its_given_name() -> None:
    with pytest.raises(OptionError, match=r"^coroutine: concurrency must be"):
        consumer("t", concurrency=0)(coroutine)
    with pytest.raises(OptionError, match=r"^payments: concurrency must be"):
        consumer("t", concurrency=0, name="payments")(coroutine)
    with pytest.raises(OptionError, match=r"^coroutine: name must be a non-empty string, or None; got ''"):
        consumer("t", name="")(coroutine)
    with pytest.raises(OptionError, match=r"^coroutine: there is no option 'concurency'; did you mean 'concurrency'"):
        consumer("t", concurency=5)(coroutine)  # type: ignore[call-arg]


# -- calling -----------------------------------------------------------------------------------------------------------


async def test_a_declared_function_can_still_be_called() -> None:
    @consumer("payments.created")
    async def payments(message: Message[Payment], ledger: list[str]) -> str:
        """Price a payment."""
        ledger.append(message.payload.id)
        return "priced"

    ledger: list[str] = []
    message = Message("t", b"", "1", payload=Payment("p1"))
    assert await payments(message, ledger) == "priced"
    assert await payments(message, ledger=ledger) == "priced"
    assert ledger == ["p1", "p1"]
    assert payments.__doc__ == "Price a payment."


async def call(bound: Bound) -> Any:
    result = bound.handle(Message("t", b"", "id-1"))
    return await result if inspect.isawaitable(result) else result


async def test_the_context_is_handed_to_a_handler_that_takes_a_second_argument() -> None:
    async def one(message: Message[Any]) -> Any:
        return "one"

    async def two(message: Message[Any], ledger: Any) -> Any:
        return ledger

    def plain_two(message: Message[Any], ledger: Any) -> Any:
        return ledger

    async def only(message: Message[Any], /, ledger: Any) -> Any:
        return ledger

    async def keyword(message: Message[Any], *, dry: bool = False) -> Any:
        return dry

    async def default(message: Message[Any], ledger: Any = "default") -> Any:
        return ledger

    assert [await call(consumer("t")(function).bind("ledger")) for function in (one, two, plain_two, only)] == [
        "one", "ledger", "ledger", "ledger",
    ]  # fmt: skip
    assert await call(consumer("t")(keyword).bind("ledger")) is False
    assert await call(consumer("t")(default).bind("ledger")) == "ledger"
    assert await call(consumer("t")(default).bind(None)) == "default"
    assert await call(consumer("t")(two).bind(None)) is None


# -- batchers of functions -------------------------------------------------------------------------------------------


def declared() -> FunctionConsumer[Payment, str]:
    return consumer("t", batch_size=20, batch_timeout=2.0)(coroutine)


async def book(batch: Batch[str]) -> None: ...


def test_a_batcher_takes_its_sizes_from_the_consumers_options_unless_it_has_its_own() -> None:
    payments = declared()
    payments.batch()(book)
    payments.batch("s3", size=5, timeout=0.5, concurrency=3, key=len)(book)
    assert payments.batchings() == {
        "default": Batching(size=20, timeout=2.0),
        "s3": Batching(size=5, timeout=0.5, concurrency=3, key=len),
    }


def test_the_command_line_changes_the_default_batchers_sizes_and_no_others() -> None:
    payments = declared()
    payments.batch(size=50, key=len)(book)
    payments.batch("s3", size=5)(book)
    payments.override("batch_size", "7")
    assert payments.batchings() == {
        "default": Batching(size=7, timeout=2.0, key=len),
        "s3": Batching(size=5, timeout=2.0),
    }


def test_an_override_that_is_refused_changes_nothing() -> None:
    payments = declared()
    with pytest.raises(OptionError):
        payments.override("batch_size", "0")
    payments.override("batch_timeout", "1")
    assert (payments.value("batch_size"), payments.value("batch_timeout")) == (20, 1.0)


async def test_a_batch_handler_gets_the_context_too_and_stays_a_function() -> None:
    payments = declared()

    @payments.batch()
    async def book_all(batch: Batch[str], ledger: str) -> str:
        return ledger

    handle, _ = payments.bind("ledger").batchers["default"]
    assert await handle(mock.sentinel.batch) == "ledger"
    assert await book_all(mock.sentinel.batch, "mine") == "mine"


@pytest.mark.parametrize(
    ("declare", "text"),
    [
        (lambda one: one.batch()(book) and one.batch()(book), "coroutine: batcher 'default' is declared twice"),
        (lambda one: one.batch("s3")(book) and one.batch("s3")(book), "coroutine: batcher 's3' is declared twice"),
        (lambda one: one.batch(size=0)(book), "coroutine, batcher 'default': Batching: size must be a whole number"),
        (lambda one: one.batch("s3", timeout=0)(book), "coroutine, batcher 's3': Batching: timeout must be seconds"),
        (lambda one: one.batch("s3", concurrency=0)(book), "coroutine, batcher 's3': Batching: concurrency must be"),
        (lambda one: one.batch("s3", key="x")(book), "coroutine, batcher 's3': Batching: key must be a function"),
        (lambda one: one.batch(book), "coroutine: a batcher's name is a non-empty string, got <function book"),
        (lambda one: one.batch(""), "coroutine: a batcher's name is a non-empty string, got ''"),
        (lambda one: one.batch()(lambda: None), "a batch handler takes (batch) or (batch, context); got <lambda>()"),
        (lambda one: one.handle_error(lambda error: None), "coroutine: handle_error takes (message, error); got"),
        (lambda one: one.handle_failed(lambda a, b: None), "coroutine: handle_failed takes (messages); got"),
    ],
    ids=range(11),
)
def test_a_batcher_or_hook_that_cannot_be_is_refused_when_it_is_declared(
    declare: Callable[[FunctionConsumer[Payment, str]], Any], text: str
) -> None:
    with pytest.raises(OptionError) as caught:
        declare(declared())
    assert text in str(caught.value)


def test_batchers_of_a_function_are_declared_with_their_handlers() -> None:
    with pytest.raises(OptionError, match=r"coroutine: declare batcher 's3' with @coroutine.batch"):
        consumer("t", batchers={"s3": Batching()})(coroutine)


def test_hooks_of_a_function_are_bound() -> None:
    payments = declared()

    @payments.handle_error
    def on_error(message: Message[Payment], error: BaseException) -> None: ...

    @payments.handle_failed
    def on_failed(messages: Sequence[Message[Payment]]) -> None: ...

    bound = payments.bind(None)
    assert (bound.on_error, bound.on_failed) == (on_error, on_failed)
    assert (declared().bind(None).on_error, declared().bind(None).on_failed) == (None, None)


# -- classes -----------------------------------------------------------------------------------------------------------


class Both(Consumer[Payment]):
    def __init__(self, ledger: str = "none") -> None:
        self.ledger = ledger

    async def handle(self, message: Message[Payment]) -> str:
        return self.ledger

    def handle_batch(self, batch: Batch[str]) -> str:
        return self.ledger

    def handle_error(self, message: Message[Payment], error: BaseException) -> None: ...

    async def handle_failed(self, messages: Sequence[Message[Payment]]) -> None: ...


async def test_a_class_is_made_once_per_run_with_the_context_and_its_methods_run() -> None:
    found = ClassConsumer(Both, ("t",), {"batch_size": 5, "batchers": {"s3": Batching(size=2)}})
    bound = found.bind("ledger")
    assert bound.is_async
    assert await call(bound) == "ledger"
    assert {name: batching for name, (_, batching) in bound.batchers.items()} == {
        "default": Batching(size=5),
        "s3": Batching(size=2),
    }
    assert [handle(mock.sentinel.batch) for handle, _ in bound.batchers.values()] == ["ledger", "ledger"]
    assert bound.on_error is not None
    assert bound.on_failed is not None
    assert await call(found.bind(None)) == "none"


async def test_a_class_may_have_no_constructor_or_be_a_dataclass() -> None:
    @dataclass
    class Payments(Consumer[Payment]):
        ledger: str

        async def handle(self, message: Message[Payment]) -> str:
            return self.ledger

    assert await call(ClassConsumer(Payments, ("t",), {}).bind("ledger")) == "ledger"
    bound = ClassConsumer(Direct, ("t",), {}).bind("ledger")
    assert await call(bound) is None
    assert (bound.batchers, bound.on_error, bound.on_failed) == ({}, None, None)


async def test_a_class_with_only_a_batch_handler_batches_the_payloads() -> None:
    bound = ClassConsumer(Quoted, ("t",), {}).bind(None)
    assert bound.is_async
    assert await bound.handle(Message("t", b"", "1", payload=Payment("p"))) == Payment("p")
    assert list(bound.batchers) == ["default"]


def test_the_command_line_changes_the_default_batcher_of_a_class() -> None:
    found = ClassConsumer(Quoted, ("t",), {"batchers": {"default": Batching(size=2, key=len), "s3": Batching(size=3)}})
    found.override("batch_size", "9")
    assert found.batchings() == {"default": Batching(size=9, key=len), "s3": Batching(size=3)}


class Neither(Consumer[Payment]):
    pass


class TwoArguments(Consumer[Payment]):
    def __init__(self, a: int, b: int) -> None: ...
    async def handle(self, message: Message[Payment]) -> None: ...


class HandleTakesTwo(Consumer[Payment]):
    async def handle(self, message: Message[Payment], ledger: Any) -> None: ...  # type: ignore[override]


class BatchTakesNothing(Consumer[Payment]):
    async def handle_batch(self) -> None: ...  # type: ignore[override]


class ErrorTakesOne(Direct):
    def handle_error(self, message: Message[Payment]) -> None: ...  # type: ignore[override]


class BatchMisspelt(Direct):
    def handle_bach(self, batch: Batch[Any]) -> None: ...


class FailedTakesTwo(Direct):
    def handle_failed(self, a: Any, b: Any) -> None: ...  # type: ignore[override]


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (Neither, {}, "Neither: define handle, handle_batch or both"),
        (
            BatchMisspelt,
            {},
            "BatchMisspelt: did you mean 'handle_batch' by its method 'handle_bach'? Nobody calls that",
        ),
        (Direct, {"batchers": {"s3": Batching()}}, "Direct: batchers need a handle_batch"),
        (TwoArguments, {}, "TwoArguments: the constructor takes nothing or the context; got TwoArguments(a: 'int', b:"),
        (HandleTakesTwo, {}, "HandleTakesTwo: handle takes (self, message); got handle("),
        (BatchTakesNothing, {}, "BatchTakesNothing: handle_batch takes (self, batch); got handle_batch("),
        (ErrorTakesOne, {}, "ErrorTakesOne: handle_error takes (self, message, error); got handle_error("),
        (FailedTakesTwo, {}, "FailedTakesTwo: handle_failed takes (self, messages); got handle_failed("),
        (Direct, {"concurrency": True}, "Direct: concurrency must be a whole number, 1 or more; got True"),
    ],
    ids=range(9),
)
def test_a_class_that_cannot_be_a_consumer_is_refused_when_it_is_declared(
    kind: type[Consumer[Any]], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(OptionError) as caught:
        consumer("t", **options)(kind)
    assert text in str(caught.value)


def test_a_declared_class_stays_a_class_and_its_subclasses_are_not_declared_with_it() -> None:
    @consumer("t")
    class Payments(Consumer[Payment]):
        async def handle(self, message: Message[Payment]) -> None: ...

    class More(Payments):
        pass

    assert inspect.isclass(Payments)
    assert definition(Payments).name == "Payments"
    with pytest.raises(AppError, match="is not a consumer; decorate it with @consumer"):
        definition(More)


@pytest.mark.parametrize("thing", [5, "payments", None, coroutine, Neither, object()], ids=range(6))
def test_what_is_not_a_consumer_is_told_so(thing: Any) -> None:
    with pytest.raises(AppError) as caught:
        definition(thing)
    assert str(caught.value) == f"{thing!r} is not a consumer; decorate it with @consumer(topic)"


def test_a_definition_is_its_own() -> None:
    one = declared()
    assert definition(one) is one
    assert isinstance(one, ConsumerDef)


@pytest.mark.parametrize(("topics", "dead"), [(("a",), "a"), (("x", "a.*"), "a.bad"), (("#",), "failed")])
def test_dead_letters_that_the_consumer_would_read_itself_are_refused(topics: tuple[str, ...], dead: str) -> None:
    with pytest.raises(OptionError, match=f"dead_letter_topic '{dead}' is one that this consumer reads"):

        @consumer(*topics, dead_letter_topic=dead)
        async def handle(message: Message[str]) -> None: ...


async def test_a_handler_that_takes_a_context_is_refused_at_start_when_there_is_no_lifespan() -> None:
    app = App("memory://")

    @app.consumer("t")
    async def handle(message: Message[str], ledger: object) -> None: ...

    with pytest.raises(OptionError, match="handle takes 'ledger', which is what the app's lifespan yields"):
        async with app.running():
            pass


async def test_a_batch_size_without_a_batch_handler_is_refused_at_start() -> None:
    app = App("memory://")

    @app.consumer("t", batch_size=10)
    async def handle(message: Message[str]) -> None: ...

    with pytest.raises(OptionError, match="handle: batch_size has no effect without a batch handler"):
        async with app.running():
            pass
