"""Records and messages: what goes over the wire beside a body, and which topic has it.

Headers are the envelope's, their values as UTF-8. A name that Kafka's client cannot carry goes into `sluiceway-odd`,
as JSON. `sluiceway-due` is when a delayed message may be handled, in seconds since 1970. A copy that goes back without
being counted says in `sluiceway-deliveries` how often it was handed out before.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from ...envelope import Envelope, seal, unseal
from ...errors import OptionError
from ...message import Message, Outgoing, check_topic

ODD = "sluiceway-odd"
DUE = "sluiceway-due"
DELIVERIES = "sluiceway-deliveries"
_OURS = (ODD, DUE, DELIVERIES)

_TOPIC = re.compile(r"[A-Za-z0-9._\-]{1,249}")

Headers = list[tuple[str, str | bytes | None]]  # as confluent-kafka takes them: the values are bytes


def topic_name(prefix: str, topic: str) -> str:
    """What Kafka calls a topic. Raises OptionError for one that it cannot have."""
    check_topic(topic, pattern=False)
    name = prefix + topic
    if not _TOPIC.fullmatch(name):
        raise OptionError(f"topic {topic!r}: Kafka's are at most 249 letters, digits, '.', '_' and '-'")
    return name


def retry_topic(topic: str, group: str) -> str:
    """Where a group's retries of a topic wait for their delay."""
    return f"{topic}.{group}.retry"


def write_headers(
    message: Outgoing, *, due: float = 0.0, failures: int = 0, suspicions: int = 0, deliveries: int = 0
) -> Headers:
    """The headers of a message that goes out."""
    plain: dict[str, str] = {}
    odd: dict[str, str] = {}
    for name, value in seal(message, failures=failures, suspicions=suspicions).items():
        fits = name.isascii() and "\0" not in name and name and name not in _OURS
        (plain if fits else odd)[name] = value
    if due:
        plain[DUE] = repr(due)
    if deliveries:
        plain[DELIVERIES] = str(deliveries)
    if odd:
        plain[ODD] = json.dumps(odd)
    return [(name, value.encode("utf-8", "surrogateescape")) for name, value in plain.items()]


def key_bytes(key: str | None) -> bytes | None:
    return None if key is None else key.encode("utf-8", "surrogateescape")


class Record(NamedTuple):
    """A record that has come."""

    offset: int
    body: bytes
    key: str | None
    envelope: Envelope
    timestamp: float
    due: float
    deliveries: int


def read_record(raw: Any) -> Record:
    """Read a record of confluent-kafka's, whatever is in it: what makes no sense counts as not there."""
    headers: dict[str, str] = {}
    for name, value in raw.headers() or ():
        headers[name] = "" if value is None else value.decode("utf-8", "surrogateescape")
    odd = headers.pop(ODD, None)
    if odd is not None:
        headers |= _object(odd)
    due = _number(headers.pop(DUE, None))
    deliveries = int(min(1e6, _number(headers.pop(DELIVERIES, None))))
    envelope = unseal(headers)
    key = raw.key()
    if envelope.key is None and key is not None:
        envelope.key = key.decode("utf-8", "surrogateescape")
    _, milliseconds = raw.timestamp()
    timestamp = max(0, milliseconds) / 1000 if envelope.timestamp is None else envelope.timestamp
    return Record(raw.offset(), raw.value() or b"", envelope.key, envelope, timestamp, due, deliveries)


def make_message(record: Record, topic: str, stranger: str) -> Message[Any]:
    """The message of a record; `stranger` is its id if it has none."""
    envelope = record.envelope
    return Message(
        topic,
        record.body,
        envelope.id or stranger,
        record.key,
        envelope.headers,
        record.timestamp,
        error=envelope.error,
    )


def _object(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _number(text: str | None) -> float:
    try:
        found = float(text or 0)
    except ValueError:
        return 0.0
    return found if 0 <= found < 1e11 else 0.0  # also not nan
