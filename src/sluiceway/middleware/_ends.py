"""What became of a handler's call, in one word, for logs, metrics and traces."""

from __future__ import annotations

import asyncio
from typing import Literal

from ..errors import DecodeError, Reject, Release, RetryLater

End = Literal["handled", "failed", "rejected", "retry_later", "released", "cancelled"]


def end_of(error: BaseException | None) -> End:
    """How a call ended that raised `error`, or whose message was failed by it."""
    match error:
        case None:
            return "handled"
        case Reject() | DecodeError():
            return "rejected"
        case RetryLater():
            return "retry_later"
        case Release():
            return "released"
        case asyncio.CancelledError():
            return "cancelled"
        case _:
            return "failed"
