"""A source of anything: what `transform` makes of its events are the messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from .._decisions.policy import unusable
from ..errors import SluicewayError
from ..message import Message, new_id
from ..source import Source

Transform = Callable[[Any], Message[Any]]


def transformed(source: Source, transform: Transform, *, topic: str, encode: Callable[[Any], bytes]) -> Source:
    """`source`, but that each event it returns goes through `transform`.

    An event that cannot be transformed becomes a message with its `error` set, which the intake fails: it alone. Its
    topic is `topic`, and its body the event as `encode` writes it.
    """
    return cast(Source, _Transformed(source, transform, topic, encode))


class _Transformed:
    """All of a source, also its optional methods, but for what it receives."""

    returns_failed = True

    def __init__(self, source: Source, transform: Transform, topic: str, encode: Callable[[Any], bytes]) -> None:
        self._source = source
        self._transform = transform
        self._topic = topic
        self._encode = encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        return [self._message(event) for event in await self._source.receive(demand)]

    def _message(self, event: Any) -> Message[Any]:
        try:
            message = self._checked(event, self._transform(event))
        except BaseException as error:  # an exit too: it must not take the other events of this receive with it
            message = event if isinstance(event, Message) else Message(self._topic, self._bytes(event), new_id())
            message.error = unusable("transform", error)
        if message is not event and message.token is None:
            message.token = event
        return message

    def _checked(self, event: Any, message: Any) -> Message[Any]:
        if not isinstance(message, Message):
            raise TypeError(f"transform must return a Message, got {type(message).__name__}")
        if isinstance(event, Message) and message is not event:
            raise TypeError("transform must return the Message that it was given, changed in place, and made another")
        return message

    def _bytes(self, event: Any) -> bytes:
        try:
            return self._encode(event)
        except SluicewayError:
            return repr(event).encode(errors="backslashreplace")
