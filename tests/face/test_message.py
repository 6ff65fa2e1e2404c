"""Messages, batches and what users may do with them, outside and inside a pipeline."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from sluiceway import (
    AlreadySettled,
    Batch,
    BatchInfo,
    ForeignMessage,
    Message,
    OptionError,
    Reject,
    Release,
    RetryLater,
    RoutingError,
)
from sluiceway.codec import encode
from sluiceway.errors import MessageFailed
from sluiceway.message import NO_HEADERS, SETTLED, Outgoing, new_id


class Settler:
    """What a running pipeline gives a message, without one."""

    def __init__(self) -> None:
        self.settled: list[Message[Any]] = []

    async def settle_now(self, messages: Sequence[Message[Any]]) -> None:
        for one in messages:
            one.state = SETTLED
        self.settled += messages

    def encode(self, payload: Any) -> bytes:
        return encode(payload)

    def with_headers(self, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
        return headers

    def check_batcher(self, name: str) -> None:
        if name not in ("default", "s3"):
            raise RoutingError(f"there is no batcher {name!r}")


def message(**given: Any) -> Message[Any]:
    return Message("orders", b"{}", "id-1", **given)


def running(**given: Any) -> Message[Any]:
    return message(settler=Settler(), **given)


# -- messages ----------------------------------------------------------------------------------------------------------


def test_the_attempt_is_one_more_than_failures_and_suspicions() -> None:
    assert message().attempt == 1
    assert message(failures=2, suspicions=3).attempt == 6


def test_published_at_is_the_timestamp_in_utc() -> None:
    assert message(timestamp=0.0).published_at == datetime(1970, 1, 1, tzinfo=UTC)


def test_two_deliveries_of_one_message_are_two_messages() -> None:
    one, other = message(), message()
    assert one != other
    assert len({one, other}) == 2


def test_ids_are_all_different() -> None:
    assert len({new_id() for _ in range(1_000)}) == 1_000


def test_to_says_batcher_key_and_flush_and_a_later_call_replaces_an_earlier_one() -> None:
    one = running()
    one.to("s3", key="day", flush=True)
    assert one.routing == ("s3", "day", True)
    one.to()
    assert one.routing == ("default", None, False)


def test_to_is_checked_on_the_users_own_line() -> None:
    one = running()
    with pytest.raises(RoutingError, match="there is no batcher 's4'"):
        one.to("s4")
    with pytest.raises(TypeError, match="unhashable type: 'list'"):
        one.to("s3", key=[])  # type: ignore[arg-type]
    assert one.routing is None


def test_to_works_outside_a_pipeline_so_that_a_handler_can_be_tested_by_itself() -> None:
    one = message()
    one.to("anything", key=1)
    assert one.routing == ("anything", 1, False)


def test_fail_takes_an_error_its_type_or_a_text_and_the_last_call_counts() -> None:
    one = message()
    error = ValueError("no")
    one.fail(error)
    assert one.error is error
    one.fail(Reject)
    assert isinstance(one.error, Reject)
    one.fail("no stock")
    assert isinstance(one.error, MessageFailed)
    assert str(one.error) == "no stock"


async def test_a_settled_message_can_neither_fail_nor_publish_nor_be_settled_again() -> None:
    one = running(state=SETTLED)
    with pytest.raises(AlreadySettled, match="message id-1 of 'orders' is settled already and cannot fail any more"):
        one.fail("late")
    with pytest.raises(AlreadySettled, match=r"message id-1 of 'orders' is settled already; use app.publish"):
        one.publish("events", 1)
    with pytest.raises(AlreadySettled, match="message id-1 of 'orders' is settled already"):
        await one.ack()
    assert one.error is None
    assert one.outputs is None


async def test_outside_a_pipeline_nothing_can_be_published_or_settled() -> None:
    with pytest.raises(AlreadySettled, match=r"message id-1 is not in a running pipeline; use app.publish"):
        message().publish("events", 1)
    with pytest.raises(AlreadySettled, match="is not in a running pipeline; nothing to settle"):
        await message().ack()


async def test_an_early_ack_settles_once() -> None:
    settler = Settler()
    one = message(settler=settler)
    await one.ack()
    assert settler.settled == [one]
    with pytest.raises(AlreadySettled):
        await one.ack()


def test_what_a_message_publishes_is_kept_in_order_for_its_settle() -> None:
    one = running()
    one.publish("events", {"a": 1}, key="k", headers={"h": "v"}, delay=2.0)
    one.publish("audit", b"raw")
    assert one.outputs is not None
    first, second = one.outputs
    assert (first.topic, first.body, first.key, first.headers, first.delay) == (
        "events", b'{"a":1}', "k", {"h": "v"}, 2.0,
    )  # fmt: skip
    assert (second.topic, second.body, second.key, second.headers, second.delay) == ("audit", b"raw", None, {}, 0.0)
    assert first.id != second.id


NOT_PUBLISHED: list[tuple[dict[str, Any], str]] = [
    ({"topic": "a b"}, "topic 'a b' has the word 'a b'"),
    ({"topic": "a.*"}, "topic 'a.*' is a pattern; a message is published to one topic"),
    ({"topic": ""}, "topic must be a non-empty string, got ''"),
    ({"topic": None}, "topic must be a non-empty string, got None"),
    ({"payload": object()}, "a payload of type object cannot be written as JSON"),
    ({"key": 5}, "publish to 'events': key must be a string or None, got 5"),
    ({"key": "\ud800"}, "publish to 'events': key must be a string or None, got '\\ud800'"),
    ({"delay": -1}, "publish to 'events': delay must be 0 or more seconds, got -1"),
    ({"delay": math.nan}, "publish to 'events': delay must be 0 or more seconds, got nan"),
    ({"delay": math.inf}, "publish to 'events': delay must be 0 or more seconds, got inf"),
    ({"delay": True}, "publish to 'events': delay must be 0 or more seconds, got True"),
    ({"delay": "5"}, "publish to 'events': delay must be 0 or more seconds, got '5'"),
    ({"headers": {"a": 1}}, "publish to 'events': headers are strings, got 'a': 1"),
    ({"headers": {1: "a"}}, "publish to 'events': headers are strings, got 1: 'a'"),
    ({"headers": {"a": "\udcff"}}, "publish to 'events': headers are strings, got 'a': '\\udcff'"),
    ({"headers": ["a"]}, "publish to 'events': headers must be a mapping from strings to strings, got ['a']"),
]


@pytest.mark.parametrize(("given", "text"), NOT_PUBLISHED, ids=range(len(NOT_PUBLISHED)))
def test_what_no_broker_would_take_is_refused_on_the_users_own_line(given: dict[str, Any], text: str) -> None:
    """It would otherwise come to light at the settle, where the message's own ack would wait for it for ever."""
    one = running()
    with pytest.raises(OptionError) as caught:
        one.publish(**{"topic": "events", "payload": 1, **given})
    assert text in str(caught.value)
    assert one.outputs is None


