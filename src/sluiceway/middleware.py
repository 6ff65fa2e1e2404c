"""Middleware: one function type and how it is composed.

A middleware takes the message and the next step, and returns what the next step returns:

    async def timed(message: Message[Any], call_next: Handler) -> Any:
        started = time.monotonic()
        try:
            return await call_next(message)
        finally:
            print(time.monotonic() - started)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from .message import Handler, Message

Middleware = Callable[[Message[Any], Handler], Awaitable[Any]]
"""Takes a message and the next step; what it raises fails the message, what it returns is the message's value."""


def compose(middlewares: Sequence[Middleware], handler: Handler) -> Handler:
    """The handler with the middlewares round it; the first is the outermost."""
    for middleware in reversed(middlewares):
        handler = partial(_call, middleware, handler)
    return handler


def _call(middleware: Middleware, call_next: Handler, message: Message[Any]) -> Awaitable[Any]:
    return middleware(message, call_next)
