"""Notes: what is written down of messages that went back, in a stream of ours; a subject for each."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import msgspec

from .answers import ApiError, read_answer
from .connection import Connection
from .headers import Note
from .streams import NOTE, NOTES
from .wire import Frame


def note_subject(path: str, seq: int | str) -> str:
    """Where the note of a message is; `path`: its stream and consumer. The number `*` is all of them."""
    return f"{NOTE}{path}.{seq}"


async def read_notes(connection: Connection, subjects: Sequence[str]) -> list[Note | None]:
    """The notes of these subjects; None where there is none."""
    body = [json.dumps({"last_by_subj": subject}).encode() for subject in subjects]
    answers = await connection.ask([(f"$JS.API.STREAM.MSG.GET.{NOTES}", b"", one) for one in body])
    return [_read(answer) for answer in answers]


async def numbers(connection: Connection, path: str) -> list[int]:
    """The numbers of the messages of a consumer that have a note."""
    found: list[int] = []
    while True:
        asked = {"subjects_filter": note_subject(path, "*"), "offset": len(found)}
        info = await connection.api(f"STREAM.INFO.{NOTES}", asked)
        page = info["state"].get("subjects") or {}
        found += [int(subject.rpartition(".")[2]) for subject in page]
        if not page or len(found) >= info.get("total", 0):
            return found


async def sweep(connection: Connection, path: str, floor: int) -> None:
    """Delete the notes of messages up to `floor`. All of those are settled: whoever did could not delete the note."""
    left = [seq for seq in await numbers(connection, path) if seq <= floor]
    body = [json.dumps({"filter": note_subject(path, seq)}).encode() for seq in left]
    await connection.ask([(f"$JS.API.STREAM.PURGE.{NOTES}", b"", one) for one in body])


def _read(answer: Frame) -> Note | None:
    try:
        stored = read_answer(answer, "read a note")["message"]
        return msgspec.json.decode(base64.b64decode(stored["data"]), type=Note)
    except ApiError as error:
        if error.code == 404:
            return None
        raise
    except (KeyError, ValueError):
        return None
