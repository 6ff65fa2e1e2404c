"""From bodies as strangers send them to payloads: compressed, and in more formats than JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import Any

from ..errors import DecodeError, OptionError
from ..message import Handler, Message
from . import ConsumerInfo, refuse_batches
from ._checks import is_count
from ._compression import decompress

JSON = "application/json"
MSGPACK = "application/msgpack"
_ALIASES = {"text/json": JSON, "application/x-msgpack": MSGPACK, "application/vnd.msgpack": MSGPACK}
_SUFFIXES = {"+json": JSON, "+msgpack": MSGPACK}


class Decode:
    """Makes the payload as the message's headers say, in place of the processor, which knows JSON only.

    `content-encoding` is undone first: gzip, zlib (also called deflate), and lz4 and zstd with the extra `compression`.
    What that makes has at most `max_bytes`, and only one stream. Then `content-type` says the format: JSON, which it is
    without that header, or MessagePack; `decoders` adds others, by content type, as functions of bytes. The result is
    checked against the type of the handler's annotation, and for `Message[bytes]` it is the undone bytes, whatever the
    content type.

    `message.body` never changes: retries and dead letters carry the bytes that came. What cannot be decoded goes to
    dead letters with a DecodeError. `prepare`, and middleware further out than this, see the body as the payload.
    """

    decodes = True

    def __init__(
        self,
        *,
        max_bytes: int = 16 * 1024 * 1024,
        decoders: Mapping[str, Callable[[bytes], Any]] | None = None,
    ) -> None:
        if not is_count(max_bytes):
            raise OptionError(f"Decode: max_bytes must be 1 or more bytes; got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.decoders = {name.lower(): decoder for name, decoder in (decoders or {}).items()}

    def for_consumer(self, consumer: ConsumerInfo) -> Callable[[Message[Any], Handler], Awaitable[Any]]:
        refuse_batches("Decode", consumer)
        max_bytes = self.max_bytes
        decoder_of = cache(lambda kind: self._decoder(consumer, kind))
        decoder_of("")  # a payload type that cannot be decoded is told at start

        async def decoded(message: Message[Any], call_next: Handler) -> Any:
            body = message.body
            encoding = header(message, "content-encoding")
            if encoding:
                body = decompress(body, encoding, max_bytes)
            message.payload = decoder_of(header(message, "content-type"))(body)
            return await call_next(message)

        return decoded

    def _decoder(self, consumer: ConsumerInfo, content_type: str) -> Callable[[bytes], Any]:
        kind = content_type.partition(";")[0].strip().lower()
        if kind in self.decoders:
            return _checked(self.decoders[kind], kind)
        kind = _ALIASES.get(kind, next((known for end, known in _SUFFIXES.items() if kind.endswith(end)), kind or JSON))
        if kind == JSON or consumer.payload_type is bytes:
            return consumer.decoder("json")
        if kind == MSGPACK:
            return consumer.decoder("msgpack")
        known = ", ".join((JSON, MSGPACK, *self.decoders))
        raise DecodeError(f"there is no decoder for content-type {content_type[:100]!r}; known: {known}")


def header(message: Message[Any], name: str) -> str:
    """A header, in whatever case it was written; "" without it."""
    headers = message.headers
    if name in headers:
        return headers[name]
    return next((value for other, value in headers.items() if other.lower() == name), "")


def _checked(decoder: Callable[[bytes], Any], kind: str) -> Callable[[bytes], Any]:
    def checked(body: bytes) -> Any:
        try:
            return decoder(body)
        except Exception as error:
            raise DecodeError(f"the body is not {kind}: {type(error).__name__}: {error}") from error

    return checked
