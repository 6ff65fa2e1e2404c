"""What happens with messages that failed: the user's hooks, the policy, one log line each, the settlement."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from .._decisions.policy import explain, give_up, reason_of, remote_traceback, settle_failure, users_traceback
from ..errors import DecodeError, Directive, OptionError, Release, RetryLater
from ..message import SETTLED, Message, Settlement
from ..telemetry import MessageFailed, Telemetry
from .chance import draw
from .settler import PipelineSettler
from .spans import Spans
from .spec import ErrorChoice, PipelineSpec
from .unset import raise_it

log = logging.getLogger("sluiceway")


class Failures:
    """The one way from an exception to a settlement, for processors and batch processors."""

    def __init__(self, spec: PipelineSpec, settler: PipelineSettler, telemetry: Telemetry) -> None:
        self.spec = spec
        self.settler = settler
        self.telemetry = telemetry
        self.spans = Spans(spec, telemetry)
        self.on_exit: Callable[[BaseException], None] = raise_it

    async def failed(self, messages: Sequence[Message[Any]]) -> None:
        """Settle messages whose `error` is set. Never raises what a hook raises; settles even when cancelled."""
        settlements = []
        going_back: set[str | None] = set()  # keys of which one goes back: those behind it are parked, not failed
        uncounted = self._tell_watches(messages) if self.spec.watches else {}
        for message in messages:
            if message.state >= SETTLED:
                self._late(message)
                self.settler.handler_ended(message)
            elif message.key is None or message.key not in going_back:
                settlement = await self._decide(message, _error(message), uncounted.get(message))
                settlements.append(settlement)
                if self.spec.ordered and settlement.outcome in ("retry", "release"):
                    going_back.add(message.key)
        dead = [one.message for one in settlements if one.outcome == "dead_letter"]
        if dead and self.spec.on_failed is not None:
            await self._call_failed(dead)
        for settlement in settlements:
            self._say(settlement)
            self.settler.settle(settlement)
        for message in messages if going_back else ():  # lanes park those that they have; the others never came there
            self.settler.settle(Settlement(message, "park", counted=False))

    def _tell_watches(self, messages: Sequence[Message[Any]]) -> dict[Message[Any], RetryLater]:
        uncounted: dict[Message[Any], RetryLater] = {}
        for watch in self.spec.watches:
            try:
                uncounted.update(watch.failed(messages))
            except Exception:
                log.exception("%s: a gate raised on a failure; the retry policy decides", self.spec.name)
        return uncounted

    def killed_its_process(self, message: Message[Any], error: BaseException) -> None:
        """Dead-letter a suspect whose attempts are used up, without running it."""
        message.error = error
        settlement = give_up(message, error, self.spec.rules, now=time.time())
        self._say(settlement)
        self.settler.settle(settlement)

    async def _decide(self, message: Message[Any], error: BaseException, otherwise: RetryLater | None) -> Settlement:
        """`otherwise`: what takes the place of the retry policy, unless `handle_error` chooses."""
        explain(error)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self.on_exit(error)
            if isinstance(error, KeyboardInterrupt):
                return Settlement(message, "release", counted=False)
            return settle_failure(message, error, self.spec.rules, draw=draw(), now=time.time())
        if self.spec.on_error is not None and not isinstance(error, Release):
            choice = await self._ask(message, error)
            if choice == "ack":
                return Settlement(message, "ack", outputs=tuple(message.outputs or ()))
            if isinstance(choice, Directive):
                otherwise = None
                error = choice.with_traceback(error.__traceback__)
                error.__cause__ = message.error
        return settle_failure(message, otherwise or error, self.spec.rules, draw=draw(), now=time.time())

    async def _ask(self, message: Message[Any], error: BaseException) -> ErrorChoice:
        assert self.spec.on_error is not None
        try:
            choice: Any = self.spec.on_error(message, error)
            if inspect.isawaitable(choice):
                choice = await choice
        except asyncio.CancelledError:
            return None
        except Directive as directive:
            return directive
        except (KeyboardInterrupt, SystemExit) as error:
            self.on_exit(error)
            return Release("handle_error exits the app")
        except BaseException:
            log.exception(
                "%s: handle_error raised for message %s; the retry policy decides", self.spec.name, message.id
            )
            return None
        if choice is None or (type(choice) is str and choice == "ack") or isinstance(choice, Directive):
            return cast(ErrorChoice, choice)
        wrong = OptionError(f'handle_error must return "ack", Reject, RetryLater, Release or None, got {choice!r}')
        log.error("%s: %s; the retry policy decides for message %s", self.spec.name, wrong, message.id)
        return None

    async def _call_failed(self, dead: list[Message[Any]]) -> None:
        assert self.spec.on_failed is not None
        span = self.spans.handle_failed(dead)
        failure: BaseException | None = None
        try:
            result = self.spec.on_failed(dead)
            if inspect.isawaitable(result):
                await result
        except asyncio.CancelledError as error:
            failure = error
        except (KeyboardInterrupt, SystemExit) as error:
            failure = error
            self.on_exit(error)
        except BaseException as error:
            failure = error
            log.exception("%s: handle_failed raised; its %d messages end as decided", self.spec.name, len(dead))
        if span is not None:
            span.end(failure)

    def _late(self, message: Message[Any]) -> None:
        if isinstance(message.error, Directive):
            return  # a drain cut its handler off, or it said itself how it should end: too late, but no error
        log.error(
            "%s: message %s of %r failed after it was settled; it stays settled",
            self.spec.name, message.id, message.topic, exc_info=_error(message),
        )  # fmt: skip

    def _say(self, settlement: Settlement) -> None:
        message, error = settlement.message, _error(settlement.message)
        if isinstance(error, Release):  # its user or a drain hands it back: that is no failure
            log.info("%s: message %s of %r goes back: %s", self.spec.name, message.id, message.topic, error)
            return
        expected = isinstance(error, (Directive, KeyboardInterrupt, SystemExit))
        trace = users_traceback(error)
        plain = expected or trace is None or isinstance(error, DecodeError)  # the text says it all
        told = "" if expected else remote_traceback(error)
        log.log(
            logging.INFO if expected else logging.ERROR,
            "%s: message %s of %r failed at attempt %d of %d (%s: %s); %s%s",
            self.spec.name, message.id, message.topic, message.attempt, self.spec.rules.retry.attempts,
            type(error).__name__, (settlement.reason or reason_of(error)).message, _next_step(settlement),
            told and f"\n{told.rstrip()}",
            exc_info=None if plain else (type(error), error, trace),
        )  # fmt: skip
        if self.telemetry.wants(MessageFailed):
            self.telemetry.emit(
                MessageFailed(
                    consumer=self.spec.name,
                    topic=message.topic,
                    id=message.id,
                    attempt=message.attempt,
                    error=error,
                    outcome=settlement.outcome,
                    delay=settlement.delay,
                )
            )


def _next_step(settlement: Settlement) -> str:
    match settlement.outcome:
        case "retry":
            return f"it is tried again in {settlement.delay:.2f} s"
        case "dead_letter":
            return f"it goes to {settlement.outputs[0].topic!r}" if settlement.outputs else "it is dropped"
        case "ack":
            return "handle_error accepted it"
        case _:
            return "it goes back to the broker"


def _error(message: Message[Any]) -> BaseException:
    assert message.error is not None
    return message.error
