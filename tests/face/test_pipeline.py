"""What a pipeline without an app takes beside a consumer's options."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sluiceway import Message, OptionError, Pipeline


async def open_source() -> Any: ...


async def handle(message: Message[Any]) -> None: ...


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shutdown_timeout": -1}, "handle: shutdown_timeout must be 0 or more seconds; got -1"),
        ({"shutdown_timeout": "25"}, "handle: shutdown_timeout must be 0 or more seconds; got '25'"),
        ({"shutdown_timeout": math.inf}, "handle: shutdown_timeout must be 0 or more seconds; got inf"),
        ({"max_restarts": -1}, "handle: max_restarts must be a whole number, 0 or more; got -1"),
        ({"max_restarts": True}, "handle: max_restarts must be a whole number, 0 or more; got True"),
        ({"max_seconds": 0}, "handle: max_seconds must be seconds, more than 0; got 0"),
        ({"telemetry": print}, "handle: telemetry must be a Telemetry or None; got <built-in function print>"),
        ({"publish_headers": {}}, "handle: publish_headers must be a function that takes nothing and returns headers"),
    ],
)
def test_an_option_that_cannot_be_names_its_value_and_what_is_allowed(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Pipeline(open_source, handle, **options)
    assert str(caught.value).startswith(text)


def test_good_options_are_taken() -> None:
    assert Pipeline(open_source, handle, shutdown_timeout=0, max_restarts=0, max_seconds=0.5, publish_headers=dict)
