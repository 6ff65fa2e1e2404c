"""The envelope: what goes over the wire beside a body, as headers, on every broker that is not ours.

| header | meaning | without it |
| --- | --- | --- |
| `sluiceway-v` | the envelope's version, 1 | 1 |
| `sluiceway-id` | the message's id, stable over retries and dead letters | the broker's own id, if it has one |
| `sluiceway-key` | its key | the broker's own key, if it has one |
| `sluiceway-time` | when it was published, seconds since 1970 | the broker's own time |
| `sluiceway-failures` | how often its handler failed, as counted | 0 |
| `sluiceway-suspicions` | how often it ran alone as a suspect | 0 |
| `sluiceway-group` | the only group that it is for | all groups |

All other headers are the user's, also those with the same prefix, such as a dead letter's. A version may add headers;
an older one passes them on with the user's. The version number grows only when an older one would do wrong with what
a newer one sends; then the older one dead-letters it and says so. A message without any of these is a stranger's, and
welcome; a number that cannot be read counts as one that is not there.

NATS has two more: `sluiceway-due`, when a delayed message may be handled, in seconds since 1970; and `sluiceway-odd`,
as JSON, the headers that NATS cannot carry as they are, such as values with a line break.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from .errors import DecodeError
from .message import NO_HEADERS, Outgoing

VERSION = 1

V = "sluiceway-v"
ID = "sluiceway-id"
KEY = "sluiceway-key"
TIME = "sluiceway-time"
FAILURES = "sluiceway-failures"
SUSPICIONS = "sluiceway-suspicions"
GROUP = "sluiceway-group"

OWN = frozenset((V, ID, KEY, TIME, FAILURES, SUSPICIONS, GROUP))


class Envelope(Struct, gc=False):
    """What the headers of a message say. `error`: it cannot be handled, since a newer version sent it."""

    id: str | None = None
    key: str | None = None
    timestamp: float | None = None
    failures: int = 0
    suspicions: int = 0
    group: str | None = None
    headers: Mapping[str, str] = NO_HEADERS
    error: DecodeError | None = None


def seal(message: Outgoing, *, failures: int = 0, suspicions: int = 0) -> dict[str, str]:
    """All headers of a message that goes out: the user's and ours. What is 0 or None is left out."""
    headers = dict(message.headers) if message.headers else {}
    headers[V] = "1"
    headers[ID] = message.id
    headers[TIME] = repr(message.timestamp)
    if message.key is not None:
        headers[KEY] = message.key
    if failures:
        headers[FAILURES] = str(failures)
    if suspicions:
        headers[SUSPICIONS] = str(suspicions)
    if message.group is not None:
        headers[GROUP] = message.group
    return headers


def unseal(headers: Mapping[str, str]) -> Envelope:
    """What the headers of a message that came in say. An empty id is none: no two messages may share one."""
    get = headers.get
    version = _count(get(V))
    return Envelope(
        get(ID) or None,
        get(KEY),
        _seconds(get(TIME)),
        _count(get(FAILURES)),
        _count(get(SUSPICIONS)),
        get(GROUP),
        {name: value for name, value in headers.items() if name not in OWN} or NO_HEADERS,
        _newer(version) if version > VERSION else None,
    )


def _newer(version: int) -> DecodeError:
    return DecodeError(
        f"it has envelope version {version} and this Sluiceway reads up to {VERSION}; upgrade the consumer, then replay"
    )


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else 0


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds < 1e11 else None  # also not nan
