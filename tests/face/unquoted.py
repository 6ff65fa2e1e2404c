# No `from __future__ import annotations` here: annotations are values, as in most code. The tests beside read them.
"""Consumers whose annotations are values."""

import msgspec

from sluiceway import Batch, Consumer, Message, consumer


class Payment(msgspec.Struct):
    id: str


class Later(msgspec.Struct):
    id: str


@consumer("t")
async def payments(message: Message[Payment]) -> None: ...


@consumer("t")
async def forward(message: Message["Later"]) -> None: ...


@consumer("t")
class Payments(Consumer["Later"]):
    async def handle_batch(self, batch: Batch["Later"]) -> None: ...
