"""From a failure to a settlement, and what a dead letter says."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluiceway import DecodeError, HandlerTimeout, OptionError, Reject, Release, Retry, RetryLater, Split
from sluiceway._decisions.batching import Forming
from sluiceway._decisions.policy import (
    DEAD_PREFIX,
    MAX_REASON,
    FailureRules,
    give_up,
    reason_of,
    settle_failure,
    users_traceback,
    without_dead_headers,
)
from sluiceway.message import Message, Reason

Exhausted = Literal["dead_letter", "drop", "retry"]
ERRORS: list[BaseException] = [
    ValueError("no"),
    ConnectionError("gone"),
    HandlerTimeout("slow"),
    asyncio.CancelledError(),
    Reject("negative amount"),
    DecodeError("not JSON"),
    RetryLater(7.0),
    RetryLater(),
    RetryLater(7.0, counted=False),
    RetryLater(counted=False),
    Release(),
    ExceptionGroup("many", [ValueError("one")]),
]


def rules(
    *, attempts: int = 3, exhausted: Exhausted = "dead_letter", never: tuple[type[BaseException], ...] = ()
) -> FailureRules:
    retry = Retry(attempts=attempts, base_delay=1.0, multiplier=2.0, max_delay=60.0, jitter=0.5, never=never)
    return FailureRules(consumer="payments", group="shop", retry=retry, exhausted=exhausted)


def message(*, failures: int = 0, suspicions: int = 0, **given: Any) -> Message[Any]:
    return Message("payments.created", b"{}", "id-1", failures=failures, suspicions=suspicions, **given)


@given(
    error=st.sampled_from(ERRORS),
    failures=st.integers(0, 5),
    suspicions=st.integers(0, 5),
    attempts=st.integers(1, 5),
    exhausted=st.sampled_from(["dead_letter", "drop", "retry"]),
    never=st.sampled_from([(), (OSError,), (RetryLater,), (Release,)]),
    draw=st.floats(0, 1),
)
def test_every_failure_ends_in_the_one_settlement_that_the_rules_say(
    error: BaseException,
    failures: int,
    suspicions: int,
    attempts: int,
    exhausted: Exhausted,
    never: tuple[type[BaseException], ...],
    draw: float,
) -> None:
    one = message(failures=failures, suspicions=suspicions)
    given_rules = rules(attempts=attempts, exhausted=exhausted, never=never)
    settlement = settle_failure(one, error, given_rules, draw=draw, now=1_000.0)

    used_up = 1 + failures + suspicions >= attempts
    assert settlement.message is one
    if isinstance(error, Release):
        assert (settlement.outcome, settlement.counted, settlement.delay) == ("release", False, 0.0)
    elif isinstance(error, RetryLater) and not error.counted:
        assert (settlement.outcome, settlement.counted) == ("retry", False)
    elif isinstance(error, (Reject, DecodeError, *never)) or (used_up and exhausted != "retry"):
        assert settlement.outcome == "dead_letter"
        assert settlement.reason is not None
        assert len(settlement.outputs) == (0 if exhausted == "drop" else 1)
    else:
        assert (settlement.outcome, settlement.counted) == ("retry", True)
        assert settlement.reason is not None
    if settlement.outcome == "retry":
        assert settlement.outputs == ()
        asked = error.delay if isinstance(error, RetryLater) else None
        if asked is not None:
            assert settlement.delay == asked
        else:
            whole = min(60.0, 2.0 ** (failures + suspicions))
            assert whole / 2 <= settlement.delay <= whole


def test_a_message_that_killed_processes_uses_up_its_attempts_like_one_that_failed() -> None:
    settlement = settle_failure(message(failures=1, suspicions=1), ValueError("no"), rules(), draw=0.5, now=0.0)
    assert settlement.outcome == "dead_letter"


@given(
    body=st.binary(max_size=100),
    key=st.none() | st.text(),
    headers=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    timestamp=st.floats(0, 4e9),
    now=st.floats(0, 4e9),
    failures=st.integers(0, 9),
)
def test_a_dead_letter_carries_its_message_untouched_and_beside_it_why_where_and_when(
    body: bytes, key: str | None, headers: dict[str, str], timestamp: float, now: float, failures: int
) -> None:
    one: Message[Any] = Message(
        "orders.new", body, "id-7", key=key, headers=headers, timestamp=timestamp, failures=failures
    )
    settlement = give_up(one, ValueError("no stock"), rules(), now=now)
    (letter,) = settlement.outputs
    assert (letter.topic, letter.body, letter.key, letter.id) == ("orders.new.shop.dead", body, key, "id-7")
    assert (letter.delay, letter.group, letter.timestamp) == (0.0, None, now)
    assert without_dead_headers(letter.headers) == headers
    why = {
        name.removeprefix(DEAD_PREFIX): value for name, value in letter.headers.items() if name.startswith(DEAD_PREFIX)
    }
    assert why.pop("traceback").endswith("ValueError: no stock\n")
    assert why == {
        "type": "ValueError",
        "deliveries": "1",
        "error": "no stock",
        "topic": "orders.new",
        "group": "shop",
        "consumer": "payments",
        "attempts": str(failures + 1),
        "published-at": repr(timestamp),
        "failed-at": repr(now),
    }


def test_a_dead_letter_topic_of_its_own_is_where_they_go() -> None:
    own = FailureRules(consumer="c", group="g", retry=Retry(attempts=1), dead_letter_topic="graveyard")
    settlement = settle_failure(message(), ValueError(), own, draw=0.0, now=0.0)
    assert settlement.outputs[0].topic == "graveyard"


def test_a_dead_letter_that_dies_again_says_why_it_died_last() -> None:
    first = give_up(message(headers={"a": "b"}), ValueError("first"), rules(), now=1.0).outputs[0]
    again: Message[Any] = Message(first.topic, first.body, first.id, headers=first.headers)
    second = give_up(again, KeyError("second"), rules(), now=2.0).outputs[0]
    assert second.topic == "payments.created.shop.dead.shop.dead"
    assert second.headers[DEAD_PREFIX + "error"] == "'second'"
    assert second.headers[DEAD_PREFIX + "topic"] == "payments.created.shop.dead"
    assert without_dead_headers(second.headers) == {"a": "b"}


# -- the reason ------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """An exception whose text cannot be had."""

    def __init__(self, raised: BaseException | None) -> None:
        self.raised = raised

    def __str__(self) -> str:
        if self.raised is None:
            number: Any = 5
            return number  # type: ignore[no-any-return]
        raise self.raised


def raised(error: BaseException, depth: int = 0) -> BaseException:
    """`error` with the traceback of a raise `depth` calls deep."""
    try:
        return raised(error, depth - 1) if depth else _raise(error)
    except BaseException as caught:
        return caught


def _raise(error: BaseException) -> BaseException:
    raise error


def chained(length: int, text: str) -> BaseException:
    error: BaseException = ValueError(text)
    for _ in range(length):
        following = RuntimeError(text)
        following.__cause__ = error
        error = following
    return error


def nested(depth: int, text: str) -> BaseException:
    error: Exception = ValueError(text)
    for _ in range(depth):
        error = ExceptionGroup(text, [error, KeyError(text)])
    return error


def cyclic() -> BaseException:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    return one


def noted(notes: Any) -> BaseException:
    error = ValueError("noted")
    error.__notes__ = notes
    return error


def check(reason: Reason) -> None:
    texts = (reason.type, reason.message, reason.traceback)
    assert sum(len(text.encode()) for text in texts) <= MAX_REASON
    assert reason.type


@given(text=st.text(st.characters(codec=None, exclude_categories=())), times=st.integers(0, 3_000))
def test_a_reason_is_valid_text_and_stays_within_its_bytes_whatever_the_exceptions_text(text: str, times: int) -> None:
    reason = reason_of(raised(ValueError(text * times)))
    check(reason)
    short = (text * times).encode("utf-8", "backslashreplace")
    if len(short) <= MAX_REASON // 4:
        assert reason.message == short.decode()


@pytest.mark.parametrize(
    "error",
    [
        raised(ValueError("x" * 3_000_000)),
        raised(ValueError("€" * 100_000)),
        raised(ValueError("\udcff\ud800" * 10_000)),
        raised(ValueError("\0\r\n\x1b[31m" * 10_000)),
        raised(ValueError("deep"), depth=500),
        chained(2_000, "y" * 100),
        nested(300, "z" * 100),
        cyclic(),
        noted(["a note"] * 10_000),
        noted(5),
        SyntaxError("x", ("file", 1, 1, 5)),  # type: ignore[arg-type]  # its text should be a string: traceback cannot format it
        type("N" * 10_000, (Exception,), {})("long name"),
        type("N", (Exception,), {"__module__": None})("no module"),
        type("N" * 10_000, (Reject,), {})("long name"),
        Reject(5),  # type: ignore[arg-type]
        UnicodeDecodeError("utf-8", b"\xff" * 100_000, 0, 1, "bad"),
        asyncio.CancelledError(),
        SystemExit(3),
    ],
    ids=range(18),
)
def test_a_reason_can_be_given_for_every_error_and_stays_within_its_bytes(error: BaseException) -> None:
    check(reason_of(error))


@pytest.mark.parametrize(
    "inner", [None, ValueError(), RecursionError(), asyncio.CancelledError(), SystemExit()], ids=range(5)
)
def test_an_error_whose_text_cannot_be_had_says_so(inner: BaseException | None) -> None:
    reason = reason_of(raised(Broken(inner)))
    check(reason)
    assert reason.message.startswith("<no text: Broken raised ")
    assert "test_policy.py" in reason.traceback or "<no text" in reason.traceback


def test_a_reason_names_the_type_with_its_module_and_keeps_start_and_end_of_a_long_text() -> None:
    reason = reason_of(raised(Broken(None)))
    assert reason.type == f"{__name__}.Broken"
    assert reason_of(ValueError()).type == "ValueError"
    long = reason_of(ValueError("start" + "x" * 10_000 + "end")).message
    assert long.startswith("start")
    assert " … " in long
    assert long.endswith("end")


def test_the_traceback_keeps_the_innermost_frames_and_a_rejection_has_none() -> None:
    assert "_raise" in reason_of(raised(ValueError("no"), depth=100)).traceback
    assert reason_of(raised(Reject("no"))) == Reason("sluiceway.errors.Reject", "no")


def test_a_reason_leaves_no_character_in_a_header_that_is_not_utf_8() -> None:
    letter = give_up(message(), raised(ValueError("\udcff")), rules(), now=0.0).outputs[0]
    for value in letter.headers.values():
        value.encode()


def test_what_the_result_of_a_users_function_made_us_raise_has_a_traceback() -> None:
    forming = Forming("default", 10, 1.0, split=Split(0, lambda accumulator, message: 5))  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError) as caught:
        forming.add(message(), None)
    error = caught.value
    trace = error.__traceback__
    while trace is not None and "batching" not in trace.tb_frame.f_code.co_filename:
        trace = trace.tb_next
    assert "split.step" in reason_of(error.with_traceback(trace)).traceback
    told = OptionError("the text says it all").with_traceback(trace)
    assert users_traceback(told) is None
