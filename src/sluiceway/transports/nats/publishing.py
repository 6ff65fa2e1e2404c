"""Publishing: in order, confirmed by the stream, many in one write."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..._decisions.topics import check_topic
from ...errors import PayloadTooLarge, PublishError, TransportError
from ...message import Outgoing
from .answers import ApiError, Unanswered, read_answer, status
from .connection import Connection, Request
from .headers import write_headers
from .streams import Streams, subject_of
from .wire import Frame

RESERVE = 16 * 1024  # bytes of the server's limit that are kept for headers


class Publisher:
    def __init__(self, connection: Connection, streams: Streams) -> None:
        self._connection = connection
        self._streams = streams

    def requests(self, messages: Sequence[Outgoing], dedupe: str | None = None) -> list[Request]:
        """What goes over the wire. Raises OptionError, and PayloadTooLarge for what does not fit."""
        limit = self._connection.max_payload
        now = time.time()
        requests: list[Request] = []
        large: list[Outgoing] = []
        for number, message in enumerate(messages):
            check_topic(message.topic, pattern=False)
            header = write_headers(message, now=now, dedupe=f"{dedupe}.{number}" if dedupe else None)
            if len(message.body) > limit - RESERVE or len(header) + len(message.body) > limit:
                large.append(message)
            requests.append((subject_of(message.topic), header, message.body))
        if large:
            one = large[0]
            raise PayloadTooLarge(
                f"message {one.id} to {one.topic!r} has a body of {len(one.body)} bytes; the server's max_payload is"
                f" {limit} bytes, of which {RESERVE} are for headers; nothing of the call was published",
                large,
            )
        return requests

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish in order. Raises PublishError with those that are not confirmed."""
        requests = self.requests(messages)
        try:
            refused = await self.send(requests)
        except TransportError as error:
            answers = error.answers if isinstance(error, Unanswered) else [None] * len(messages)
            failed = [
                one
                for one, frame in zip(messages, answers, strict=True)
                if frame is None or _refusal(frame) is not None
            ]
            raise PublishError.unconfirmed(failed, len(messages), error) from error
        failed = [one for one, why in zip(messages, refused, strict=True) if why is not None]
        if failed:
            why = next(filter(None, refused))
            raise PublishError.unconfirmed(failed, len(messages), why)

    async def send(self, requests: Sequence[Request]) -> list[str | None]:
        """Why each was refused, None for those that are stored. Raises Unanswered, with an answer for each."""
        try:
            for subject in {subject for subject, _, _ in requests}:
                if not self._streams.knows(subject):
                    await self._streams.cover(subject)
        except Unanswered as error:
            raise Unanswered(str(error), [None] * len(requests)) from error
        answers: list[Frame | None] = list(await self._connection.ask(requests))
        gone = [number for number, frame in enumerate(answers) if frame is not None and status(frame) == 503]
        if gone:  # no stream has the subject any more
            self._streams.forget()
            again = [requests[number] for number in gone]
            try:
                for subject in {subject for subject, _, _ in again}:
                    await self._streams.cover(subject)
                frames: Sequence[Frame | None] = await self._connection.ask(again)
            except Unanswered as error:
                for number, frame in zip(gone, error.answers or [None] * len(gone), strict=True):
                    answers[number] = frame
                raise Unanswered(str(error), answers) from error
            for number, frame in zip(gone, frames, strict=True):
                answers[number] = frame
        return [_refusal(frame) if frame is not None else "no answer" for frame in answers]


def _refusal(frame: Frame) -> str | None:
    body = frame[3]
    if body.startswith(b'{"stream":') and b'"error"' not in body:
        return None
    try:
        read_answer(frame, "refused")
    except ApiError as error:
        return str(error)
    except ValueError:
        return f"an answer that is no JSON: {body[:100]!r}"
    return None
