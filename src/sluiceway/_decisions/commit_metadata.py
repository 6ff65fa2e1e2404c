"""What is written beside a committed offset: whether its owner lives, and what it knows of the records above it.

A committed offset says that everything below it is finished. Above it some records are finished too, some have failed
before, and some were in hand when a process died. That is told in runs, from the offset upwards, as a short text.
"""

from __future__ import annotations

import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple, TypeAlias

LIMIT = 4095  # bytes: a broker takes 4,096 unless it is told otherwise, and confluent-kafka sends a zero behind them

_HEAD = "sluiceway1:"  # and the version; a later one is not understood, which repeats and loses nothing


class Note(NamedTuple):
    """What a record that is not finished carries: the counts of its message."""

    deliveries: int = 1
    """How often it was handed out: while it is, this time too."""
    failures: int = 0
    suspicions: int = 0


Run: TypeAlias = tuple[int, Note | bool]
"""So many offsets, one after the other, of which the same is known: True, that they are finished; a note; or False,
nothing. Offsets at which there is no record, since a topic was compacted or had transactions, may be of any run."""


class Told(NamedTuple):
    """What metadata tells. Without any, or with another program's: nothing."""

    window: int = 0
    """So many records at most, the first ones that are neither finished nor noted, might be in its owner's hand. 0: it
    was left in good order."""
    runs: tuple[Run, ...] = ()
    """From the offset upwards; nothing is known of what comes after them."""


NOTHING = Told()


def encode(offset: int, log: str, window: int, runs: Iterable[Run], *, limit: int = LIMIT) -> str | None:
    """The metadata for a commit of `offset`; None if it would be longer than `limit`, in bytes.

    `log` names what the offsets count, such as the topic's id and the partition.
    """
    known = list(runs)
    while known and known[-1][1] is False:
        known.pop()
    notes = list({what: None for _, what in known if not isinstance(what, bool)})
    kinds: dict[Note | bool, int] = {False: 0, True: 1}
    kinds.update((note, 2 + nth) for nth, note in enumerate(notes))
    out = bytearray()
    for count in (window, len(notes), *chain.from_iterable(notes)):
        _put(out, count)
    for length, what in known:
        _put(out, length * len(kinds) + kinds[what])  # one byte for most
    text = _HEAD + urlsafe_b64encode(_seal(offset, log, out) + out).decode()
    return text if len(text) <= limit else None


def decode(metadata: str | None, offset: int, log: str) -> Told:
    """What the metadata of a committed offset tells.

    It counts only where it was written, beside this offset of this log. An offset that was set by hand, or copied to
    another cluster, may come with metadata of other records; to believe it would lose messages.
    """
    if metadata is None or not metadata.startswith(_HEAD):
        return NOTHING
    try:
        sealed = urlsafe_b64decode(metadata.removeprefix(_HEAD))
        if sealed[:4] != _seal(offset, log, sealed[4:]):
            return NOTHING
        window, notes, *counts = _counts(sealed[4:])
    except ValueError:
        return NOTHING
    first = 3 * notes
    kinds: list[Note | bool] = [False, True, *(Note(*counts[at : at + 3]) for at in range(0, first, 3))]
    return Told(window, tuple((count // len(kinds), kinds[count % len(kinds)]) for count in counts[first:]))


def _seal(offset: int, log: str, told: bytes | bytearray) -> bytes:
    return zlib.crc32(told, zlib.crc32(f"{offset} {log}".encode())).to_bytes(4, "big")


def _put(out: bytearray, count: int) -> None:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    while count > 127:
        out.append(count & 127 | 128)
        count >>= 7
    out.append(count)


def _counts(data: bytes) -> Iterator[int]:
    count = shift = 0
    for byte in data:
        count |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield count
            count = shift = 0
