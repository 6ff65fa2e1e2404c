"""Messages on the wire: what goes out as properties and body, and what comes in as a message.

The id is the property `message_id` and the time, to the second, `timestamp`; all else is headers, as the envelope says.
Beside the envelope's:

| header | meaning | without it |
| --- | --- | --- |
| `sluiceway-topic` | the topic, where a message goes to one queue | the routing key |
| `sluiceway-due` | seconds since 1970 before which it is handed to no handler | at once |
| `sluiceway-deliveries` | how often it was handed over before, without releases | failures + suspicions |
| `sluiceway-alone` | in the queue of suspects: the suspicions that there are once it runs | it is no suspect's copy |
| `sluiceway-headers` | all headers of the user, as JSON, where AMQP cannot hold them as they are | they are headers |
| `sluiceway-place` | with `order_by`: where a copy stands among the messages of its key | it is no copy |
| `sluiceway-probe` | no message, but a question whether all before it in its queue has come | it is a message |
| `sluiceway-stored` | the place of a dead letter among others, for browsing | its id |
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from pika.spec import BasicProperties

from ..._decisions.suspicion import is_suspect
from ...envelope import ID, KEY, OWN, TIME, V, seal, unseal
from ...message import Message, Outgoing, Stored, new_id
from .topology import HIGHEST, RUNG
from .wire import Delivery

TOPIC, DUE, BASE = "sluiceway-topic", "sluiceway-due", "sluiceway-deliveries"
PLACE, PROBE = "sluiceway-place", "sluiceway-probe"
ALONE, JSON, STORED = "sluiceway-alone", "sluiceway-headers", "sluiceway-stored"
_OURS = frozenset((TOPIC, DUE, BASE, ALONE, JSON, STORED, RUNG, PLACE, PROBE))
_MAX_HEADERS = 64 * 1024  # bytes: the properties of a message must fit in one frame, of 128 KiB
_NATIVE = ("content_type", "content_encoding", "correlation_id", "reply_to", "expiration", "type", "app_id")


class Letter(Struct, gc=False):
    """What is handed to the broker: where it goes, and how it looks there."""

    exchange: str
    key: str
    body: bytes
    properties: BasicProperties


def pack(outgoing: Outgoing, more: Mapping[str, str], *, failures: int = 0, suspicions: int = 0) -> BasicProperties:
    """The properties of a message. Raises ValueError that says why it cannot be sent."""
    headers: dict[str, Any] = seal(outgoing, failures=failures, suspicions=suspicions)
    del headers[V]
    if outgoing.headers and not _plain(outgoing.headers):
        headers = {name: value for name, value in headers.items() if name in OWN}
        headers[JSON] = json.dumps(dict(outgoing.headers))
    if outgoing.key is not None:
        headers[KEY] = _text_or_bytes(outgoing.key)
    headers.update(more)
    short = len(outgoing.id.encode("utf-8", "surrogateescape")) < 256
    if short:
        del headers[ID]
    if (outgoing.headers or not short or outgoing.key) and _size(headers) > _MAX_HEADERS:
        raise ValueError(f"its headers have more than {_MAX_HEADERS} bytes, and RabbitMQ takes no more with a message")
    name: Any = _text_or_bytes(outgoing.id) if short else None
    return BasicProperties(
        headers=headers,
        delivery_mode=2,
        message_id=name,
        timestamp=int(outgoing.timestamp),
    )


def _plain(headers: Mapping[str, str]) -> bool:
    try:
        return all(len(name.encode()) < 256 and value.encode() is not None for name, value in headers.items())
    except UnicodeEncodeError:
        return False


def _text_or_bytes(text: str) -> str | bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return text if raw == text.encode("utf-8", "replace") else raw


def _size(headers: Mapping[str, str | bytes]) -> int:
    return sum(len(name) * 2 + len(value) * 2 + 6 for name, value in headers.items())


class Inbound(Struct, gc=False):
    """A message that came, and what is ours about it. `due`: it must wait on, until then. `probe`: it is no message."""

    message: Message[Any]
    group: str | None = None
    due: float = 0.0
    alone: int | None = None
    place: int | None = None
    probe: str | None = None


def open_letter(delivery: Delivery, scope: Any, explained: int = 0) -> Inbound:
    """The message of a delivery. `explained` of its hand-overs ended with a connection of this process, which lives."""
    tag, redelivered, key, properties, body, _ = delivery
    headers: Mapping[Any, Any] = properties.headers or {}
    name, at = properties.message_id, headers.get(TIME)
    if (
        len(headers) == 1 and name.__class__ is str and at.__class__ is str and name and not redelivered
    ):  # nearly every one
        timestamp = unseal(headers).timestamp or 0.0
        return Inbound(Message(key, body, name, timestamp=timestamp, scope=scope, token=tag))
    text = _as_text(headers)
    envelope = unseal(text)
    count = max(_number(text.get("x-delivery-count")), int(redelivered)) - explained
    failures, suspicions = envelope.failures, envelope.suspicions
    base = _number(text.get(BASE)) if BASE in text else failures + suspicions
    alone = _number(text[ALONE]) if ALONE in text else None
    if alone is not None and count > 0:  # so many processes died while it ran alone
        suspicions, alone = alone + count - 1, alone + count
        base, count = failures + suspicions, 1
    deliveries = base + 1 + max(0, count)
    message: Message[Any] = Message(
        text.get(TOPIC, key),
        body,
        envelope.id or _name(properties.message_id) or f"{new_id()}",
        envelope.key,
        _users(envelope.headers, properties, ours=TIME in text),
        envelope.timestamp if envelope.timestamp is not None else float(properties.timestamp or time.time()),
        scope,
        tag,
        deliveries,
        failures,
        suspicions,
        is_suspect(deliveries, failures, suspicions),
    )
    message.error = envelope.error
    place = int(text[PLACE]) if text.get(PLACE, "").isdecimal() and len(text[PLACE]) < 20 else None
    return Inbound(message, envelope.group, _due(text), alone, place, text.get(PROBE))


def open_stored(delivery: Delivery, topic: str) -> Stored:
    """A dead letter as `browse` shows it."""
    message = open_letter(delivery, None).message
    stored = _as_text(delivery[3].headers or {}).get(STORED) or f"?{message.id}"
    return Stored(stored, topic, message.body, message.id, message.key, message.headers, message.timestamp)


def _users(headers: Mapping[str, str], properties: BasicProperties, *, ours: bool) -> Mapping[str, str]:
    if JSON in headers:
        try:
            return {str(name): str(value) for name, value in json.loads(headers[JSON]).items()}
        except (ValueError, AttributeError):
            pass
    users = {name: value for name, value in headers.items() if name not in _OURS and not _brokers(name)}
    if not ours:  # a stranger's: what it said in properties would be lost with a retry
        users |= {
            name.replace("_", "-"): _name(value) for name in _NATIVE if (value := getattr(properties, name)) is not None
        }
    return users


def _brokers(name: str) -> bool:
    return name.startswith(("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"))


def _as_text(headers: Mapping[Any, Any]) -> dict[str, str]:
    return {_name(name): _name(value) for name, value in headers.items()}


def _name(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else "" if value is None else str(value)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else 0


def _due(text: Mapping[str, str]) -> float:
    """When it may be handled, by our clock. What has left a rung has less than that rung left to wait, whatever the
    clock of the machine that sent it said; on the highest it may have more."""
    due, rung = _seconds(text.get(DUE)), _seconds(text.get(RUNG))
    return min(due, time.time() + rung) if due and 0 < rung < HIGHEST else due


def _seconds(text: str | None) -> float:
    try:
        return min(float(text), 1e11) if text else 0.0
    except ValueError:
        return 0.0
