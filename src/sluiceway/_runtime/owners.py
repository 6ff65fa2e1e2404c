"""Which of several sources gave which message: settlements, suspicions and renewals go there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ..message import Message, Refused, Settlement
from ..source import Renewer, Source
from .acknowledgers import cancelled_from_outside
from .unset import no

PATIENCE = 1.0  # seconds that a settle waits for a source, while others may have more to settle


class Opened:
    """One open source. It is `retired` once its `receive` has raised."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.retired = False
        self.settling: dict[bool, asyncio.Task[Sequence[Refused]]] = {}  # the calls in flight: of acks, and of others
        self.inside: set[Message[Any]] = set()  # what these settle


class Later(Refused):
    """Not settled, since its source raised or has not answered yet, which is no reason for the others to wait."""


class Owners:
    """The messages in hand by the source that gave them.

    `at_once`: all of the sources settle without waiting. `settled` is called when some of a source's were settled.
    `on_thread` says whether a thread runs a message.
    """

    def __init__(self, *, at_once: bool, settled: Callable[[Opened], None]) -> None:
        # Weak: a message whose lease was lost before it started is never settled, and just gone.
        self.of: WeakKeyDictionary[Message[Any], Opened] = WeakKeyDictionary()
        self.on_thread: Callable[[Message[Any]], bool] = no
        self._at_once = at_once
        self._settled = settled
        self._answered: dict[Message[Any], Refused | None] = {}  # what was said when nobody waited for it any more
        self._unheard: set[asyncio.Task[Sequence[Refused]]] = set()  # calls that nobody waits for any more

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
        """As `Source.settle`; one call in each source, all at the same time.

        It does not raise what a source raises, nor wait for one that does not answer: what could not be settled there
        is returned as `Later`, to be settled again.
        """
        parts: dict[Opened, _Part] = {}
        refused: list[Refused] = []
        for message in acks:
            if (opened := self._find(message, refused)) is not None:
                parts.setdefault(opened, _Part([], [])).acks.append(message)
        for one in others:
            if (opened := self._find(one.message, refused)) is not None:
                parts.setdefault(opened, _Part([], [])).others.append(one)
        if self._at_once:
            for opened, part in parts.items():
                refused += await self._try(opened, part)  # without a turn of the loop
            return refused
        calls: dict[asyncio.Task[Sequence[Refused]], _Part] = {}
        for opened, part in parts.items():
            if part.kind in opened.settling or not opened.inside.isdisjoint(part.messages):
                refused += part.later("its source has not answered an earlier settle")
            else:
                calls[self._call(opened, part)] = part
        if calls:
            await asyncio.wait(calls, timeout=PATIENCE)
        for call, part in calls.items():
            if call.done():
                refused += call.result()
            else:
                self._unheard.add(call)
                refused += part.later("its source has not answered")
        return refused

    def _call(self, opened: Opened, part: _Part) -> asyncio.Task[Sequence[Refused]]:
        """Settle a part. The call goes on when nobody waits for it any more: it may have reached the broker."""

        def ended(call: asyncio.Task[Sequence[Refused]]) -> None:
            del opened.settling[part.kind]
            opened.inside.difference_update(part.messages)
            if call in self._unheard:
                self._unheard.discard(call)
                if not call.cancelled():
                    said = {one.message: one for one in call.result()}
                    gone = [message for message in part.messages if message not in self.of]
                    self._answered.update({message: said.get(message) for message in gone})

        opened.inside.update(part.messages)
        call = opened.settling[part.kind] = asyncio.ensure_future(self._try(opened, part))
        call.add_done_callback(ended)
        return call

    def _find(self, message: Message[Any], refused: list[Refused]) -> Opened | None:
        opened = self.of.get(message)
        if opened is None:
            answer = self._answered.pop(message, Refused(message, "lost", "its source was closed"))
            refused += [] if answer is None else [answer]
        return opened

    async def _try(self, opened: Opened, part: _Part) -> Sequence[Refused]:
        try:
            return await self._settle_part(opened, part)
        except (Exception, asyncio.CancelledError) as error:
            if cancelled_from_outside(error):
                raise
            return part.later(f"{type(error).__name__}: {error}")

    async def _settle_part(self, opened: Opened, part: _Part) -> Sequence[Refused]:
        messages = part.messages
        try:
            refused = await opened.source.settle(part.acks, part.others)
        except Exception:
            if not opened.retired:
                raise
            # The broker has them still: only once it has them back may others be asked for in their place.
            owned = [one for one, owner in self.of.items() if owner is opened]
            for message in owned:
                del self.of[message]
            if not self._at_once:  # a settle that must not wait leaves the closing to `settled`
                with contextlib.suppress(Exception):
                    await opened.source.aclose(keep=[one for one in owned if self.on_thread(one)])
            refused = [Refused(message, "lost", "its source failed") for message in messages]
        rejected = {id(one.message) for one in refused if one.kind == "rejected"}
        for message in messages:
            if id(message) not in rejected:
                self.of.pop(message, None)
        self._settled(opened)
        return refused


class _Part(NamedTuple):
    """What goes to one source in one call."""

    acks: list[Message[Any]]
    others: list[Settlement]

    @property
    def kind(self) -> bool:
        """Acks or others: of each, one call at a time."""
        return bool(self.acks)

    @property
    def messages(self) -> list[Message[Any]]:
        return [*self.acks, *(one.message for one in self.others)]

    def later(self, why: str) -> list[Refused]:
        return [Later(message, "rejected", why) for message in self.messages]


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
