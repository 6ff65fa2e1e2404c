"""What the server answers: yes, no and why, or nothing."""

from __future__ import annotations

import json
from typing import Any

from ...errors import TransportError
from .wire import Frame

_LIMITS = "raise its limits ({}), give it a max_age, or purge what was handled: nats stream edit, nats stream purge"
_WORK_QUEUE = (
    "a stream with retention=workqueue has one group for each of its subjects: take one group, and topics that do not "
    "overlap; or another stream, with retention=limits"
)
_SERVER_FULL = (
    "the store of the server is full: raise jetstream.max_file_store, or purge and bound its streams (max_age)"
)
_ACCOUNT = "raise the limits of JetStream for this account, or delete what it needs no more"
_HINTS = {  # by the number of the error
    10002: f"the storage of the account is full: {_ACCOUNT}",
    10005: "a stream needs as many servers with room as it has replicas: lower replicas, or add servers to the cluster",
    10008: "the cluster elects a leader, or too few of its servers are up",
    10023: _SERVER_FULL,
    10026: "each group needs a consumer for each of its topics: raise max_consumers of the stream or the account",
    10027: f"we need a stream for topics and two of our own: {_ACCOUNT}",
    10028: "the store in memory is full: raise jetstream.max_memory_store, or take storage=file",
    10047: _SERVER_FULL,
    10054: "raise max_msg_size of the stream",
    10074: "this server is in no cluster: leave replicas out",
    10077: "the stream is full: " + _LIMITS.format("max_bytes, max_msgs, max_msgs_per_subject"),
    10099: _WORK_QUEUE,
    10100: _WORK_QUEUE,
    10101: 'a stream with retention=workqueue hands out all that it has: start="earliest"',
    10109: "nothing is stored in a sealed stream: take another one for the topic",
}


class Unanswered(TransportError):
    """The connection broke, or the server kept silent. `answers` has None where none came."""

    def __init__(self, text: str, answers: list[Frame | None]) -> None:
        super().__init__(text)
        self.answers = answers


class ApiError(TransportError):
    """JetStream said no: `code` as in HTTP, `number` is its own. The text says what to change where that is known."""

    def __init__(self, what: str, error: dict[str, Any]) -> None:
        self.code, self.number = int(error.get("code", 500)), int(error.get("err_code", 0))
        text = f"{what}: {error.get('description', 'no reason given')} (error {self.number or self.code})"
        hint = _HINTS.get(self.number)
        super().__init__(text if hint is None else f"{text}; {hint}")


def status(frame: Frame) -> int:
    """The status of an answer that is no message, such as 503 (nobody listens), else 0."""
    return int(frame[2][9:12]) if frame[2][:9] == b"NATS/1.0 " else 0


def read_answer(frame: Frame, what: str) -> dict[str, Any]:
    """The JSON of an answer. Raises ApiError for one that says no."""
    if status(frame):
        raise ApiError(what, {"code": status(frame), "description": "nobody answers: no such stream or consumer"})
    answer: dict[str, Any] = json.loads(frame[3])
    if "error" in answer:
        stream = answer.get("stream")
        raise ApiError(f"stream {stream!r} refused it" if stream else what, answer["error"])
    return answer
