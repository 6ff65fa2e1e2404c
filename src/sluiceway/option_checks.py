"""What options may be: each check returns what is allowed when a value is not, and None when it is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from ._decisions.topics import check_topic
from .acknowledger import Acknowledger
from .errors import OptionError


def count(value: Any) -> str | None:
    number = isinstance(value, int) and not isinstance(value, bool)
    return None if number and value >= 1 else "a whole number, 1 or more"


def seconds(value: Any) -> str | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if number and 0 < value <= sys.float_info.max else "seconds, more than 0"


def optional(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def checked(value: Any) -> str | None:
        problem = None if value is None else check(value)
        return f"{problem}, or None" if problem else None

    return checked


def text(value: Any) -> str | None:
    return None if isinstance(value, str) and value and value.isprintable() else "a non-empty string"


def topic(value: Any) -> str | None:
    try:
        check_topic(value, pattern=False)
    except OptionError:
        return "words of letters, digits and _-:/@+=~, joined by dots"
    return None


def one_of(*allowed: Any) -> Callable[[Any], str | None]:
    listed = ", ".join(map(repr, allowed))
    return lambda value: None if value in allowed else f"one of {listed}"


def instance(kind: type, what: str) -> Callable[[Any], str | None]:
    return lambda value: None if isinstance(value, kind) else what


def middlewares(of: str, example: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        good = isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_middleware, value))
        return None if good else f"a sequence of functions ({of}, call_next), like [{example}()]"

    return check


def _is_middleware(value: Any) -> bool:
    """Whether it can be called with what is handled and the next step, or makes something that can."""
    if isinstance(value, type) or inspect.isgeneratorfunction(value) or inspect.isasyncgenfunction(value):
        return False
    if callable(getattr(value, "for_consumer", None)):
        return True
    try:
        inspect.signature(value).bind("subject", "call_next")
    except (TypeError, ValueError):
        return False
    return True


def acknowledgers(value: Any) -> str | None:
    good = isinstance(value, Sequence) and all(isinstance(one, Acknowledger) for one in value)
    return (
        None
        if good and not isinstance(value, str)
        else "a sequence of objects of classes that inherit from Acknowledger, like [Audit()]"
    )


def gates(value: Any) -> str | None:
    good = isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_gate, value))
    return None if good else "a sequence of gates, like [RateLimit(100, 60)]"


def _is_gate(value: Any) -> bool:
    methods = ("allow", "took", "opens_at", "on_change")
    return not isinstance(value, type) and all(callable(getattr(value, method, None)) for method in methods)


def start(value: Any) -> str | None:
    good = value.tzinfo is not None if isinstance(value, datetime) else value in ("earliest", "latest")
    return None if good else "'earliest', 'latest' or a datetime with a time zone"


def parse_start(text: str) -> str | datetime:
    return text if text in ("earliest", "latest") else datetime.fromisoformat(text)


def anything(value: Any) -> str | None:
    return None
