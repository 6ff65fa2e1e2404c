"""Consumer groups: where they begin, and what the server's settings mean for what they hold."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

from ...errors import ConnectError
from ...source import Start
from ...transport import Finding
from .entries import stored_of
from .keys import Keys
from .wire import ReplyError, Wire, refusal

_PAGE = 100


async def make_group(wire: Wire, keys: Keys, topic: str, group: str, start: Start) -> bool:
    """Make the group on the topic, and what it has beside it; returns whether it was not there.

    A group that was deleted goes on behind the last message that it had finished in order; at the beginning where the
    stream is another one than that. Raises TransportError.
    """
    retry, floor = keys.of(topic, group)[1], keys.of(topic, group)[5]
    _, known, *_ = answers = await wire.call(
        ("XGROUP", "CREATE", retry, group, "0", "MKSTREAM"), ("GET", floor), ("EXISTS", topic)
    )
    what = f"make group {group!r} on {topic!r}"
    _check(wire, what, answers)
    at: Any = known
    if known is not None and await _newest(wire, topic) < position(known):
        at = "0"
    elif known is None:
        at = {"earliest": "0", "latest": "$"}.get(start) if isinstance(start, str) else await _since(wire, topic, start)
    made = await wire.call(("XGROUP", "CREATE", topic, group, at, "MKSTREAM"))
    _check(wire, what, made)
    return not isinstance(made[0], ReplyError)


async def _newest(wire: Wire, topic: str) -> tuple[int, int]:
    """The last id that the stream ever had; (0, 0) where there is none."""
    (answer,) = await wire.call(("XINFO", "STREAM", topic))
    if isinstance(answer, ReplyError):
        return 0, 0
    return position(answer[answer.index(b"last-generated-id") + 1])


def position(one: bytes) -> tuple[int, int]:
    """An id as it is ordered."""
    milliseconds, _, number = one.partition(b"-")
    return int(milliseconds), int(number)


async def _since(wire: Wire, topic: str, start: datetime) -> str:
    """Behind which entry a group begins that wants all that was published since `start`.

    Entries lie in the order of their arrival. They were published before that: the first ones that arrived since
    `start` may be older.
    """
    since = start.timestamp()
    after = f"{max(0, int(since * 1000) - 1)}-18446744073709551615"
    while entries := await wire.ask("XRANGE", topic, f"({after}", "+", "COUNT", _PAGE):
        for entry in entries:
            if stored_of(entry, topic).timestamp >= since:
                return after
            after = entry[0].decode()
    return after


def _check(wire: Wire, what: str, answers: list[Any]) -> None:
    for answer in answers:
        if isinstance(answer, ReplyError) and not str(answer).startswith("BUSYGROUP"):
            raise refusal(wire, what, answer) from answer


async def missing(wire: Wire, topic: str, group: str) -> bool:
    """Whether the topic has no such group. Raises TransportError when it cannot have one."""
    (answer,) = await wire.call(("XINFO", "GROUPS", topic))
    if isinstance(answer, ReplyError):
        if str(answer).startswith("ERR no such key"):
            return True
        raise refusal(wire, f"tell of the groups on {topic!r}", answer) from answer
    return all(info[1] != group.encode() for info in answer)


async def info(wire: Wire) -> dict[str, str]:
    """What the server says of itself; nothing where the user may not ask."""
    (answer,) = await wire.call(("INFO",))
    if isinstance(answer, ReplyError):
        return {}
    lines = (line.partition(":") for line in answer.decode(errors="replace").splitlines())
    return {name: value for name, _, value in lines}


async def uptime(wire: Wire) -> float:
    """Seconds that the server has run; infinite where the user may not ask."""
    (answer,) = await wire.call(("INFO", "server"))
    found = re.search(rb"uptime_in_seconds:(\d+)", answer) if isinstance(answer, bytes) else None
    return float(found[1]) if found else math.inf


def check_server(wire: Wire, found: dict[str, str]) -> None:
    """Raises ConnectError for a server that we cannot work with."""
    version = found.get("redis_version", "7")
    if int(version.partition(".")[0]) < 7:
        raise ConnectError(f"{wire.name} is Redis {version}; Sluiceway needs 7.0 or later, or Valkey")
    if found.get("cluster_enabled") == "1":
        raise ConnectError(f"{wire.name} is a node of a cluster; Sluiceway needs a server (and replicas) without one")
    if found.get("role") == "slave":
        raise ConnectError(f"{wire.name} is a replica and takes no writes; give the URL of its primary")


def findings(found: dict[str, str]) -> list[Finding]:
    """Settings of the server that endanger messages."""
    made: list[Finding] = []
    if found.get("aof_enabled") == "0":
        made.append(Finding("warning", "Redis keeps no append-only file, so a crash of the server loses messages; "
                            "set `appendonly yes`"))  # fmt: skip
    if found.get("connected_slaves", "0") != "0" and "min_slaves_good_slaves" not in found:
        made.append(Finding("warning", "Redis takes writes that no replica has, and loses them when one takes "
                            "over; set `min-replicas-to-write 1`"))  # fmt: skip
    policy = found.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys") and found.get("maxmemory", "0") != "0":
        made.append(Finding("error", f"Redis may evict topics when its memory is full (maxmemory-policy {policy}); "
                            "set `maxmemory-policy noeviction`"))  # fmt: skip
    return made
