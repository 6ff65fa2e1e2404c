"""Stream entries from and to messages.

An entry with a field `body` is ours or follows our layout: that field is the body, all other fields are headers (the
envelope's and the user's). An entry without one is a stranger's: its body is the JSON object of its fields, all values
strings, and it has no headers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..._decisions.suspicion import is_suspect
from ...envelope import ID, TIME, seal, unseal
from ...message import NO_HEADERS, Message, Outgoing, Stored

Entry = list[Any]  # its id, and its fields: name, value, name, value …

MAX_HEADERS = 1000  # what Lua can hand on in one call is limited

_ID, _TIME = ID.encode(), TIME.encode()


def fields_of(message: Outgoing, *, failures: int = 0) -> list[bytes | str]:
    """The fields of a message that goes out: name, value, name, value …"""
    fields: list[bytes | str] = [b"body", message.body, _ID, _bytes(message.id), _TIME, repr(message.timestamp)]
    if failures or message.key is not None or message.headers:
        for name, value in seal(message, failures=failures).items():
            if name not in (ID, TIME):
                fields += (_bytes(name), _bytes(value))
    return fields


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def messages_of(
    entries: Sequence[Entry], topic: str, stream: str, consumer: str, group: str
) -> tuple[list[Message[Any]], list[bytes]]:
    """The messages of entries that were never handed over before, and the ids of those that are for another group."""
    made: list[Message[Any]] = []
    others: list[bytes] = []
    append = made.append
    for entry in entries:
        one, fields = entry
        if len(fields) == 6 and fields[2] == _ID and fields[4] == _TIME and fields[0] == b"body":
            try:
                timestamp = float(fields[5])
                if 0 <= timestamp < 1e11:
                    token = (stream, one, consumer)
                    append(Message(topic, fields[1], fields[3].decode(), None, NO_HEADERS, timestamp, consumer, token))
                    continue
            except ValueError:
                pass  # bytes that are no text, or no number
        if _opened(entry)[2].group not in (None, group):
            others.append(one)
        else:
            append(message_of(entry, topic, stream, consumer))
    return made, others


def message_of(
    entry: Entry, topic: str, stream: str, consumer: str,
    delivered: int = 1, suspicions: int = 0, failures: int = 0, serial: int = 0,
) -> Message[Any]:  # fmt: skip
    """One message, whatever its fields. `failures`: those that its entry does not say. `serial` tells apart what came
    to the same consumer more than once."""
    one, body, envelope = _opened(entry)
    failures += envelope.failures
    return Message(
        topic,
        body,
        one if envelope.id is None else envelope.id,
        envelope.key,
        envelope.headers,
        _time(one) if envelope.timestamp is None else envelope.timestamp,
        consumer,
        (stream, entry[0], consumer, serial) if serial else (stream, entry[0], consumer),
        delivered + failures,
        failures,
        suspicions,
        is_suspect(delivered, 0, suspicions),
        error=envelope.error,
    )


def stored_of(entry: Entry, topic: str) -> Stored:
    """An entry at rest."""
    one, body, envelope = _opened(entry)
    name = one if envelope.id is None else envelope.id
    time = _time(one) if envelope.timestamp is None else envelope.timestamp
    return Stored(one, topic, body, name, envelope.key, envelope.headers, time)


def _opened(entry: Entry) -> tuple[str, bytes, Any]:
    """An entry's id, its body and its envelope."""
    one, fields = entry
    names, values = fields[::2], fields[1::2]
    if b"body" not in names:
        pairs = zip(names, values, strict=True)
        shown = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in pairs}
        return one.decode(), msgspec.json.encode(shown), unseal({})
    at = names.index(b"body")
    del names[at]
    rest = {_text(name): _text(value) for name, value in zip(names, values[:at] + values[at + 1 :], strict=True)}
    return one.decode(), values[at], unseal(rest)


def _time(one: str) -> float:
    return int(one.partition("-")[0]) / 1000
