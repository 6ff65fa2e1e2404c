"""Groups at the server: a durable consumer per topic or pattern, on each stream that may have messages of it."""

from __future__ import annotations

import base64
import json
import re
import time
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

from msgspec import Struct

from ..._decisions.subjects import covers
from ..._decisions.topics import best_match, matches
from ...source import Start
from ...transport import Finding
from .answers import ApiError
from .connection import Connection
from .headers import read_headers, stored_at
from .streams import NO_STREAM, NOTE, NOTES

_NO_CONSUMER = 10014


class Consumer(Struct, eq=False):
    """A durable consumer of a group. `start` is the first message of the stream that it gets, `since` a time before
    which it wants none; a message that a better matching consumer of the group gets is not for it."""

    stream: str
    name: str
    group: str
    topic: str
    start: int = 0
    since: float = 0.0
    lease: float = 0.0
    created: str = ""
    floor: int = 0
    last: int = 0
    pending: int = 0
    held: int = 0
    noted: int = 0
    filter: str = ""
    born: str = ""  # when its stream was made

    @property
    def path(self) -> str:
        return f"{self.stream}.{self.name}"


def consumer_name(group: str, topic: str, subject: str) -> str:
    """One name for one group, topic and filter, readable as far as NATS allows."""
    tail = blake2b(json.dumps([group, topic, subject]).encode(), digest_size=6).hexdigest()
    return f"{re.sub('[^0-9A-Za-z_-]+', '_', f'{group}-{topic}')[:80]}-{tail}"


