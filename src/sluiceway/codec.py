"""Between payloads and bodies: JSON by msgspec; pydantic models when pydantic is installed; bytes as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import NoneType
from typing import Any, Literal

import msgspec

from .errors import DecodeError, OptionError, PayloadTooLarge

Decode = Callable[[bytes], Any]
Encode = Callable[[Any], bytes]
Format = Literal["json", "msgpack"]


def make_decoder(payload_type: Any, format: Format = "json") -> Decode | None:
    """What turns a body in `format` into `payload_type`; None when the body itself is wanted.

    The result raises DecodeError that says what was expected. Raises OptionError when no decoder can be made for the
    type.
    """
    if payload_type is bytes:
        return None
    name = payload_type.__name__ if isinstance(payload_type, type) else str(payload_type)
    if _is_pydantic(payload_type):
        decode: Decode = payload_type.model_validate_json if format == "json" else _pydantic_from_msgpack(payload_type)
        wrong: type[Exception] = ValueError
    else:
        try:
            _check_type(payload_type)
            if format == "json":
                decode = msgspec.json.Decoder(payload_type, dec_hook=_from_json).decode
            else:
                decode = msgspec.msgpack.Decoder(payload_type, dec_hook=_from_builtins).decode
        except TypeError as error:
            what = "JSON" if format == "json" else "MessagePack"
            raise OptionError(f"payload type {name} cannot be decoded from {what}: {error}") from error
        wrong = msgspec.DecodeError

    def checked(body: bytes) -> Any:
        try:
            return decode(body)
        except wrong as error:
            raise DecodeError(f"the body is not {name}: {_in_one_line(error)}") from error
        except UnicodeDecodeError as error:
            raise DecodeError(f"the body is not {name}: it is not UTF-8 ({error})") from error
        except RecursionError as error:
            raise DecodeError(f"the body is not {name}: it is nested too deeply") from error

    return checked


def _in_one_line(error: Exception) -> str:
    """What msgspec says; of pydantic's several lines, where and what of each mistake."""
    mistakes: Any = getattr(error, "errors", tuple)
    told = (f"{one['msg']} - at `{'.'.join(map(str, one['loc'])) or '$'}`" for one in mistakes())
    return "; ".join(told) or str(error)


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
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"a payload of type {type(payload).__name__} cannot be written as JSON: {error}") from error


def make_encoder(max_payload: int) -> Encode:
    """`encode` for a broker's limit: raises PayloadTooLarge, where it is published, for a body over it."""
    return partial(_encode_within, max_payload)


def _encode_within(max_payload: int, payload: Any) -> bytes:
    body = encode(payload)
    if len(body) > max_payload:
        raise PayloadTooLarge(f"the body has {len(body)} bytes and the broker's limit is {max_payload}")
    return body


def _check_type(payload_type: Any) -> None:
    """Raise TypeError for a class, anywhere in the type, that nothing decoded from JSON can be an instance of."""
    from msgspec.inspect import type_info

    for kind in _foreign(type_info(payload_type), set()):
        json_types = (dict, list, str, int, float, bool, NoneType)
        if not _is_pydantic(kind) and not any(issubclass(one, kind) for one in json_types):
            raise TypeError(f"nothing says how to make a {kind.__name__}; use a msgspec.Struct or a dataclass")


def _foreign(info: Any, seen: set[int]) -> Iterator[type]:
    """The classes in a type that msgspec does not know."""
    from msgspec.inspect import CustomType, Field, Type

    if isinstance(info, CustomType):
        yield info.cls
    elif isinstance(info, tuple):
        for one in info:
            yield from _foreign(one, seen)
    elif isinstance(info, (Type, Field)) and id(info) not in seen:
        seen.add(id(info))
        for name in info.__struct_fields__:
            yield from _foreign(getattr(info, name), seen)


def _from_json(kind: type, value: Any) -> Any:
    """A part of a payload that msgspec does not know: a pydantic model inside something else."""
    if _is_pydantic(kind):
        return kind.model_validate_json(_encoder.encode(value))  # type: ignore[attr-defined]
    return value


def _from_builtins(kind: type, value: Any) -> Any:
    """The same for a body that is not JSON."""
    return kind.model_validate(value) if _is_pydantic(kind) else value  # type: ignore[attr-defined]


def _pydantic_from_msgpack(model: Any) -> Decode:
    return lambda body: model.model_validate(msgspec.msgpack.decode(body))


def _to_json(value: Any) -> Any:
    if _is_pydantic(type(value)):
        return value.model_dump(mode="json")
    raise TypeError(f"it holds a {type(value).__name__}")


_encoder = msgspec.json.Encoder(enc_hook=_to_json)


def _is_pydantic(kind: Any) -> bool:
    """Whether `kind` is a pydantic model. A program that has one has loaded pydantic, so it is never loaded here."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
