"""Between payloads and bodies: JSON by msgspec; pydantic models when pydantic is installed; bytes as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec

from .errors import DecodeError, OptionError

Decode = Callable[[bytes], Any]


def make_decoder(payload_type: Any) -> Decode | None:
    """What turns a body into `payload_type`; None when the body itself is wanted.

    The result raises DecodeError that says what was expected. Raises OptionError when no decoder can be made for the
    type.
    """
    if payload_type is bytes:
        return None
    name = getattr(payload_type, "__name__", str(payload_type))
    if _is_pydantic(payload_type):
        decode = payload_type.model_validate_json
        wrong: type[Exception] = ValueError
    else:
        try:
            decode = msgspec.json.Decoder(payload_type).decode
        except TypeError as error:
            raise OptionError(f"payload type {name} cannot be decoded from JSON: {error}") from error
        wrong = msgspec.DecodeError

    def checked(body: bytes) -> Any:
        try:
            return decode(body)
        except wrong as error:
            raise DecodeError(f"the body is not {name}: {error}") from error
        except UnicodeDecodeError as error:
            raise DecodeError(f"the body is not {name}: it is not UTF-8 ({error})") from error

    return checked


_encoder = msgspec.json.Encoder()


def encode(payload: Any) -> bytes:
    """The body of a payload. Raises OptionError, where it is published, for what JSON cannot say."""
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, (bytearray, memoryview)):
        return bytes(payload)
    if _is_pydantic(type(payload)):
        return payload.model_dump_json().encode()  # type: ignore[no-any-return]
    try:
        return _encoder.encode(payload)
    except (TypeError, ValueError) as error:
        raise OptionError(f"a payload of type {type(payload).__name__} cannot be written as JSON: {error}") from error


def _is_pydantic(kind: Any) -> bool:
    """Whether `kind` is a pydantic model. A program that has one has loaded pydantic, so it is never loaded here."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
