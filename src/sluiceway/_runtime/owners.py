"""Which of several sources gave which message: settlements, suspicions and renewals go there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ..message import Message, Refused, Settlement
from ..source import Renewer, Source


class Opened:
    """One open source. It is `retired` once its `receive` has raised."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.retired = False


class Owners:
    """The messages in hand by the source that gave them.

    `at_once`: all of the sources settle without waiting. `settled` is called when some of a source's were settled.
    """

    def __init__(self, *, at_once: bool, settled: Callable[[Opened], None]) -> None:
        # Weak: a message whose lease was lost before it started is never settled, and just gone.
        self.of: WeakKeyDictionary[Message[Any], Opened] = WeakKeyDictionary()
        self._at_once = at_once
        self._settled = settled
        self._answered: dict[Message[Any], Refused | None] = {}  # settled in a call that raised for another source

    def own(self, opened: Opened, messages: Sequence[Message[Any]]) -> Sequence[Message[Any]]:
        """Note that `opened` gave these; returns them."""
        for message in messages:
            self.of[message] = opened
        return messages

    def has(self, opened: Opened) -> bool:
        """Whether some of its messages are in hand."""
        return any(one is opened for one in self.of.values())

    def renewer(self) -> Renewer:
        """Renews the leases of all, each with its own source's renewer."""
        return MergedRenewer(self.of)

    async def suspect(self, message: Message[Any]) -> bool:
        """As `Source.suspect`."""
        opened = self.of.get(message)
        return opened is not None and await opened.source.suspect(message)

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """As `Source.settle`; one call in each source, all at the same time."""
        parts: dict[Opened, tuple[list[Message[Any]], list[Settlement]]] = {}
        refused: list[Refused] = []
        for message in acks:
            if (opened := self._find(message, refused)) is not None:
                parts.setdefault(opened, ([], []))[0].append(message)
        for one in others:
            if (opened := self._find(one.message, refused)) is not None:
                parts.setdefault(opened, ([], []))[1].append(one)
        calls = [_caught(self._settle_part(opened, *part)) for opened, part in parts.items()]
        if self._at_once or len(calls) == 1:
            results = [await call for call in calls]  # without a turn of the loop
        else:
            results = await asyncio.gather(*calls)
        refused += [one for result in results if not isinstance(result, BaseException) for one in result]
        for result in results:
            if isinstance(result, BaseException):
                self._remember([*acks, *(one.message for one in others)], refused)
                raise result
        return refused

    def _find(self, message: Message[Any], refused: list[Refused]) -> Opened | None:
        opened = self.of.get(message)
        if opened is None:
            answer = self._answered.pop(message, Refused(message, "lost", "its source was closed"))
            refused += [] if answer is None else [answer]
        return opened

    def _remember(self, messages: Iterable[Message[Any]], refused: Iterable[Refused]) -> None:
        """One source raised, so the runtime settles all again: what the others have said they do not say twice."""
        said = {one.message: one for one in refused}
        self._answered.update({message: said.get(message) for message in messages if message not in self.of})

    async def _settle_part(
        self, opened: Opened, acks: list[Message[Any]], others: list[Settlement]
    ) -> Sequence[Refused]:
        messages = [*acks, *(one.message for one in others)]
        try:
            refused = await opened.source.settle(acks, others)
        except Exception:
            if not opened.retired:
                raise
            # The broker has them still: only once it has them back may others be asked for in their place.
            for message in [one for one, owner in self.of.items() if owner is opened]:
                del self.of[message]
            if not self._at_once:  # a settle that must not wait leaves the closing to `settled`
                with contextlib.suppress(Exception):
                    await opened.source.aclose()
            refused = [Refused(message, "lost", "its source failed") for message in messages]
        rejected = {id(one.message) for one in refused if one.kind == "rejected"}
        for message in messages:
            if id(message) not in rejected:
                self.of.pop(message, None)
        self._settled(opened)
        return refused


class MergedRenewer:
    """Renews each lease through a renewer of the source that it came from. Used on the renewing thread alone."""

    def __init__(self, of: WeakKeyDictionary[Message[Any], Opened]) -> None:
        self._of = of
        self._renewers: dict[Opened, Renewer] = {}

    def renew(self, tokens: Sequence[Any]) -> Sequence[Any]:
        """Raises what the last renewer that raised did, after all others have renewed."""
        wanted = set(tokens)
        parts: dict[Opened, list[Any]] = {}
        for reference in self._of.keyrefs():  # a list made in one step of C code: the loop changes it meanwhile
            message = reference()
            opened = None if message is None else self._of.get(message)
            if message is not None and opened is not None and message.token in wanted and opened.source.renewer:
                parts.setdefault(opened, []).append(message.token)
        lost: list[Any] = []
        failed: Exception | None = None
        for opened, part in parts.items():
            try:
                if opened not in self._renewers and opened.source.renewer is not None:
                    self._renewers[opened] = opened.source.renewer()
                lost += self._renewers[opened].renew(part)
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed
        return lost

    def close(self) -> None:
        for renewer in self._renewers.values():
            renewer.close()


async def _caught(settling: Awaitable[Sequence[Refused]]) -> Sequence[Refused] | BaseException:
    try:
        return await settling
    except (Exception, asyncio.CancelledError) as error:
        return error
