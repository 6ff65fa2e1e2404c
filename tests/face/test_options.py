"""Options: what is allowed, what is said of what is not, and where each value comes from."""

from __future__ import annotations

import math
import pickle
import types
import typing
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluiceway import Acknowledger, Batching, ConsumerOptions, OptionError, Pause, Retry, Split
from sluiceway.errors import unknown
from sluiceway.options import INSTEAD, OPTIONS, Resolved, resolve

GATE = Pause()
ACKNOWLEDGER = Acknowledger()
WITH_ZONE = datetime(2026, 1, 1, tzinfo=UTC)
NO_ZONE = datetime(2026, 1, 1)  # noqa: DTZ001

COUNTS = ([1, 10, 10**9], [0, -1, 1.0, True, False, "3", None, math.nan, math.inf, Decimal(3), [1]])
SECONDS = ([0.001, 1, 2.5, 1e9], [0, -1.0, True, "1", None, math.nan, math.inf, -math.inf, 10**400, Decimal(1)])
NAMES = (["a", "pay-ments", "Größe 1"], ["", "a\n", 5, b"a", True])


def middleware(message: Any, call_next: Any) -> Any:
    return call_next(message)


async def one_argument(message: Any) -> None: ...


async def generator(message: Any, call_next: Any) -> Any:
    yield await call_next(message)


# Per option: good values, bad values, and what the error says is allowed.
CASES: dict[str, tuple[list[Any], list[Any], str]] = {
    "name": (*NAMES, "a non-empty string, or None"),
    "group": (
        ["shop", "shop.eu-1"],
        ["", "my shop", "a.", "*", "a.#", 5, b"a"],
        "words of letters, digits and _-:/@+=~, joined by dots, or None",
    ),
    "concurrency": (*COUNTS, "a whole number, 1 or more"),
    "executor": (["auto", "process"], ["thread", "", None, True, ["process"]], "one of 'auto', 'process'"),
    "batch_size": (*COUNTS, "a whole number, 1 or more"),
    "batch_timeout": (*SECONDS, "seconds, more than 0"),
    "batchers": (
        [{}, {"s3": Batching(size=1)}, types.MappingProxyType({"s3": Batching()})],
        [None, [], {"s3": 5}, {5: Batching()}, {"": Batching()}, "s3"],
        "a mapping from batcher names to Batching(...)",
    ),
    "retry": ([Retry(), Retry(attempts=1)], [None, 3, {"attempts": 3}, Retry], "a Retry(...), like Retry(attempts=3)"),
    "dead_letter_topic": (
        ["dead", "a.b.dead", None],
        ["", "a b", "a.#", "*", 5, b"a"],
        "words of letters, digits and _-:/@+=~, joined by dots, or None",
    ),
    "exhausted": (
        ["dead_letter", "drop", "retry"],
        ["dead-letter", "", None, True, ["drop"]],
        "one of 'dead_letter', 'drop', 'retry'",
    ),
    "timeout": ([None, *SECONDS[0]], [one for one in SECONDS[1] if one is not None], "seconds, more than 0, or None"),
    "middleware": (
        [(), [], [middleware], (middleware, middleware)],
        [None, middleware, "ab", ["ab"], [None], {middleware}, [Pause], [one_argument], [generator]],
        "a sequence of functions (message, call_next), like [Logging()]",
    ),
    "batch_middleware": (
        [(), [], [middleware], (middleware, middleware)],
        [None, middleware, "ab", ["ab"], [None], {middleware}, [Pause], [one_argument], [generator]],
        "a sequence of functions (batch, call_next), like [Metrics()]",
    ),
    "acknowledgers": (
        [(), [ACKNOWLEDGER], (ACKNOWLEDGER, ACKNOWLEDGER)],
        [None, ACKNOWLEDGER, [None], "", "ab", [middleware], [Acknowledger], {ACKNOWLEDGER}],
        "a sequence of objects of classes that inherit from Acknowledger, like [Audit()]",
    ),
    "gates": (
        [(), [GATE], (GATE, GATE)],
        [None, GATE, [None], "", "ab", [middleware], [Pause]],
        "a sequence of gates, like [RateLimit(100, 60)]",
    ),
    "order_by": ([None, "key"], ["topic", "", True, b"key", 0], "one of 'key', None"),
    "start": (
        ["earliest", "latest", WITH_ZONE],
        ["first", "", None, NO_ZONE, 0, True],
        "'earliest', 'latest' or a datetime with a time zone",
    ),
    "sources": (*COUNTS, "a whole number, 1 or more"),
    "max_demand": (
        [None, *COUNTS[0]],
        [one for one in COUNTS[1] if one is not None],
        "a whole number, 1 or more, or None",
    ),
    "max_buffer_bytes": (*COUNTS, "a whole number, 1 or more"),
    "max_payload": (
        [None, *COUNTS[0]],
        [one for one in COUNTS[1] if one is not None],
        "a whole number, 1 or more, or None",
    ),
    "buffer_time": (*SECONDS, "seconds, more than 0"),
    "payload": ([None, bytes, list[int]], [], ""),
}


