"""Telemetry: listeners hear what they attached to, and harm nobody."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from sluiceway import OptionError
from sluiceway.telemetry import Event, PipelineStarted, Received, Settled, Telemetry

RECEIVED = Received(consumer="payments", demand=5, count=3, held=3, window=10)
SETTLED = Settled(consumer="payments", outcome="ack", count=3)


def test_a_listener_hears_the_events_it_named_in_the_order_of_attaching() -> None:
    heard: list[Any] = []
    telemetry = Telemetry()
    telemetry.attach(lambda event: heard.append(("first", event)), Received)
    telemetry.attach(lambda event: heard.append(("second", event)), Received, Settled)
    telemetry.emit(RECEIVED)
    telemetry.emit(SETTLED)
    assert heard == [("first", RECEIVED), ("second", RECEIVED), ("second", SETTLED)]


@pytest.mark.parametrize("named", [(), (Event,)], ids=["none named", "Event"])
def test_a_listener_that_names_no_event_hears_all(named: tuple[type[Event], ...]) -> None:
    heard: list[Any] = []
    telemetry = Telemetry()
    telemetry.attach(heard.append, *named)
    assert all(telemetry.wants(kind) for kind in Event.__subclasses__())
    telemetry.emit(RECEIVED)
    telemetry.emit(SETTLED)
    assert heard == [RECEIVED, SETTLED]


def test_nobody_wants_what_nobody_listens_to() -> None:
    telemetry = Telemetry()
    assert not telemetry.wants(Received)
    telemetry.emit(RECEIVED)
    heard: list[Any] = []
    telemetry.attach(heard.append, Received)
    assert telemetry.wants(Received)
    assert not telemetry.wants(PipelineStarted)
    telemetry.detach(heard.append)
    telemetry.detach(heard.append)
    assert not telemetry.wants(Received)


def test_a_listener_that_raises_is_detached_once_and_the_others_still_hear(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Any) -> None:
        raise ValueError("no")

    heard: list[Any] = []
    telemetry = Telemetry()
    telemetry.attach(broken, Received, Settled)
    telemetry.attach(heard.append, Received)
    with caplog.at_level(logging.ERROR):
        telemetry.emit(RECEIVED)
        telemetry.emit(RECEIVED)
        telemetry.emit(SETTLED)
    assert heard == [RECEIVED, RECEIVED]
    assert [one.getMessage() for one in caplog.records] == ["a telemetry listener raised on Received and is detached"]
    assert not telemetry.wants(Settled)


def test_what_attach_returns_detaches_only_that() -> None:
    heard: list[Any] = []
    telemetry = Telemetry()
    telemetry.attach(heard.append, Settled)
    attached = telemetry.attach(heard.append, Received)
    with telemetry.attach(heard.append, Received):
        telemetry.emit(RECEIVED)
    assert heard == [RECEIVED, RECEIVED]
    attached.detach()
    attached.detach()
    telemetry.emit(RECEIVED)
    telemetry.emit(SETTLED)
    assert heard == [RECEIVED, RECEIVED, SETTLED]


def test_a_listener_may_detach_itself_or_another_while_it_is_called() -> None:
    heard: list[str] = []
    telemetry = Telemetry()
    first = telemetry.attach(lambda event: (heard.append("first"), first.detach(), second.detach()), Received)
    second = telemetry.attach(lambda event: heard.append("second"), Received)
    telemetry.emit(RECEIVED)
    telemetry.emit(RECEIVED)
    assert heard == ["first"]


def test_whoever_watches_is_told_when_listeners_come_and_go() -> None:
    telemetry = Telemetry()
    seen: list[bool] = []

    def changed() -> None:
        seen.append(telemetry.wants(Settled, Received))

    telemetry.watch(changed)
    attached = telemetry.attach(lambda event: None, Received)
    attached.detach()
    telemetry.unwatch(changed)
    telemetry.unwatch(changed)
    telemetry.attach(lambda event: None)
    assert seen == [True, False]


def test_every_event_says_what_it_means_and_cannot_be_changed() -> None:
    for kind in Event.__subclasses__():
        assert kind.__doc__
        assert kind.__struct_config__.frozen


async def wait_for(event: Event) -> None: ...


@pytest.mark.parametrize("kind", ["Received", int, 3])
def test_only_events_can_be_listened_to(kind: Any) -> None:
    with pytest.raises(OptionError, match="name event classes"):
        Telemetry().attach(print, kind)


@pytest.mark.parametrize("listener", [3, wait_for])
def test_only_a_plain_function_can_listen(listener: Any) -> None:
    with pytest.raises(OptionError, match="a listener is a plain function"):
        Telemetry().attach(listener, Received)
