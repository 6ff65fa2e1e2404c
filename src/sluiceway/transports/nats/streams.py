"""Topics and streams, groups and consumers: what is where at the server, and what is made when it is missing.

A topic's subject is the topic. It lives in the stream that has that subject; one that no stream has is added to the
stream of the option `stream`. A group has a durable consumer per topic or pattern on each stream that may have messages
of it. Two streams are ours, one per account: `sluiceway-dead` has the dead letters, under the subject
`_sluiceway.dead.<topic>`, so that no pattern meets them; `sluiceway-notes` has a note for each message that came back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from ..._decisions.subjects import covers, filters_of
from ..._decisions.topics import is_dead_letter_topic, is_pattern
from ...errors import TransportError
from ...transport import Finding
from .answers import ApiError
from .connection import Connection

log = logging.getLogger("sluiceway.nats")

DEAD, NOTES = "sluiceway-dead", "sluiceway-notes"
_DEAD = "_sluiceway.dead."
NOTE = "_sluiceway.note."
_ANY = "_sluiceway.any"  # a stream must have a subject
_OURS = {DEAD: f"{_DEAD}>", NOTES: f"{NOTE}>"}
NO_STREAM, _OVERLAP = 10059, 10065
_REST = 1.0  # seconds before a stream that is gone is made anew


def subject_of(topic: str) -> str:
    return _DEAD + topic if is_dead_letter_topic(topic) else topic


def topic_of(subject: str) -> str:
    return subject.removeprefix(_DEAD)


class Streams:
    """What this transport knows of the server's streams."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._settings = connection.settings
        self._known: set[str] = set()  # subjects of streams
        self._seen: set[str] = set()  # streams that were there once
        self._lock = asyncio.Lock()

    async def info(self, stream: str) -> dict[str, Any] | None:
        try:
            found = await self._connection.api(f"STREAM.INFO.{stream}")
        except ApiError as error:
            if error.number == NO_STREAM:
                return None
            raise
        self._seen.add(stream)
        return found

    async def having(self, subject: str) -> list[str]:
        """The streams that may have messages of a subject or filter, but for what others keep under `$`, and notes."""
        found: list[str] = []
        while True:
            page = await self._connection.api("STREAM.NAMES", {"subject": subject, "offset": len(found)})
            found += page.get("streams") or []
            if len(found) >= page.get("total", 0):
                break
        helpers = (NOTES,) if subject.startswith(_DEAD) else (NOTES, DEAD)
        return [name for name in found if name not in helpers and not name.startswith(("KV_", "OBJ_", "MQTT_"))]

    def forget(self) -> None:
        """A stream may be gone."""
        self._known.clear()

    def knows(self, subject: str) -> bool:
        """Whether a stream has all of a subject, as far as was seen."""
        return subject in self._known or any(covers(known, subject) for known in self._known if known[-1] in "*>")

    async def cover(self, subject: str) -> None:
        """See to it that a stream has the subject, or that no more of a filter is without one than must be."""
        async with self._lock:
            if self.knows(subject):
                return
            for stream, ours in _OURS.items():
                if covers(ours, subject):
                    await self._make(stream, [ours])
                    self._known.add(ours)
                    return
            for stream in await self.having(subject):
                info = await self.info(stream)
                self._known.update(info["config"].get("subjects") or () if info else ())
            if not self.knows(subject):
                await self._add(subject)

    async def _add(self, subject: str) -> None:
        """Add a subject to our stream. Others may do the same at the same time, and a change replaces the whole list:
        so it is looked at again."""
        stream = self._settings.stream
        wanted = _ANY if subject == ">" else subject
        for tries in range(20):
            info = await self.info(stream)
            subjects: list[str] = (info["config"].get("subjects") or []) if info else []
            if any(covers(one, wanted) for one in subjects):
                self._known.update(subjects)
                return
            subjects = [*[one for one in subjects if not covers(wanted, one)], wanted]
            try:
                if info is None:
                    await self._make(stream, subjects)
                else:
                    config = {**info["config"], "subjects": subjects}
                    await self._connection.api(
                        f"STREAM.UPDATE.{stream}", config, f"cannot add a topic to stream {stream!r}"
                    )
            except ApiError as error:
                if error.number == _OVERLAP and {"*", ">"} & set(subject.split(".")):
                    wanted = _ANY  # other streams have some of it; what they lack is added when it is published
                elif tries == 19:
                    raise
            await asyncio.sleep(0.005 * tries)
        raise TransportError(f"cannot add {subject!r} to the NATS stream {stream!r}: another process changes it too")

    async def _make(self, stream: str, subjects: list[str]) -> None:
        """Make a stream unless it is there. One that somebody has just deleted is gone before its files are: the server
        (2.9) would delete those of the new one with them, and all that was published to it."""
        if await self.info(stream) is None and stream in self._seen:
            log.warning("the NATS stream %r is gone; making it anew in %g s", stream, _REST)
            await asyncio.sleep(_REST)
        if await self.info(stream) is not None:
            return
        mine = stream == self._settings.stream
        config = {
            "name": stream,
            "subjects": subjects,
            "retention": "limits",
            "storage": "file",
            "discard": "old" if stream == NOTES else "new",
            "max_msgs_per_subject": 1 if stream == NOTES else -1,
            "max_age": int(self._settings.max_age * 1e9) if mine else 0,
            "max_msgs": -1,
            "max_bytes": -1,
            "num_replicas": self._settings.replicas,
            "duplicate_window": 120_000_000_000 if not mine or not self._settings.max_age > 0 else 0,
        }
        try:
            await self._connection.api(f"STREAM.CREATE.{stream}", config, f"cannot make stream {stream!r}")
        except ApiError:
            if await self.info(stream) is None:
                raise
        self._seen.add(stream)

    # -- consumers

    async def places(self, topic: str, *, create: bool) -> list[tuple[str, str]]:
        """The streams and filters in which messages of a topic or pattern are."""
        found = []
        for subject in filters_of(topic) if is_pattern(topic) else [subject_of(topic)]:
            if create:
                await self.cover(subject)
            streams = await self.having(subject)
            ours = self._settings.stream
            if is_pattern(topic) and ours not in streams and await self.info(ours) is not None:
                streams.append(ours)  # more of the pattern may be added to it
            found += [(stream, subject) for stream in streams]
        return found

    async def check(self, streams: Sequence[str]) -> list[Finding]:
        """What in the configuration of streams endangers messages."""
        found: list[Finding] = []
        for stream in dict.fromkeys(streams):
            info = await self.info(stream)
            config = info["config"] if info else {}
            for level, bad, text in (
                ("error", config.get("no_ack"), "confirms nothing (no_ack); a publish may be lost unseen"),
                ("warning", config.get("storage") == "memory", "is in memory, and gone with its server; use file"),
                (
                    "warning",
                    config.get("discard") == "old" and max(config.get("max_msgs", -1), config.get("max_bytes", -1)) > 0,
                    "drops its oldest messages when it is full, handled or not; use discard=new",
                ),
                ("warning", config.get("retention") == "interest", "drops what is published before a group is there"),
                ("info", config.get("max_age"), f"drops messages after {config.get('max_age', 0) / 1e9:g} s"),
            ):
                if bad:
                    found.append(Finding(level, f"stream {stream!r} {text}"))  # type: ignore[arg-type]
        return found