def test_every_option_has_its_cases_here() -> None:
    assert set(CASES) == set(OPTIONS)


GOOD = [(name, value) for name, (good, _, _) in CASES.items() for value in good]
BAD = [(name, value, allowed) for name, (_, bad, allowed) in CASES.items() for value in bad]


@pytest.mark.parametrize(("name", "value"), GOOD, ids=range(len(GOOD)))
def test_a_good_value_is_taken_as_it_is_and_said_to_be_the_consumers(name: str, value: Any) -> None:
    found = resolve("payments", {name: value})[name]
    assert found.value is value
    assert found.origin == "consumer"


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=range(len(BAD)))
def test_a_bad_value_names_consumer_option_value_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve("payments", {name: value})
    assert str(caught.value) == f"payments: {name} must be {allowed}; got {value!r}"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_default_is_allowed_and_has_a_meaning(name: str) -> None:
    option = OPTIONS[name]
    assert option.check(option.default) is None
    assert option.meaning.endswith(".")
    assert resolve("payments", {})[name] == Resolved(option.default, "default")


@given(value=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.none()))
@settings(max_examples=60, deadline=None)
def test_whatever_is_given_for_an_option_it_is_taken_or_an_option_error(value: Any) -> None:
    for name in OPTIONS:
        said = ""
        try:
            resolve("payments", {name: value})
        except OptionError as error:
            said = str(error)
        assert not said or said.endswith(f"; got {value!r}")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("concurency", "concurrency"), ("batchsize", "batch_size"), ("retries", "retry"), ("max_demands", "max_demand")],
)
def test_a_misspelt_option_is_told_with_the_nearest_right_name_and_all_that_there_are(wrong: str, right: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve("payments", {wrong: 1})
    known = ", ".join(sorted(OPTIONS))
    assert str(caught.value) == (f"payments: there is no option {wrong!r}; did you mean {right!r}? Known: {known}")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("prepare", "declare it with @payments.prepare, or as a method of the class"),
        ("acknowledger", "write acknowledgers=[...], a list"),
        ("rate_limit", "write gates=[RateLimit(messages, seconds)]"),
        ("batch_key", "write @payments.batch(key=...), or batchers={'default': Batching(key=...)}"),
    ],
)
def test_what_is_looked_for_as_an_option_and_is_none_is_told_with_what_to_write(name: str, instead: str) -> None:
    for own, overrides in (({name: 1}, {}), ({}, {name: "1"})):
        with pytest.raises(OptionError) as caught:
            resolve("payments", own, overrides)
        assert str(caught.value) == f"payments: there is no option {name!r}; {instead}"


@pytest.mark.parametrize("name", INSTEAD)
def test_what_to_write_instead_is_said_of_no_option_that_there_is(name: str) -> None:
    assert name not in OPTIONS
    assert "{" not in INSTEAD[name].format(consumer="c").replace("{'default'", "")


def test_a_name_like_no_other_is_told_without_a_guess() -> None:
    assert str(unknown("app", "zzz", ["b", "a"], "consumer")) == "app: there is no consumer 'zzz'. Known: a, b"
    assert str(unknown("app", "zzz", [])) == "app: there is no option 'zzz'. Known: none"


def test_an_option_error_is_a_value_error_too() -> None:
    assert issubclass(OptionError, ValueError)


# -- the two lists of options -----------------------------------------------------------------------------------------


def test_type_checkers_and_the_runtime_know_the_same_options_in_the_same_order() -> None:
    assert list(ConsumerOptions.__annotations__) == list(OPTIONS)
    assert ConsumerOptions.__required_keys__ == frozenset()


