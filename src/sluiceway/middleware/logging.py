"""One structured log record per message."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

from ..errors import OptionError
from ..message import Handler, Message
from . import ConsumerInfo, refuse_batches
from ._ends import End, end_of


class Logging:
    """Logs each message once, when the rest of the chain is done with it.

    `level` is a number or a name of the standard library's, in capitals or not; `logger` is a name or a Logger. The
    record has the fields consumer, topic, message_id, attempt, seconds and outcome: handled, failed, rejected,
    retry_later, released or cancelled. It never has the payload, and of a failure no text: the pipeline logs each
    failure with its traceback and what happens next. Raises OptionError for a level that there is not.
    """

    def __init__(self, level: int | str = logging.INFO, *, logger: logging.Logger | str = "sluiceway.messages") -> None:
        known = logging.getLevelNamesMapping()
        number = known.get(level.upper()) if isinstance(level, str) else level
        if not isinstance(number, int) or isinstance(number, bool):
            raise OptionError(f"Logging: level must be a number or one of {', '.join(known)}; got {level!r}")
        self.level = number
        self.logger = logging.getLogger(logger) if isinstance(logger, str) else logger

    def for_consumer(self, consumer: ConsumerInfo) -> Callable[[Message[Any], Handler], Awaitable[Any]]:
        refuse_batches("Logging", consumer)
        level, logger, name = self.level, self.logger, consumer.name

        def log(message: Message[Any], seconds: float, outcome: End) -> None:
            fields = {
                "consumer": name,
                "topic": message.topic,
                "message_id": message.id,
                "attempt": message.attempt,
                "seconds": seconds,
                "outcome": outcome,
            }
            text = "%s: message %s of %r, attempt %d: %s in %.6f s"
            logger.log(level, text, name, message.id, message.topic, message.attempt, outcome, seconds, extra=fields)

        async def logged(message: Message[Any], call_next: Handler) -> Any:
            if not logger.isEnabledFor(level):
                return await call_next(message)
            started = perf_counter()
            try:
                value = await call_next(message)
            except BaseException as error:
                log(message, perf_counter() - started, end_of(error))
                raise
            log(message, perf_counter() - started, end_of(message.error))
            return value

        return logged
