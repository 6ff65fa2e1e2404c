"""Undoing compressions, each within a bound, so that no small body becomes a huge one."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import DecodeError

SLICE = 256  # bytes fed at once where the output of one call has no bound: 256 bytes of zstd make 8 MiB at most
ZSTD_WINDOW = 8 * 1024 * 1024  # bytes, what RFC 8878 says every decoder should support


class _Stream(Protocol):
    """What zlib's, lz4's and zstandard's objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes | None: ...


def decompress(body: bytes, encodings: str, limit: int) -> bytes:
    """`body` without the compressions that a `content-encoding` header names, the last applied first.

    Raises DecodeError when a result is over `limit` bytes, when a body is broken, and for an encoding that is not known
    or whose library is not installed.
    """
    for encoding in reversed([one.strip().lower() for one in encodings.split(",")]):
        if encoding not in _WAYS:
            known = ", ".join(_WAYS)
            raise DecodeError(f"there is no content-encoding {encoding[:50]!r}; known: {known}")
        body = _WAYS[encoding](body, encoding, limit)
    return body


def _plain(body: bytes, encoding: str, limit: int) -> bytes:
    return body


def _zlib(body: bytes, encoding: str, limit: int) -> bytes:
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as its first bytes say
    try:
        data = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise DecodeError(f"the body is not {encoding}: {error}") from error
    return _whole(data, stream, encoding, limit)


def _lz4(body: bytes, encoding: str, limit: int) -> bytes:
    try:
        import lz4.frame  # type: ignore[import-untyped]
    except ImportError as error:
        raise _missing(encoding) from error
    stream: Any = lz4.frame.LZ4FrameDecompressor()
    try:
        data = stream.decompress(body, max_length=limit + 1)
    except RuntimeError as error:
        raise DecodeError(f"the body is not {encoding}: {error}") from error
    return _whole(data, stream, encoding, limit)


def _zstd(body: bytes, encoding: str, limit: int) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise _missing(encoding) from error
    stream = zstandard.ZstdDecompressor(max_window_size=max(limit, ZSTD_WINDOW)).decompressobj()
    data = bytearray()
    try:
        for start in range(0, len(body), SLICE):
            if stream.eof:
                raise DecodeError(f"the body has data after its {encoding} ends")
            data += stream.decompress(body[start : start + SLICE])
            if len(data) > limit:
                break
    except zstandard.ZstdError as error:
        raise DecodeError(f"the body is not {encoding}: {error}") from error
    return _whole(bytes(data), stream, encoding, limit)


def _whole(data: bytes, stream: _Stream, encoding: str, limit: int) -> bytes:
    if len(data) > limit:
        raise DecodeError(f"the body has more than {limit} bytes when its {encoding} is undone")
    if not stream.eof:
        raise DecodeError(f"the body is not {encoding}: it is cut off")
    if stream.unused_data:
        raise DecodeError(f"the body has data after its {encoding} ends")
    return data


def _missing(encoding: str) -> DecodeError:
    return DecodeError(f"nothing here undoes {encoding}: pip install 'sluiceway[compression]'")


_WAYS: dict[str, Callable[[bytes, str, int], bytes]] = {
    "identity": _plain,
    "gzip": _zlib,
    "x-gzip": _zlib,
    "zlib": _zlib,
    "deflate": _zlib,
    "lz4": _lz4,
    "zstd": _zstd,
}