class Consumers:
    """Finds and makes them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._settings = connection.settings

    async def siblings(self, stream: str, group: str) -> dict[str, Consumer]:
        """The consumers of a group on a stream, by topic or pattern."""
        found: dict[str, Consumer] = {}
        seen = 0
        while True:
            page = await self._connection.api(f"CONSUMER.LIST.{stream}", {"offset": seen})
            infos = page.get("consumers") or []
            seen += len(infos)
            for consumer in map(read_consumer, infos):
                if consumer is not None and consumer.group == group:
                    found[consumer.topic] = consumer
            if not infos or seen >= page.get("total", 0):
                return found

    async def missing(self, stream: str, subject: str, group: str, topic: str) -> bool:
        return await self.find(stream, consumer_name(group, topic, subject)) is None

    async def find(self, stream: str, name: str) -> dict[str, Any] | None:
        try:
            return await self._connection.api(f"CONSUMER.INFO.{stream}.{name}")
        except ApiError as error:
            if error.number in (_NO_CONSUMER, NO_STREAM):
                return None
            raise

    async def look(self, consumer: Consumer) -> bool:
        """Note how far it is. False: it is not there."""
        info = await self.find(consumer.stream, consumer.name)
        if info is not None:
            consumer.floor, consumer.last = info["ack_floor"]["stream_seq"], info["delivered"]["stream_seq"]
            consumer.pending, consumer.held = info["num_pending"], info["num_ack_pending"]
        return info is not None

    async def oldest(self, consumer: Consumer) -> float:
        """The age in seconds of its oldest message that was never handed out; 0 where there is none."""
        if not consumer.pending:
            return 0.0
        body = {"seq": consumer.last + 1, "next_by_subj": consumer.filter or ">"}
        try:
            stored = (await self._connection.api(f"STREAM.MSG.GET.{consumer.stream}", body))["message"]
        except ApiError:
            return 0.0  # somebody took it just now
        envelope = read_headers(base64.b64decode(stored.get("hdrs") or "")).envelope
        return time.time() - (envelope.timestamp or stored_at(stored["time"]))

    async def consume(
        self, stream: str, subject: str, group: str, topic: str, start: Start, before: Consumer | None = None
    ) -> tuple[Consumer, list[Finding]]:
        """The consumer of a group for a topic or pattern on a stream; made when it is not there. One that was deleted
        goes on behind the message up to which `before` had settled all, if the stream is the same."""
        name = consumer_name(group, topic, subject)
        stream_info = await self._connection.api(f"STREAM.INFO.{stream}")
        info = await self.find(stream, name)
        findings = []
        wanted = self._config(name, subject, stream_info)
        if info is None:
            said: dict[str, Any] = {"sluiceway": 1, "group": group, "topic": topic, "start": 1}
            if isinstance(start, datetime) and before is None:
                said["since"] = start.timestamp()
                wanted |= {"deliver_policy": "by_start_time", "opt_start_time": start.astimezone(UTC).isoformat()}
            elif (first := await self._first(stream_info, group, topic, start, before)) > 1:
                said["start"] = first
                wanted |= {"deliver_policy": "by_start_sequence", "opt_start_seq": first}
            wanted["description"] = json.dumps(said)
            if before is None or before.born != stream_info["created"]:  # notes of another stream of this name
                filter_ = f"{NOTE}{stream}.{name}.*"
                await self._connection.api(f"STREAM.PURGE.{NOTES}", {"filter": filter_})
            info = await self._save(stream, wanted)
            findings.append(Finding("info", f"made consumer {name!r} of stream {stream!r} for group {group!r}"))
        elif drift := _drift(info["config"], wanted):
            findings.append(Finding("warning", f"put consumer {name!r} of stream {stream!r} right: {drift}"))
            changed = {key: wanted[key] for key in _WATCHED if key in wanted}
            kept = {key: value for key, value in info["config"].items() if key != "filter_subject" or key in wanted}
            info = await self._save(stream, {**kept, **changed})
        consumer = read_consumer(info)
        assert consumer is not None, info
        consumer.born = stream_info["created"]
        if before is not None and before.created != consumer.created and before.born == consumer.born:
            consumer.noted = stream_info["state"]["last_seq"]  # its notes are older than itself
        return consumer, findings

    def _config(self, name: str, subject: str, stream_info: dict[str, Any]) -> dict[str, Any]:
        """How a consumer must be, wherever it begins."""
        wanted: dict[str, Any] = {
            "durable_name": name,
            "ack_policy": "explicit",
            "ack_wait": int(self._settings.lease * 1e9),
            "max_deliver": -1,
            "max_ack_pending": -1,
            "max_waiting": 512,
            "replay_policy": "instant",
            "deliver_policy": "all",
        }
        subjects = stream_info["config"].get("subjects") or []
        if any(covers(one, subject) for one in subjects):  # else the server refuses the filter, and we filter
            wanted["filter_subject"] = subject
        return wanted

    async def _first(
        self, stream_info: dict[str, Any], group: str, topic: str, start: Start, before: Consumer | None
    ) -> int:
        """The first message of the stream that a new consumer gets: of what another of the group has settled, none."""
        if before is not None:
            return before.floor + 1 if before.born == stream_info["created"] else 1
        if start == "latest":
            last: int = stream_info["state"]["last_seq"]
            return last + 1
        others = (await self.siblings(stream_info["config"]["name"], group)).values()
        floors = [one.floor for one in others if one.topic != topic and matches(one.topic, topic)]
        return 1 + min(floors, default=0)

    async def _save(self, stream: str, config: dict[str, Any]) -> dict[str, Any]:
        name, body = config["durable_name"], {"stream_name": stream, "config": config}
        what = f"cannot make consumer {name!r} of {config.get('filter_subject', '>')!r} on stream {stream!r}"
        return await self._connection.api(f"CONSUMER.DURABLE.CREATE.{stream}.{name}", body, what)


_WATCHED = ("ack_policy", "max_deliver", "max_ack_pending", "ack_wait", "filter_subject")


def _drift(config: dict[str, Any], wanted: dict[str, Any]) -> str:
    differ = [key for key in _WATCHED if config.get(key) != wanted.get(key)]
    return ", ".join(f"{key} was {config.get(key)} and is {wanted.get(key)}" for key in differ)


def read_consumer(info: dict[str, Any]) -> Consumer | None:
    """Read a consumer's info; None when it is not ours."""
    config = info["config"]
    try:
        said = json.loads(config.get("description") or "")
        group, topic = str(said["group"]), str(said["topic"])
    except (ValueError, KeyError, TypeError):
        return None
    return Consumer(
        stream=info["stream_name"],
        name=info["name"],
        group=group,
        topic=topic,
        start=said.get("start", 1),
        since=said.get("since", 0.0),
        lease=config["ack_wait"] / 1e9,
        created=info["created"],
        floor=info["ack_floor"]["stream_seq"],
        last=info["delivered"]["stream_seq"],
        pending=info.get("num_pending", 0),
        held=info.get("num_ack_pending", 0),
        filter=config.get("filter_subject", ""),
    )


def belongs(consumer: Consumer, siblings: dict[str, Consumer], topic: str, seq: int, stored: float) -> bool:
    """Whether a message is this consumer's: no better matching one of its group gets it."""
    if not matches(consumer.topic, topic):
        return False
    others = [one.topic for one in siblings.values() if seq >= one.start and stored >= one.since]
    return best_match([*others, consumer.topic], topic) == consumer.topic
