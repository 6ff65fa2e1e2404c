"""The page of the envelope."""

from __future__ import annotations

import inspect

from sluiceway import envelope
from sluiceway._decisions.policy import DEAD_PREFIX

HEAD = """\
# The envelope

What is on the wire, for those who publish or consume without Sluiceway. Made from `sluiceway.envelope` by `make docs`.
The embedded SQLite broker keeps the same in columns.

The body is what was published: JSON unless `bytes` were given. Beside it go headers.
"""

TAIL = """\
## Dead letters

A dead letter has the body, the key, the id and the headers of its message, and these headers more:

| header | meaning |
| --- | --- |
"""

DEAD = {
    "topic": "where the message was consumed",
    "group": "the group that failed",
    "consumer": "the consumer that failed",
    "attempts": "how many attempts it had",
    "deliveries": "how often the broker handed it over",
    "type": "the type of the error, with its module",
    "error": "the text of the error",
    "traceback": "where it was raised, if it was",
    "failed-at": "when it failed, seconds since 1970",
    "published-at": "when the message was published, seconds since 1970",
}


def page() -> str:
    text = inspect.cleandoc(envelope.__doc__ or "")
    before, table, after = text.partition("| header")
    rows = "\n".join(f"| `{DEAD_PREFIX}{name}` | {meaning} |" for name, meaning in DEAD.items())
    return f"{HEAD}\n{before.strip()}\n\n{table}{after}\n\n{TAIL}{rows}\n"
