"""The contract of sources and settlements, for every transport: how messages are received and how deliveries end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sluiceway.message import Outgoing, Settlement
from sluiceway.source import Source
from tests.transports.kit import EARLY, MOMENT, Kit, bodies, now, numbered, start, waiting

pytestmark = pytest.mark.virtual_time


# -- receiving ---------------------------------------------------------------------------------------------------


async def test_a_source_is_a_source(kit: Kit) -> None:
    source = await kit.open("t")
    assert isinstance(source, Source)
    assert source.lease is None or source.lease > 0


async def test_messages_come_in_the_order_of_publishing(kit: Kit) -> None:
    source = await kit.open("t")
    for body in numbered(20):
        await kit.publish("t", body)
    await kit.publish("t", *numbered(30))
    assert bodies(await kit.get(source, 50)) == numbered(20) + numbered(30)


@pytest.mark.parametrize("demand", [1, 2, 7, 100])
async def test_receive_returns_at_most_the_demand_and_at_least_one(kit: Kit, demand: int) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(20))
    got: list[bytes] = []
    while len(got) < 20:
        some = await source.receive(demand)
        assert 1 <= len(some) <= demand
        got += bodies(some)
    assert got == numbered(20)


async def test_an_empty_receive_waits_and_wakes_on_publish(kit: Kit) -> None:
    source = await kit.open("t")
    call = await waiting(source)
    await kit.publish("t", b"hello")
    assert bodies(await asyncio.wait_for(call, 5)) == [b"hello"]


async def test_a_receive_wakes_when_another_client_publishes(kit: Kit) -> None:
    source = await kit.open("t")
    call = await waiting(source)
    other = await kit.client()
    await other.publish([Outgoing("t", b"hello")])
    assert bodies(await asyncio.wait_for(call, 5)) == [b"hello"]


async def test_a_receive_wakes_when_another_source_releases(kit: Kit) -> None:
    first, second = await kit.open("t"), await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(first)
    call = await waiting(second)
    await first.settle([], [Settlement(message, "release")])
    assert bodies(await asyncio.wait_for(call, 5)) == [b"a"]


async def test_every_waiting_source_wakes_when_there_is_enough(kit: Kit) -> None:
    calls = [await waiting(await kit.open("t"), 1) for _ in range(4)]
    await kit.publish("t", *numbered(4))
    got = await asyncio.wait_for(asyncio.gather(*calls), 5)
    assert sorted(body for messages in got for body in bodies(messages)) == numbered(4)


async def test_bytes_limit_one_receive_but_a_single_message_always_comes(kit: Kit) -> None:
    source = await kit.open("t", max_bytes=1000)
    await kit.publish("t", b"x" * 600, b"y" * 600, b"z" * 5000, b"end")
    sizes: list[int] = []
    while sum(sizes) < 4:
        messages = await source.receive(100)
        sizes.append(len(messages))
        assert sum(len(message.body) for message in messages[:-1]) < 1000
        await source.settle(messages, [])
    assert len(sizes) >= 2


async def test_what_is_held_does_not_come_again(kit: Kit) -> None:
    first, second = await kit.open("t"), await kit.open("t")
    await kit.publish("t", *numbered(3))
    await kit.get(first, 3)
    await kit.nothing(first, second)


async def test_the_status_says_how_many_are_held(kit: Kit) -> None:
    source = await kit.open("t")
    assert source.status().held_by_broker in (0, None)
    await kit.publish("t", *numbered(5))
    messages = await kit.get(source, 4)
    assert source.status().held_by_broker in (4, None)
    await source.settle(messages[:3], [])
    await source.flush()
    assert source.status().held_by_broker in (1, None)


# -- stop and pause ----------------------------------------------------------------------------------------------


async def test_stop_ends_a_waiting_receive(kit: Kit) -> None:
    source = await kit.open("t")
    call = await waiting(source)
    source.stop()
    assert await asyncio.wait_for(call, 5) == []
    assert source.status().state == "stopped"


async def test_after_stop_receive_returns_promptly_and_stop_is_idempotent(kit: Kit) -> None:
    source = await kit.open("t")
    source.stop()
    source.stop()
    assert len(await asyncio.wait_for(start(source), 5)) == 0


async def test_settling_goes_on_after_stop(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(2))
    ours, theirs = await kit.get(source, 2)
    source.stop()
    assert not await source.settle([ours], [Settlement(theirs, "release")])
    other = await kit.open("t")
    assert bodies(await kit.get(other, 1)) == [b"1"]
    await kit.nothing(other)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 50])
@pytest.mark.parametrize("how", ["before publish", "after publish", "messages wait"])
async def test_stop_during_receive_loses_nothing(kit: Kit, turns: int, how: str) -> None:
    """What is returned and what stays is all, each once, whenever the stop comes."""
    source = await kit.open("t")
    if how == "messages wait":
        await kit.publish("t", *numbered(10))
    call = start(source, 7)
    publishing = None
    if how == "before publish":
        publishing = asyncio.create_task(kit.publish("t", *numbered(10)))
    elif how == "after publish":
        await kit.publish("t", *numbered(10))
    for _ in range(turns):
        await asyncio.sleep(0)
    source.stop()
    got = await asyncio.wait_for(call, 5)
    if publishing:
        await publishing
    assert not await source.settle(got, [])
    await source.aclose()
    rest = await kit.get(await kit.open("t"), 10 - len(got))
    assert bodies(got) + bodies(rest) == numbered(10)
    assert all(message.attempt == 1 and not message.suspect for message in rest)


async def test_a_source_that_stops_leaves_the_messages_to_those_that_wait(kit: Kit) -> None:
    first, second = await kit.open("t"), await kit.open("t")
    calls = [await waiting(first), await waiting(second)]
    publishing = asyncio.create_task(kit.publish("t", b"a"))
    first.stop()
    await publishing
    got = [*await asyncio.wait_for(calls[0], 5)]
    if not got:
        got = await asyncio.wait_for(calls[1], 5)
    assert bodies(got) == [b"a"]


async def test_a_window_of_0_ends_a_waiting_receive_and_gives_back_what_it_has_not_returned(kit: Kit) -> None:
    source = await kit.open("t")
    call = await waiting(source)
    source.resize(0)
    assert await asyncio.wait_for(call, 5) == []
    assert source.status().state == "paused"
    await kit.publish("t", *numbered(3))
    other = await kit.open("t")
    assert bodies(await kit.get(other, 3)) == numbered(3)


async def test_a_paused_source_settles_and_goes_on_when_its_window_grows(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(4))
    messages = await kit.get(source, 2)
    source.resize(0)
    assert not await source.settle(messages, [])
    source.resize(100)
    assert source.status().state == "running"
    assert bodies(await kit.get(source, 2)) == [b"2", b"3"]


# -- settling ----------------------------------------------------------------------------------------------------


async def test_an_acked_message_never_comes_again(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(3))
    assert not await source.settle(await kit.get(source, 3), [])
    await source.flush()
    await kit.nothing(source)
    await source.aclose()
    await kit.nothing(await kit.open("t"))


async def test_acks_of_any_subset_leave_the_rest_held(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(10))
    messages = await kit.get(source, 10)
    await source.settle(messages[1::2], [])
    await source.aclose()
    assert bodies(await kit.get(await kit.open("t"), 5)) == numbered(10)[0::2]


async def test_a_counted_retry_is_the_same_message_with_one_failure_more(kit: Kit) -> None:
    source = await kit.open("t")
    (sent,) = await kit.publish("t", b"\x00body", key="k", headers={"a": "b"})
    for attempt in (1, 2, 3):
        message = await kit.one(source)
        assert (message.attempt, message.failures, message.suspect) == (attempt, attempt - 1, False)
        assert (message.id, message.body, message.key, dict(message.headers)) == (sent.id, b"\x00body", "k", {"a": "b"})
        assert (message.topic, message.timestamp) == ("t", sent.timestamp)
        assert not await source.settle([], [Settlement(message, "retry")])


async def test_an_uncounted_retry_counts_nothing(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    for _ in range(4):
        message = await kit.one(source)
        assert (message.attempt, message.deliveries, message.suspect) == (1, 1, False)
        assert not await source.settle([], [Settlement(message, "retry", counted=False)])


@pytest.mark.needs("delay")
@pytest.mark.parametrize("counted", [True, False])
async def test_a_retry_waits_for_its_delay_and_holds_nothing(kit: Kit, counted: bool) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(source)
    began = now()
    await source.settle([], [Settlement(message, "retry", delay=3 * MOMENT, counted=counted)])
    assert source.status().held_by_broker in (0, None)
    again = await kit.one(source)
    assert now() - began >= 3 * MOMENT - EARLY
    assert again.attempt == 1 + counted


@pytest.mark.needs("delay")
async def test_retries_come_when_each_is_due(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(3))
    messages = await kit.get(source, 3)
    delays = (3 * MOMENT, MOMENT, 2 * MOMENT)
    later = [Settlement(message, "retry", delay=delay) for message, delay in zip(messages, delays, strict=True)]
    began = now()
    await source.settle([], later)
    for _ in range(3):
        message = await kit.one(source)
        assert now() - began >= delays[int(message.body)] - EARLY
    await kit.nothing(source)


@pytest.mark.needs("delay")
async def test_a_waiting_retry_survives_its_source(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    await source.settle([], [Settlement(await kit.one(source), "retry", delay=MOMENT)])
    await source.aclose()
    assert (await kit.one(await kit.open("t"))).attempt == 2


async def test_a_retry_goes_to_the_group_that_failed_only(kit: Kit) -> None:
    failing, happy = await kit.open("t", group="failing"), await kit.open("t", group="happy")
    await kit.publish("t", b"a")
    await happy.settle([await kit.one(happy)], [])
    await failing.settle([], [Settlement(await kit.one(failing), "retry")])
    assert (await kit.one(failing)).attempt == 2
    await kit.nothing(happy)


@pytest.mark.needs("release")
async def test_a_released_message_comes_again_untouched_in_its_place(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(6))
    messages = await kit.get(source, 4)
    await source.settle([messages[1]], [Settlement(messages[index], "release") for index in (2, 0, 3)])
    again = await kit.get(source, 5)
    assert bodies(again) == [b"0", b"2", b"3", b"4", b"5"]
    assert all((one.attempt, one.deliveries, one.suspect) == (1, 1, False) for one in again)


@pytest.mark.needs("release", "delay")
async def test_a_release_with_a_delay_comes_again_untouched_when_it_is_due(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a", b"b")
    first, second = await kit.get(source, 2)
    began = now()
    await source.settle([second], [Settlement(first, "release", delay=3 * MOMENT)])
    message = await kit.one(source)
    assert now() - began >= 3 * MOMENT - EARLY
    assert (message.body, message.attempt, message.deliveries, message.suspect) == (b"a", 1, 1, False)


@pytest.mark.needs("release")
async def test_a_release_after_a_failure_keeps_the_count_of_failures(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    await source.settle([], [Settlement(await kit.one(source), "retry")])
    await source.settle([], [Settlement(await kit.one(source), "release")])
    message = await kit.one(source)
    assert (message.attempt, message.failures, message.suspect) == (2, 1, False)


async def test_a_dead_letter_ends_the_delivery_and_is_stored(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(source)
    letter = Outgoing("t.g.dead", message.body, message.key, {"why": "bad"}, message.id)
    assert not await source.settle([], [Settlement(message, "dead_letter", outputs=(letter,))])
    await kit.nothing(source)
    dead = await kit.one(await kit.open("t.g.dead"))
    assert (dead.body, dead.id, dict(dead.headers)) == (b"a", message.id, {"why": "bad"})


async def test_a_dead_letter_without_outputs_drops_the_message(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    assert not await source.settle([], [Settlement(await kit.one(source), "dead_letter")])
    await source.aclose()
    await kit.nothing(await kit.open("t"))


async def test_an_ack_publishes_its_outputs_in_order(kit: Kit) -> None:
    source, results = await kit.open("t"), await kit.open("results")
    await kit.publish("t", b"a")
    outputs = tuple(Outgoing("results", body) for body in numbered(5))
    call = await waiting(results)
    assert not await source.settle([], [Settlement(await kit.one(source), "ack", outputs=outputs)])
    got = await call
    assert bodies(got + await kit.get(results, 5 - len(got))) == numbered(5)
    await kit.nothing(source)


async def test_acks_and_settlements_go_in_one_call(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(5))
    acked, retried, dropped, released, kept = await kit.get(source, 5)
    others: list[Any] = [Settlement(retried, "retry"), Settlement(dropped, "dead_letter")]
    others.append(Settlement(released, "release"))
    assert not await source.settle([acked], others)
    assert {(one.body, one.attempt) for one in await kit.get(source, 2)} == {(b"1", 2), (b"3", 1)}
    await kit.nothing(source)
    assert not await source.settle([kept], [])


async def test_settling_nothing_is_harmless(kit: Kit) -> None:
    source = await kit.open("t")
    assert not await source.settle([], [])
    await source.flush()


async def test_settling_twice_is_harmless(kit: Kit) -> None:
    """The runtime settles again when a settle raised: whatever comes of it, nothing happens twice."""
    source = await kit.open("t")
    await kit.publish("t", *numbered(4))
    acked, retried, dead, other = await kit.get(source, 4)
    others = [
        Settlement(retried, "retry", delay=MOMENT),
        Settlement(dead, "dead_letter", outputs=(Outgoing("d", b"2"),)),
    ]
    for _ in range(2):
        refused = await source.settle([acked], others)
    assert all(one.kind == "lost" for one in refused)
    assert bodies([await kit.one(source)]) == [b"1"]
    await kit.nothing(source)
    if kit.transport.features.atomic:
        copies = await kit.open("d")
        await kit.one(copies)
        await kit.nothing(copies)
    assert not await source.settle([other], [])


async def test_what_the_broker_rejects_stays_ours_and_publishes_nothing(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(2))
    first, second = await kit.get(source, 2)
    huge = Outgoing("out", b"x" * (kit.transport.features.max_payload + 1))
    outputs = (Outgoing("out", b"fine"), huge)
    refused = await source.settle([], [Settlement(first, "ack", outputs=outputs), Settlement(second, "retry")])
    assert [(one.message, one.kind) for one in refused] == [(first, "rejected")]
    assert refused[0].detail
    assert (await kit.one(source)).body == b"1"
    await kit.nothing(await kit.open("out"))
    assert not await source.settle([first], [])
    await source.aclose()
    assert bodies(await kit.get(await kit.open("t"), 1)) == [b"1"]
