"""The keys of a topic and of a group. A topic's braces hold it apart from the group, and keep its keys in one slot."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ...message import Outgoing, new_id
from .entries import fields_of


def pack(values: Iterable[bytes | str | int]) -> bytes:
    """A list of strings as the scripts read it: each after its length in four bytes."""
    parts: list[bytes] = []
    for value in values:
        part = value if isinstance(value, bytes) else str(value).encode()
        parts += (len(part).to_bytes(4), part)
    return b"".join(parts)


class Keys:
    """Names of keys, all with one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def retry(self, topic: str, group: str) -> str:
        """The stream of what only this group receives: retries, replays, bells."""
        return f"{self._prefix}:retry:{{{topic}}}:{group}"

    def due(self, topic: str, group: str | None) -> str:
        """What waits for its time: the group's, or with None the topic's."""
        return f"{self._prefix}:due:{{{topic}}}" + ("" if group is None else f":{group}")

    def record(self, topic: str, what: str, consumer: str) -> str:
        """What the consumer's last settle brought."""
        return f"{self._prefix}:settled:{{{topic}}}:{what}:{consumer}"

    def of(self, topic: str, group: str) -> tuple[str, ...]:
        """All eight that the scripts take, in their order."""
        leases, counts, floor, lane = (
            f"{self._prefix}:{kind}:{{{topic}}}:{group}" for kind in ("leases", "counts", "floor", "lane")
        )
        retry, due, later = self.retry(topic, group), self.due(topic, group), self.due(topic, None)
        return topic, retry, due, leases, counts, floor, later, lane

    def output(self, message: Outgoing) -> bytes:
        """What the scripts put out for a message. Its first field makes it unlike all others that wait."""
        topic, group = message.topic, message.group
        fields = pack([new_id(), *fields_of(message)])
        if group is None:
            return pack((topic, ms(message.delay), self.due(topic, None), fields, self.retry(topic, "")))
        return pack((self.retry(topic, group), ms(message.delay), self.due(topic, group), fields, ""))


def ms(seconds: float) -> int:
    """Whole milliseconds, never too few; at most some thirty thousand years."""
    return math.ceil(min(seconds, 1e12) * 1000)
