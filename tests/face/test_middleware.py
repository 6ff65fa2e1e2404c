"""Middleware: composed from the outside in."""

from __future__ import annotations

from typing import Any

import pytest

from sluiceway import Message
from sluiceway.message import Handler
from sluiceway.middleware import Middleware, compose

MESSAGE: Message[Any] = Message("t", b"", "id-1")


def traced(name: str, trace: list[str]) -> Middleware:
    async def middleware(message: Message[Any], call_next: Handler) -> Any:
        trace.append(f"{name} in")
        try:
            return f"{name}({await call_next(message)})"
        finally:
            trace.append(f"{name} out")

    return middleware


async def handle(message: Message[Any]) -> str:
    return message.id


async def test_the_first_middleware_is_the_outermost_and_what_it_returns_is_the_value() -> None:
    trace: list[str] = []
    composed = compose([traced("a", trace), traced("b", trace)], handle)
    assert await composed(MESSAGE) == "a(b(id-1))"
    assert trace == ["a in", "b in", "b out", "a out"]


async def test_what_a_handler_raises_goes_through_every_middleware() -> None:
    async def fail(message: Message[Any]) -> None:
        raise ValueError("no")

    trace: list[str] = []
    with pytest.raises(ValueError, match="no"):
        await compose([traced("a", trace), traced("b", trace)], fail)(MESSAGE)
    assert trace == ["a in", "b in", "b out", "a out"]


async def test_a_middleware_may_answer_by_itself() -> None:
    async def answer(message: Message[Any], call_next: Handler) -> str:
        return "mine"

    assert await compose([answer], handle)(MESSAGE) == "mine"


def test_no_middleware_is_the_handler_itself() -> None:
    assert compose([], handle) is handle