def test_a_key_that_is_not_utf_8_can_be_handed_on() -> None:
    one = running(key=b"\xff".decode("utf-8", "surrogateescape"))
    one.publish("events", 1, key=one.key)
    assert one.outputs is not None
    assert one.outputs[0].key == one.key


def test_headers_that_none_were_given_cannot_be_changed_for_all() -> None:
    with pytest.raises(TypeError):
        Outgoing("t", b"").headers["a"] = "b"  # type: ignore[index]
    assert NO_HEADERS == {}


# -- batches -----------------------------------------------------------------------------------------------------------


def batch(*messages: Message[Any], key: Any = None) -> Batch[Any]:
    return Batch(messages, BatchInfo("default", key, len(messages), "size"))


def test_a_batch_is_a_sequence_of_its_messages_in_order() -> None:
    one, other, third = message(value=1), message(value=2), message(value=3)
    whole = batch(one, other, third, key="USD")
    assert list(whole) == [one, other, third]
    assert (len(whole), whole[0], whole[-1], whole[1:]) == (3, one, third, (other, third))
    assert other in whole
    assert message() not in whole
    assert list(reversed(whole)) == [third, other, one]
    assert whole.values == [1, 2, 3]
    assert whole.key == "USD"
    assert whole.info.trigger == "size"
    assert repr(whole) == "<Batch of 3 for 'default', key 'USD', by size>"
    with pytest.raises(IndexError):
        whole[3]


def test_a_batch_cannot_be_changed() -> None:
    given = [message(value=1), message(value=2)]
    whole: Batch[Any] = Batch(given, BatchInfo("default", None, 2, "size"))
    given.clear()
    whole.values.clear()
    assert whole.values == [1, 2]
    with pytest.raises(TypeError):
        whole[0] = message()  # type: ignore[index]
    with pytest.raises(TypeError):
        del whole[0]  # type: ignore[attr-defined]
    for change in ("append", "clear", "pop", "sort", "extend"):
        assert not hasattr(whole, change)
    with pytest.raises(AttributeError):
        whole.other = 5  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        whole.info.size = 5  # type: ignore[misc]


def test_one_message_of_a_batch_fails_and_the_others_do_not() -> None:
    one, other, third = message(), message(), message()
    whole = batch(one, other, third)
    whole[1].fail("no stock")
    whole.fail(third, ValueError)
    assert one.error is None
    assert str(other.error) == "no stock"
    assert isinstance(third.error, ValueError)


def test_a_message_of_another_batch_cannot_be_failed() -> None:
    one, twin = message(), message()
    with pytest.raises(ForeignMessage, match="message id-1 of 'orders' is not of this batch of 1"):
        batch(one).fail(twin, "no")
    assert twin.error is None


@pytest.mark.parametrize("wrong", [0, None, "id-1"])
def test_what_is_no_message_cannot_be_failed_and_is_told_what_to_write(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=r"batch\.fail takes a message of the batch, got .*batch\.fail\(batch\[i\], error"
    ):
        batch(message()).fail(wrong, "no")


async def test_one_message_alone_is_acked_as_a_list_of_one() -> None:
    one = message()
    with pytest.raises(TypeError, match=r"write batch\.ack\(\[message\]\)"):
        await batch(one).ack(one)  # type: ignore[arg-type]


def test_the_same_index_and_slice_errors_as_any_sequence() -> None:
    with pytest.raises(TypeError):
        batch(message())["0"]  # type: ignore[call-overload]


# -- directives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "directive",
    [Reject("no"), Reject(), Release("later"), RetryLater(), RetryLater(5.0, "busy", counted=False)],
    ids=range(5),
)
def test_a_directive_survives_pickling_and_copying(directive: Any) -> None:
    for copied in (pickle.loads(pickle.dumps(directive)), copy.copy(directive)):
        assert type(copied) is type(directive)
        assert vars(copied) == vars(directive)
        assert str(copied) == str(directive) == directive.reason


@pytest.mark.parametrize("delay", [-1, math.nan, math.inf, "5", True, 10**400], ids=range(6))
def test_a_retry_later_that_cannot_be_says_what_is_allowed(delay: Any) -> None:
    with pytest.raises(OptionError) as caught:
        RetryLater(delay)
    assert str(caught.value) == f"RetryLater: delay must be 0 or more seconds, or None; got {delay!r}"
