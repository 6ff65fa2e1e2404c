"""How parts of a message are stored in a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from ...message import NO_HEADERS, Stored

_decode = msgspec.json.Decoder(dict[str, str]).decode


def text(value: str) -> str | bytes:
    """What SQLite can store of `value`: bytes when it is no valid Unicode (`surrogateescape` keeps foreign bytes)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogateescape")
    return value


def untext(value: str | bytes) -> str:
    """What `text` was given."""
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def encode_headers(headers: Mapping[str, str]) -> str | None:
    """Headers as JSON; None when there are none."""
    if not headers:
        return None
    try:
        return msgspec.json.encode(dict(headers)).decode()
    except UnicodeEncodeError:
        return json.dumps(dict(headers))  # escapes what is no valid Unicode


def decode_headers(headers: str | None) -> Mapping[str, str]:
    """What `encode_headers` was given."""
    if headers is None:
        return NO_HEADERS
    try:
        return _decode(headers)
    except msgspec.DecodeError:
        decoded: dict[str, str] = json.loads(headers)
        return decoded


STORED = "seq, topic, body, id, key, headers, timestamp"
"""The columns that `stored` takes."""


def stored(seq: int, topic: str, body: bytes, id_: Any, key: Any, headers: str | None, timestamp: float) -> Stored:
    """A message at rest."""
    key = None if key is None else untext(key)
    return Stored(str(seq), topic, body, untext(id_), key, decode_headers(headers), timestamp)