def fits(value: Any, hint: Any) -> bool:
    """Whether a type checker would take `value` for `hint`, as far as that can be seen at run time."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments and type(value) in set(map(type, arguments))
    if hint is float:
        return type(value) in (int, float)
    if getattr(hint, "_is_protocol", False):
        return all(hasattr(value, name) for name in ("allow", "took", "opens_at", "on_change"))
    if origin is not None and isinstance(origin, type):
        inside = value.values() if isinstance(value, typing.Mapping) else value
        if isinstance(value, str) or not isinstance(value, origin):
            return False
        return callable(value) or all(fits(one, arguments[-1]) for one in inside)
    return type(value) is hint or (not isinstance(value, bool) and isinstance(value, hint))


HINTS = typing.get_type_hints(ConsumerOptions)
CALLABLES = {"middleware"}  # what is inside cannot be told from its type


@pytest.mark.parametrize(("name", "value"), GOOD, ids=range(len(GOOD)))
def test_what_the_runtime_takes_a_type_checker_takes_too(name: str, value: Any) -> None:
    if name in CALLABLES or (value is None and OPTIONS[name].default is None):
        return
    assert fits(value, HINTS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_none_is_allowed_to_type_checkers_only_where_it_is_the_default(name: str) -> None:
    if type(None) in typing.get_args(HINTS[name]):
        assert OPTIONS[name].default is None


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("concurrency", "20", 20),
        ("batch_timeout", "0.5", 0.5),
        ("timeout", "none", None),
        ("timeout", "3", 3.0),
        ("max_demand", "Null", None),
        ("group", "shop", "shop"),
        ("dead_letter_topic", "a.dead", "a.dead"),
        ("exhausted", "drop", "drop"),
        ("order_by", "key", "key"),
        ("start", "latest", "latest"),
        ("start", "2026-01-01T00:00:00+00:00", WITH_ZONE),
        ("retry", '{"attempts": 2, "base_delay": 0.5}', Retry(attempts=2, base_delay=0.5)),
    ],
)
def test_the_command_line_sets_an_option_over_the_consumers_own(name: str, text: str, value: Any) -> None:
    given_value = CASES[name][0][-1]
    found = resolve("payments", {name: given_value}, {name: text})[name]
    assert found == Resolved(value, "command line")
    assert type(found.value) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("concurrency", "many", "payments: concurrency must be a whole number, 1 or more; got 'many'"),
        ("concurrency", "0", "payments: concurrency must be a whole number, 1 or more; got 0"),
        ("concurrency", "none", "payments: concurrency must be a whole number, 1 or more; got None"),
        ("timeout", "nan", "payments: timeout must be seconds, more than 0, or None; got nan"),
        ("timeout", "soon", "payments: timeout must be seconds, more than 0, or None; got 'soon'"),
        ("exhausted", "DROP", "payments: exhausted must be one of 'dead_letter', 'drop', 'retry'; got 'DROP'"),
        ("start", "now", "payments: start must be 'earliest', 'latest' or a datetime with a time zone; got 'now'"),
        ("start", "2026-01-01", "payments: start must be 'earliest', 'latest' or a datetime with a time zone; got "),
        ("middleware", "x", "payments: middleware cannot be set on the command line"),
        ("name", "x", "payments: name cannot be set on the command line"),
        ("retry", "3", 'payments: retry is set by JSON like {"attempts": 3}: '),
        ("retry", '{"attempts": 0}', "Retry: attempts must be a whole number, 1 or more, got 0"),
        ("retry", '{"atempts": 3}', "unknown field `atempts`"),
        ("retry", "{", 'payments: retry is set by JSON like {"attempts": 3}: '),
        ("concurency", "3", "payments: there is no option 'concurency'; did you mean 'concurrency'?"),
    ],
)
def test_what_the_command_line_says_wrongly_is_an_error_that_says_what_is_allowed(
    name: str, text: str, error: str
) -> None:
    with pytest.raises(OptionError) as caught:
        resolve("payments", {}, {name: text})
    assert error in str(caught.value)


def test_each_option_keeps_its_own_origin() -> None:
    found = resolve("payments", {"concurrency": 5, "timeout": 1.0}, {"timeout": "2"})
    assert found["concurrency"] == Resolved(5, "consumer")
    assert found["timeout"] == Resolved(2.0, "command line")
    assert found["batch_size"] == Resolved(100, "default")


# -- Batching and Retry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"size": 0}, "Batching: size must be a whole number, 1 or more, got 0"),
        (
            {"sizes": 50},
            "Batching: there is no option 'sizes'; did you mean 'size'? Known: concurrency, key, size, split, timeout",
        ),
        ({"size": True}, "Batching: size must be a whole number, 1 or more, got True"),
        ({"size": 2.0}, "Batching: size must be a whole number, 1 or more, got 2.0"),
        ({"timeout": 0}, "Batching: timeout must be seconds, more than 0, got 0"),
        ({"timeout": math.inf}, "Batching: timeout must be seconds, more than 0, got inf"),
        ({"concurrency": -1}, "Batching: concurrency must be a whole number, 1 or more, got -1"),
        ({"key": "currency"}, "Batching: key must be a function of what the handler returned, got 'currency'"),
        ({"split": 500}, "Batching: split must be a Split(start, step) or Split.bytes(n), got 500"),
    ],
)
def test_a_batching_that_cannot_be_says_what_is_allowed(values: dict[str, Any], error: str) -> None:
    with pytest.raises(OptionError) as caught:
        Batching(**values)
    assert str(caught.value) == error


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "500", None])
def test_a_split_by_bytes_takes_a_whole_number_of_bytes(limit: Any) -> None:
    with pytest.raises(OptionError, match=r"Split\.bytes: limit must be 1 or more bytes, got "):
        Split.bytes(limit)


@pytest.mark.parametrize("step", [500, None, "bytes"])
def test_a_split_takes_a_step_that_can_be_called(step: Any) -> None:
    with pytest.raises(OptionError, match=r"Split: step must be a function \(accumulator, message\); got "):
        Split(0, step)


def test_a_batching_takes_a_split() -> None:
    split = Split.bytes(1)
    assert Batching(split=split).split is split


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"attempts": 0}, "Retry: attempts must be a whole number, 1 or more, got 0"),
        ({"attempts": 2.5}, "Retry: attempts must be a whole number, 1 or more, got 2.5"),
        ({"attempts": True}, "Retry: attempts must be a whole number, 1 or more, got True"),
        ({"attempts": "3"}, "Retry: attempts must be a whole number, 1 or more, got '3'"),
        ({"attempts": None}, "Retry: attempts must be a whole number, 1 or more, got None"),
        ({"base_delay": -0.1}, "Retry: base_delay must be 0 or more seconds, got -0.1"),
        ({"base_delay": math.nan}, "Retry: base_delay must be 0 or more seconds, got nan"),
        ({"base_delay": 10**400}, f"Retry: base_delay must be 0 or more seconds, got {10**400}"),
        ({"multiplier": 0.5}, "Retry: multiplier must be 1 or more, got 0.5"),
        ({"multiplier": math.inf}, "Retry: multiplier must be 1 or more, got inf"),
        ({"max_delay": -1}, "Retry: max_delay must be 0 or more seconds, got -1"),
        (
            {"base_delay": 60, "max_delay": 10},
            "Retry: max_delay must be base_delay (60 seconds) or more, or base_delay be less, got 10",
        ),
        ({"max_delay": 0.5}, "Retry: max_delay must be base_delay (1 seconds) or more, or base_delay be less, got 0.5"),
        (
            {"attemps": 3},
            (
                "Retry: there is no option 'attemps'; did you mean 'attempts'? "
                "Known: attempts, base_delay, jitter, max_delay, multiplier, never"
            ),
        ),
        ({"jitter": 1.5}, "Retry: jitter must be between 0 and 1, got 1.5"),
        ({"jitter": True}, "Retry: jitter must be between 0 and 1, got True"),
        ({"never": ValueError}, "Retry: never must be a tuple of exception types, got <class 'ValueError'>"),
        ({"never": [ValueError]}, "Retry: never must be a tuple of exception types, got [<class 'ValueError'>]"),
        ({"never": ("ValueError",)}, "Retry: never must be a tuple of exception types, got ('ValueError',)"),
        ({"never": (int,)}, "Retry: never must be a tuple of exception types, got (<class 'int'>,)"),
    ],
    ids=range(20),
)
def test_a_retry_that_cannot_be_says_what_is_allowed(values: dict[str, Any], error: str) -> None:
    with pytest.raises(OptionError) as caught:
        Retry(**values)
    assert str(caught.value) == error


def test_a_retry_takes_its_options_by_name() -> None:
    with pytest.raises(OptionError, match=r"Retry: options are given by name, like Retry\(attempts=3\)"):
        Retry(3)  # type: ignore[misc]


def test_a_retry_crosses_processes_as_it_is() -> None:
    retry = Retry(base_delay=3600, never=(ValueError,))
    assert pickle.loads(pickle.dumps(retry)) == retry


def test_a_retry_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Retry().attempts = 5  # type: ignore[misc]
