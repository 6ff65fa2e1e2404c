"""A transformer: a source may return anything, and what cannot be transformed fails alone."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from sluiceway import Message, OptionError, Pipeline, Reject, Retry, RetryLater
from sluiceway.message import Refused, Settlement

from .recording import Broker, RecordingSource, bodies, running

pytestmark = pytest.mark.virtual_time

ONCE = Retry(attempts=1)


class RawSource(RecordingSource):
    """Returns plain events, and knows its deliveries by the event that it finds in `token`."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self.own: dict[int, Message[Any]] = {}

    async def receive(self, demand: int) -> Sequence[Any]:
        events = []
        for message in await super().receive(demand):
            event = {"id": message.id, "body": message.body, "failures": message.failures}
            self.own[id(event)] = message
            events.append(event)
        return events

    async def settle(self, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        mine = [Settlement(self._mine(one.message), one.outcome, one.delay, one.counted, one.reason, one.outputs)
                for one in others]  # fmt: skip
        return await super().settle([self._mine(message) for message in acks], mine)

    def _mine(self, message: Message[Any]) -> Message[Any]:
        return self.own[id(message.token)]


class RawBroker(Broker):
    async def open(self) -> RawSource:
        source = RawSource(self)
        self.sources.append(source)
        self.changed()
        return source


def to_message(event: dict[str, Any]) -> Message[Any]:
    if event["body"] == b"bad":
        raise KeyError("price")
    return Message("prices", b"<%b>" % event["body"], event["id"], failures=event["failures"])


async def test_each_event_goes_through_the_transformer() -> None:
    broker = RawBroker("1", "2", "3")
    handled: list[tuple[str, bytes, str]] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append((message.topic, message.payload, message.id))

    async with running(Pipeline(broker.open, handle, transform=to_message), broker):
        await broker.settled(3)
    assert handled == [("prices", b"<1>", "m1"), ("prices", b"<2>", "m2"), ("prices", b"<3>", "m3")]
    assert broker.acked == ["m1", "m2", "m3"]


async def test_an_event_that_cannot_be_transformed_is_dead_lettered_and_the_others_of_its_receive_flow(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = RawBroker("1", "bad", "3")
    handled: list[bytes] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.payload)

    async with running(Pipeline(broker.open, handle, transform=to_message, retry=ONCE), broker):
        await broker.settled(3)
    assert handled == [b"<1>", b"<3>"]
    assert broker.outcomes("m2") == ["dead_letter"]
    assert len(broker.sources) == 1
    (dead,) = broker.dead
    (letter,) = dead.outputs
    assert letter.topic == "source.default.dead"
    assert re.search(r"transform raised KeyError: 'price' \(test_sources_transform.py:\d+\)", caplog.text)
    assert "in to_message" in letter.headers["sluiceway-dead-traceback"]
    assert json.loads(letter.body)["id"] == "m2"


async def test_it_may_say_itself_how_an_event_ends() -> None:
    broker = Broker("a", "b")

    def transform(event: Message[Any]) -> Message[Any]:
        raise Reject("not ours") if event.body == b"a" else RetryLater(5, "the rates are not there yet")

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, transform=transform, retry=Retry(attempts=2)), broker):
        await broker.settled(2)
    assert broker.outcomes("m1") == ["dead_letter"]
    assert broker.outcomes("m2") == ["retry", "dead_letter"]


async def test_a_message_is_changed_in_place_and_keeps_its_delivery() -> None:
    broker = Broker("a")
    handled: list[Any] = []

    def transform(event: Message[Any]) -> Message[Any]:
        event.topic = "renamed"
        return event

    async def handle(message: Message[bytes]) -> None:
        handled.append((message.topic, message.attempt))
        if message.attempt == 1:
            raise ValueError("once more")

    async with running(Pipeline(broker.open, handle, transform=transform), broker):
        await broker.settled(1)
    assert handled == [("renamed", 1), ("renamed", 2)]


@pytest.mark.parametrize(
    ("transform", "error"),
    [
        (lambda event: event.body, "transform must return a Message, got bytes"),
        (lambda event: Message("t", event.body, "x"), "the Message that it was given, changed in place"),
    ],
)
async def test_what_is_no_message_or_another_one_fails_its_event(transform: Any, error: str) -> None:
    broker = Broker("a")

    async def handle(message: Message[bytes]) -> None:
        raise AssertionError("not reached")

    async with running(Pipeline(broker.open, handle, transform=transform, retry=ONCE), broker):
        await broker.settled(1)
    assert error in broker.dead[0].outputs[0].headers["sluiceway-dead-error"]


async def test_an_exit_in_it_costs_only_its_event() -> None:
    broker = RawBroker("1", "exit", "3")

    def transform(event: dict[str, Any]) -> Message[Any]:
        if event["body"] == b"exit":
            raise SystemExit(3)
        return to_message(event)

    async def handle(message: Message[bytes]) -> None: ...

    async with running(Pipeline(broker.open, handle, transform=transform), broker):
        await broker.settled(3)
    assert sorted(broker.acked) == ["m1", "m3"]
    assert broker.outcomes("m2") == ["dead_letter"]


async def test_nothing_is_lost_when_every_second_event_fails() -> None:
    broker = RawBroker(*bodies(200))

    def transform(event: dict[str, Any]) -> Message[Any]:
        if int(event["body"]) % 2:
            raise ValueError("odd")
        return to_message(event)

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(0.001)

    async with running(Pipeline(broker.open, handle, transform=transform, max_demand=20), broker):
        await broker.settled(200)
    assert sorted(broker.acked) == sorted(f"m{number}" for number in range(2, 201, 2))
    assert len(broker.dead) == 100


def test_a_transformer_that_cannot_be_is_refused_at_definition() -> None:
    async def later(event: Any) -> Message[Any]:
        raise AssertionError

    async def handle(message: Message[bytes]) -> None: ...

    with pytest.raises(OptionError, match="handle: transform is a plain function"):
        Pipeline(Broker().open, handle, transform=later)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"handle: transform takes \(event\)"):
        Pipeline(Broker().open, handle, transform=lambda: None)  # type: ignore[arg-type,misc]


async def test_two_events_of_one_key_that_come_again_later_are_both_settled_and_come_in_order() -> None:
    broker = Broker()
    for body in ("1", "2"):
        broker.put(body, key="k")
    tries = 0

    def transform(event: Message[bytes]) -> Message[bytes]:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise RetryLater(1)
        return event

    handled: list[bytes] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.body)

    async with running(Pipeline(broker.open, handle, transform=transform, order_by="key"), broker):
        await broker.settled(2)
    assert handled == [b"1", b"2"]
