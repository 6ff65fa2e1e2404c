"""What a broker saw: how each delivery ended, what was published, which batches ran."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from msgspec import Struct

from ..batch import Batch
from ..message import Message, Outcome, Outgoing, Reason, Refused, Settlement
from ..source import Source, Subscription
from ..transport import Transport
from .clock import VirtualClockLoop
from .wrapping import SourceWrapper, TransportWrapper, end_leases


class Delivery(Struct, kw_only=True, eq=False):
    """How one delivery of a message ended.

    - `outcome`: ack; retry, after `delay` seconds and counted as a failed attempt if `counted`; dead_letter; release,
      back to the broker untouched; park, back until the earlier message of its key is settled.
    - `reason`: why it failed; None for an ack and a release. `error` is the exception itself.
    - `dead_letter`: as published; None when there is none, also with `exhausted="drop"`.
    - `published`: what `message.publish` sent, which went out with the settle.
    - `batch`: the batch it was in, with `batch.info`; None without one.
    - `lost`: the broker refused the settle, since the lease was gone: another delivery of the message counts.
    - `at`: when, on the loop's clock, in seconds.
    """

    message: Message[Any]
    group: str
    outcome: Outcome
    delay: float = 0.0
    counted: bool = True
    reason: Reason | None = None
    dead_letter: Outgoing | None = None
    published: tuple[Outgoing, ...] = ()
    batch: Batch[Any] | None = None
    lost: bool = False
    at: float = 0.0
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.error = self.message.error  # which the message has only until it is settled

    @property
    def value(self) -> Any:
        """What the handler returned; None when it failed."""
        return self.message.value

    @property
    def attempt(self) -> int:
        """The number of the attempt, from 1."""
        return self.message.attempt

    def __repr__(self) -> str:
        later = f" in {self.delay:.2f} s" if self.delay else ""
        why = f", {self.error!r}" if self.error is not None else ""
        lost = ", lost" if self.lost else ""
        one = self.message
        return f"<Delivery of {one.id} of {one.topic!r}, attempt {one.attempt}: {self.outcome}{later}{why}{lost}>"


class Recorder(TransportWrapper):
    """A transport that writes down what goes through it.

    With `once` no message comes a second time: a delivery that would is ended for the broker, and written down as it
    was. `attempt` is the number of every first attempt. `outside` holds the topics and group of the subscriptions whose
    handlers work outside the loop: while they have something in hand, virtual time runs at real speed.
    """

    def __init__(self, wrapped: Transport, *, once: bool = False, attempt: int = 1) -> None:
        super().__init__(wrapped)
        self.once = once
        self.attempt = attempt
        self.outside: set[tuple[tuple[str, ...], str]] = set()
        self.deliveries: list[Delivery] = []
        self.published: list[Outgoing] = []
        self.batches: list[Batch[Any]] = []
        self.sources: list[RecordingSource] = []
        self.changed = asyncio.Event()
        self.dying = False
        self._batch_of: dict[Message[Any], Batch[Any]] = {}

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        self._check_alive()
        await self.wrapped.publish(messages)
        self.published += messages

    async def subscribe(self, subscription: Subscription) -> Source:
        self._check_alive()
        source = RecordingSource(await self.wrapped.subscribe(subscription), self, subscription)
        self.sources.append(source)
        return source

    @property
    def held(self) -> int:
        """How many deliveries the broker has handed over and nobody has settled, also those lost on the way."""
        return sum(len(source.held) for source in self.sources)

    def formed(self, batch: Batch[Any]) -> None:
        """A batch handler is about to be called."""
        self.batches.append(batch)
        self._batch_of.update(dict.fromkeys(batch, batch))

    def ended(self, delivery: Delivery) -> None:
        """A settle has reached the broker."""
        delivery.batch = self._batch_of.pop(delivery.message, None)
        self.deliveries.append(delivery)
        if not delivery.lost:
            self.published += delivery.published

    def kill(self) -> None:
        """The process dies: what is in hand comes back as a suspect, and nothing of this life reaches the broker."""
        self.dying = True
        for source in self.sources:
            end_leases(self.wrapped, source, died=True)
            source.forget()

    def _check_alive(self) -> None:
        if self.dying:
            raise ConnectionError("the process of this handler has died; nothing of it reaches the broker any more")


class RecordingSource(SourceWrapper):
    """A source that writes down how deliveries end."""

    def __init__(self, wrapped: Source, recorder: Recorder, subscription: Subscription) -> None:
        super().__init__(wrapped)
        self.held: set[Message[Any]] = set()
        self._recorder = recorder
        self._group = subscription.group
        self._loop = asyncio.get_running_loop()
        self._outside = (subscription.topics, subscription.group) in recorder.outside
        self._real_time: AbstractContextManager[None] | None = None

    async def receive(self, demand: int) -> Sequence[Message[Any]]:
        messages = await self.wrapped.receive(demand)
        for message in messages if self._recorder.attempt > 1 else ():
            message.failures = max(message.failures, self._recorder.attempt - 1)
        self.held.update(messages)
        self._changed()
        return messages

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        sent = [_for_good(one) for one in others] if self._recorder.once else others
        refused = await self.wrapped.settle(acks, sent)
        kinds = {id(one.message): one.kind for one in refused}
        for one in (*[Settlement(message, "ack") for message in acks], *others):
            kind = kinds.get(id(one.message))
            if kind != "rejected" and one.message in self.held:
                self.held.discard(one.message)
                self._recorder.ended(self._delivery(one, lost=kind == "lost"))
        self._changed()
        return refused

    async def suspect(self, message: Message[Any]) -> bool:
        ours = await self.wrapped.suspect(message)
        if not ours:
            self.held.discard(message)
            self._changed()
        return ours

    async def aclose(self, *, keep: Sequence[Message[Any]] = ()) -> None:
        await self.wrapped.aclose(keep=keep)
        self.forget()

    def forget(self) -> None:
        """Nothing is in hand any more."""
        self.held.clear()
        if self in self._recorder.sources:
            self._recorder.sources.remove(self)
        self._changed()

    def _delivery(self, one: Settlement, *, lost: bool) -> Delivery:
        # What has the message's own id is the message itself, in another place: its dead letter.
        dead = next((out for out in one.outputs if out.id == one.message.id), None)
        return Delivery(
            message=one.message,
            group=self._group,
            outcome=one.outcome,
            delay=one.delay,
            counted=one.counted,
            reason=one.reason,
            dead_letter=dead,
            published=tuple(out for out in one.outputs if out is not dead),
            lost=lost,
            at=self._loop.time(),
        )

    def _changed(self) -> None:
        self._recorder.changed.set()
        if not self._outside or not isinstance(self._loop, VirtualClockLoop):
            return
        if self.held and self._real_time is None:
            self._real_time = self._loop.external()
            self._real_time.__enter__()
        elif not self.held and self._real_time is not None:
            self._real_time.__exit__(None, None, None)
            self._real_time = None


def _for_good(one: Settlement) -> Settlement:
    """The same settlement, with the delivery ended: what would come again does not."""
    return one if one.outcome in ("ack", "dead_letter") else Settlement(one.message, "ack", outputs=one.outputs)
