"""The payload of the rows over real brokers: 200 bytes of JSON, decoded to a msgspec struct."""

from __future__ import annotations

import msgspec
from msgspec import Struct


class Order(Struct):
    """The payload: 200 bytes of JSON."""

    id: str
    customer: str
    cents: int
    currency: str
    lines: list[str]
    note: str


def order(number: int) -> Order:
    """The payload of a message."""
    made = Order(
        f"order-{number:09}", f"customer-{number % 997:06}", number % 100_000 + 1_000_000, "USD", ["a-1", "b-2"], ""
    )
    made.note = "n" * (200 - len(encode(made)))
    return made


decode = msgspec.json.Decoder(Order).decode
encode = msgspec.json.Encoder().encode


def handle(order: Order) -> None:
    """The handler that does nothing, of loops written by hand."""
