"""A time limit for a part of the chain."""

from __future__ import annotations

import asyncio
from typing import Any

from ..errors import HandlerTimeout, OptionError, Reject
from ..message import Handler, Message
from ._checks import is_seconds


class Timeout:
    """Cancels what is further in when it runs over `seconds`; the message fails with HandlerTimeout.

    With `header`, a message that has it sets its own limit, in seconds, and `seconds` is for those that have none, and
    the most that a header may ask for; None: no limit. A header that says no number of seconds rejects its message.

    The consumer's option `timeout` limits the whole chain and costs nothing per message; this one limits a part of it,
    costs about 5 µs, and is exact. A plain `def` handler cannot be cancelled: its thread is abandoned, and another
    takes its place. Raises OptionError for a limit that cannot be.
    """

    def __init__(self, seconds: float | None = None, *, header: str | None = None) -> None:
        if seconds is None and header is None:
            raise OptionError("Timeout: give seconds, or the header that says them, or both")
        if seconds is not None and not is_seconds(seconds):
            raise OptionError(f"Timeout: seconds must be more than 0; got {seconds!r}")
        if header is not None and not header:
            raise OptionError("Timeout: header must be a name; got ''")
        self.seconds = seconds
        self.header = header

    async def __call__(self, message: Message[Any], call_next: Handler) -> Any:
        limit = self._limit(message)
        expiry = asyncio.timeout(limit)
        try:
            async with expiry:
                return await call_next(message)
        except TimeoutError as error:
            if not expiry.expired():
                raise  # the handler's own
            raise HandlerTimeout(f"message {message.id} ran over {limit:g} s") from error

    def _limit(self, message: Message[Any]) -> float | None:
        said = None if self.header is None else message.headers.get(self.header)
        if said is None:
            return self.seconds
        try:
            limit = float(said)
        except ValueError:
            limit = 0.0
        if not is_seconds(limit):
            raise Reject(f"header {self.header!r} must be seconds, more than 0; got {said[:100]!r}")
        return limit if self.seconds is None else min(limit, self.seconds)
