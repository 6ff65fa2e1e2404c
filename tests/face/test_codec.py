"""Payloads and bodies: decoded to what the consumer says, or an error that says what was expected."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluiceway import DecodeError, OptionError, PayloadTooLarge
from sluiceway.codec import encode, make_decoder, make_encoder


class Payment(msgspec.Struct):
    id: str
    cents: int
    currency: str = "USD"


@dataclass
class Order:
    id: UUID
    lines: list[Payment]


class Row(TypedDict):
    day: date
    price: Decimal


class Model(pydantic.BaseModel):
    when: datetime
    tags: list[str] = []


class Holder(msgspec.Struct):
    model: Model | None
    others: dict[str, Model]


class Created(msgspec.Struct, tag="created"):
    id: str


class Deleted(msgspec.Struct, tag="deleted"):
    id: str


class Colour(enum.Enum):
    RED = "red"


class Plain:
    pass


class HasPlain(msgspec.Struct):
    inside: list[Plain] | None
    again: HasPlain | None = None


WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ROUND_TRIPS: list[tuple[Any, Any]] = [
    (Any, {"a": [1, 2.5, None, True]}),
    (str, "Ada"),
    (int, 2**70),
    (None, None),
    (list[int], [1, 2]),
    (dict[str, float], {"a": 1.5}),
    (Payment, Payment("p1", 5)),
    (list[Payment], [Payment("p1", 5, "EUR")]),
    (Order, Order(UUID(int=5), [Payment("p", 1)])),
    (Row, {"day": date(2026, 1, 1), "price": Decimal("1.10")}),
    (Created | Deleted, Deleted("x")),
    (Payment | None, None),
    (Literal["a", "b"], "b"),
    (Colour, Colour.RED),
    (Annotated[int, msgspec.Meta(gt=0)], 3),
    (Model, Model(when=WHEN, tags=["x"])),
    (list[Model], [Model(when=WHEN)]),
    (Model | None, Model(when=WHEN)),
    (Holder, Holder(None, {"a": Model(when=WHEN)})),
]


@pytest.mark.parametrize(("kind", "payload"), ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
def test_what_is_published_is_what_its_consumer_gets(kind: Any, payload: Any) -> None:
    decode = make_decoder(kind)
    assert decode is not None
    assert decode(encode(payload)) == payload


def test_bytes_are_the_body_itself_both_ways() -> None:
    assert make_decoder(bytes) is None
    assert encode(b"\xff") == encode(bytearray(b"\xff")) == encode(memoryview(b"\xff")) == b"\xff"


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        (Payment, b'{"id": "a"}', "the body is not Payment: Object missing required field `cents`"),
        (Payment, b'{"id": "a", "cents": "5"}', "the body is not Payment: Expected `int`, got `str` - at `$.cents`"),
        (Payment, b"", "the body is not Payment: "),
        (Payment, b"{", "the body is not Payment: "),
        (Payment, b"\xff\xfe", "the body is not Payment: "),
        (str, b'"\xff"', "the body is not str: it is not UTF-8"),
        (Any, b'"\xff"', "it is not UTF-8"),
        (Any, b"[" * 200_000, "it is nested too deeply"),
        (list[Payment], b"5", f"the body is not list[{__name__}.Payment]: Expected `array`, got `int`"),
        (Annotated[int, msgspec.Meta(gt=0)], b"0", "Expected `int` >= 1"),
        (Model, b'{"when": "soon"}', "valid datetime or date, input is too short - at `when`"),
        (Model, b"\xff", "the body is not Model: "),
        (list[Model], b'[{"when": "soon"}]', "1 validation error"),
        (Holder, b'{"model": null, "others": {"a": 5}}', "others"),
        (Created | Deleted, b'{"type": "made", "id": "x"}', "Invalid value 'made' - at `$.type`"),
    ],
    ids=range(15),
)
def test_a_body_that_is_not_what_was_said_is_a_decode_error_that_says_what_was_expected(
    kind: Any, body: bytes, text: str
) -> None:
    decode = make_decoder(kind)
    assert decode is not None
    with pytest.raises(DecodeError) as caught:
        decode(body)
    assert text in str(caught.value)
    assert str(caught.value).startswith("the body is not ")


@given(body=st.binary(max_size=50))
@settings(max_examples=200, deadline=None)
def test_whatever_the_bytes_they_are_decoded_or_a_decode_error(body: bytes) -> None:
    for kind in (Any, Payment, Model, list[Model], str):
        decode = make_decoder(kind)
        assert decode is not None
        try:
            decode(body)
        except DecodeError:
            pass


@pytest.mark.parametrize("kind", [Plain, list[Plain], HasPlain, dict[str, Plain] | None], ids=range(4))
def test_a_type_that_nothing_in_json_can_become_is_refused_at_once(kind: Any) -> None:
    with pytest.raises(OptionError, match="cannot be decoded from JSON: nothing says how to make a Plain"):
        make_decoder(kind)


def test_a_type_that_msgspec_refuses_is_an_option_error_with_its_reason() -> None:
    with pytest.raises(OptionError, match=r"cannot be decoded from JSON: .*more than one dict-like type"):
        make_decoder(Payment | Order)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (Plain(), "a payload of type Plain cannot be written as JSON: it holds a Plain"),
        ({"a": [Plain()]}, "a payload of type dict cannot be written as JSON: it holds a Plain"),
        ({(1, 2): 3}, "a payload of type dict cannot be written as JSON"),
        ("\udcff", "a payload of type str cannot be written as JSON"),
        (1j, "a payload of type complex cannot be written as JSON"),
    ],
    ids=range(5),
)
def test_a_payload_that_json_cannot_say_is_refused_where_it_is_published(payload: Any, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        encode(payload)
    assert text in str(caught.value)


def test_a_payload_that_holds_itself_is_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(OptionError, match="cannot be written as JSON"):
        encode(cycle)


def test_a_body_over_the_brokers_limit_is_refused_where_it_is_published() -> None:
    within = make_encoder(10)
    assert within("a" * 8) == b'"aaaaaaaa"'
    with pytest.raises(PayloadTooLarge, match="the body has 11 bytes and the broker's limit is 10"):
        within("a" * 9)
