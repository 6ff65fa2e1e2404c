"""How deliveries end: which commands that takes, and what is known of those that were sent before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...message import Message, Outgoing, Refused, Settlement, new_id
from .entries import MAX_HEADERS, fields_of
from .keys import Keys, ms, pack
from .scripts import ACK, SETTLE
from .wire import ReplyError, Wire, refusal

_CHUNK = 100  # settlements per script, so that none holds up the server
_CHUNK_BYTES = 4 * 1024 * 1024
_ACKS = 500


class Settling:
    """Sends settlements of one group, one call at a time. `what` tells its record from another's of the same consumer.

    `ordered`: messages of a key are kept in order, so the lane of the key is told when one ends.
    `places`: which topic (from 0) and stream (1 or 2) of it a stream is."""

    def __init__(
        self, keys: Keys, group: str, topics: Sequence[str], what: str, *,
        ordered: bool = False, max_payload: int = 0,
    ) -> None:  # fmt: skip
        self._keys = keys
        self._group = group
        self._ordered = ordered
        self._max_payload = max_payload
        self._of_topics = [key for topic in topics for key in keys.of(topic, group)]
        self._record = (topics[0], what)
        self.places: dict[str, tuple[int, int]] = {}
        for at, topic in enumerate(topics):
            self.places[keys.retry(topic, group)] = (at, 2)
            self.places[topic] = (at, 1)
        self._sent: tuple[Sequence[Settlement], list[_Chunk]] | None = None  # and it is not known whether it arrived

    async def ack(self, wire: Wire, consumer: str, messages: Sequence[Message[Any]]) -> None:
        """Acks, unfenced, in one round trip. Sent twice they do nothing."""
        if self._ordered:
            acks = [pack((*self.places[one.token[0]], one.token[1], self._key(one))) for one in messages]
            for start in range(0, len(acks), _ACKS):
                await wire.run(ACK, self._of_topics, self._group, consumer, *acks[start : start + _ACKS])
            return
        tokens = [one.token for one in messages]
        commands: list[tuple[Any, ...]] = []
        streams = {token[0] for token in tokens}
        for stream in streams:
            ids = [token[1] for token in tokens if len(streams) == 1 or token[0] == stream]
            commands.append(("XACK", stream, self._group, *ids))
            if self.places[stream][1] == 2:
                commands.append(("XDEL", stream, *ids))
        for answer in await wire.call(*commands):
            if isinstance(answer, ReplyError):
                raise refusal(wire, "acknowledge", answer)

    async def settle(self, wire: Callable[[], Any], consumer: str, others: Sequence[Settlement]) -> list[Refused]:
        """All that is no plain ack, fenced by owner. When it raises, the same call again goes on where it was: what
        the server has carried out is not carried out again."""
        sent = self._sent
        if (
            sent is None
            or len(sent[0]) != len(others)
            or any(a.message is not b.message for a, b in zip(sent[0], others, strict=True))
        ):
            sent = (list(others), self._chunks(others))
        self._sent = sent
        refused: list[Refused] = []
        for chunk in sent[1]:
            if chunk.answer is None:
                keys = (self._keys.record(*self._record, consumer), *self._of_topics)
                line = await wire()
                chunk.answer = await line.run(SETTLE, keys, self._group, consumer, chunk.number, *chunk.packed)
            lost, rejected = chunk.answer
            detail = "an output's topic is a key that holds no stream"
            refused += [Refused(chunk.messages[at], "lost") for at in lost]
            refused += [Refused(chunk.messages[at], "rejected", detail) for at in rejected]
        self._sent = None
        return refused

    def why_not(self, one: Settlement) -> str | None:
        """Why what belongs to a settlement is taken by no server; None when it may be."""
        for out in one.outputs:
            if len(out.body) > self._max_payload:
                return f"the body to {out.topic!r} has {len(out.body)} bytes and max_payload is {self._max_payload}"
            if len(out.headers) > MAX_HEADERS:
                return f"the message to {out.topic!r} has {len(out.headers)} headers and may have {MAX_HEADERS}"
        if one.outcome == "retry" and len(one.message.headers) > MAX_HEADERS:
            return f"a retry may have {MAX_HEADERS} headers and this one has {len(one.message.headers)}"
        return None

    def _chunks(self, others: Sequence[Settlement]) -> list[_Chunk]:
        chunks: list[_Chunk] = []
        size = 0
        for one in others:
            packed = self._packed(one)
            if not chunks or len(chunks[-1].packed) >= _CHUNK or size + len(packed) > _CHUNK_BYTES:
                chunks.append(_Chunk())
                size = 0
            chunks[-1].packed.append(packed)
            chunks[-1].messages.append(one.message)
            size += len(packed)
        return chunks

    def _packed(self, one: Settlement) -> bytes:
        message = one.message
        stream, number, *_ = message.token
        copy: bytes | str = b""
        key = self._key(message)
        what: str = one.outcome if one.outcome in ("retry", "release") else "finish"
        if one.outcome == "park":
            what = "park" if key else "release"
        elif one.outcome == "retry" and key:  # its place is its entry's
            what, copy = "again", str(int(one.counted))
        elif one.outcome == "retry":
            again = Outgoing(message.topic, message.body, message.key, message.headers, message.id, message.timestamp)
            copy = pack([new_id(), *fields_of(again, failures=message.failures + one.counted)])
        outputs = [self._keys.output(out) for out in one.outputs]
        return pack((*self.places[stream], number, what, ms(one.delay), copy, key, *outputs))

    def _key(self, message: Message[Any]) -> bytes:
        """What tells the scripts of a key that is kept in order."""
        if not self._ordered or message.key is None:
            return b""
        return b"k" + message.key.encode("utf-8", "surrogateescape")


class _Chunk:
    """Settlements that go in one script, and what came of it."""

    def __init__(self) -> None:
        self.number = new_id()
        self.packed: list[bytes] = []
        self.messages: list[Message[Any]] = []
        self.answer: Any = None
