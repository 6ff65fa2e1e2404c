"""How messages are received: by demand, and until a stop or a pause."""

from __future__ import annotations

import asyncio

import pytest

from ...message import Outgoing, Settlement
from ...source import Source
from .guarantees import guarantee
from .kit import Kit, bodies, numbered, start

# -- receiving ---------------------------------------------------------------------------------------------------


@guarantee("G1")
async def test_a_source_is_a_source(kit: Kit) -> None:
    source = await kit.open("t")
    assert isinstance(source, Source)
    assert source.lease is None or source.lease > 0


@guarantee("G1")
async def test_messages_come_in_the_order_of_publishing(kit: Kit) -> None:
    source = await kit.open("t")
    for body in numbered(20):
        await kit.publish("t", body)
    await kit.publish("t", *numbered(30))
    assert bodies(await kit.get(source, 50)) == numbered(20) + numbered(30)


@pytest.mark.parametrize("demand", [1, 2, 7, 100])
@guarantee("G1")
async def test_receive_returns_at_most_the_demand_and_at_least_one(kit: Kit, demand: int) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(20))
    got: list[bytes] = []
    while len(got) < 20:
        some = await source.receive(demand)
        assert 1 <= len(some) <= demand
        got += bodies(some)
    assert got == numbered(20)


@guarantee("G1")
async def test_an_empty_receive_waits_and_wakes_on_publish(kit: Kit) -> None:
    source = await kit.open("t")
    call = await kit.waiting(source)
    await kit.publish("t", b"hello")
    assert bodies(await kit.end(call)) == [b"hello"]


@guarantee("G1")
async def test_a_receive_wakes_when_another_client_publishes(kit: Kit) -> None:
    source = await kit.open("t")
    call = await kit.waiting(source)
    other = await kit.client()
    await other.publish([Outgoing("t", b"hello")])
    assert bodies(await kit.end(call)) == [b"hello"]


@guarantee("G1")
async def test_a_receive_wakes_when_another_source_releases(kit: Kit) -> None:
    first, second = await kit.open("t"), await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(first)
    call = await kit.waiting(second)
    await first.settle([], [Settlement(message, "release")])
    assert bodies(await kit.end(call)) == [b"a"]


@guarantee("G1")
async def test_every_waiting_source_wakes_when_there_is_enough(kit: Kit) -> None:
    calls = [await kit.waiting(await kit.open("t"), 1) for _ in range(4)]
    await kit.publish("t", *numbered(4))
    got = [await kit.end(call) for call in calls]
    assert sorted(body for messages in got for body in bodies(messages)) == numbered(4)


@guarantee("G1")
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


@guarantee("G1")
async def test_what_is_held_does_not_come_again(kit: Kit) -> None:
    first, second = await kit.open("t"), await kit.open("t")
    await kit.publish("t", *numbered(3))
    await kit.get(first, 3)
    await kit.nothing(first, second)


@guarantee("G1")
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


@guarantee("G5")
async def test_stop_ends_a_waiting_receive(kit: Kit) -> None:
    source = await kit.open("t")
    call = await kit.waiting(source)
    source.stop()
    assert await kit.end(call) == []
    assert source.status().state == "stopped"


@guarantee("G5")
async def test_after_stop_receive_returns_promptly_and_stop_is_idempotent(kit: Kit) -> None:
    source = await kit.open("t")
    source.stop()
    source.stop()
    assert await kit.end(start(source)) == []


@guarantee("G5")
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
@guarantee("G5")
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
    got = await kit.end(call)
    if publishing:
        await publishing
    assert not await source.settle(got, [])
    await source.aclose()
    rest = await kit.get(await kit.open("t"), 10 - len(got))
    assert kit.ordered(got + rest) == numbered(10)
    assert all(message.attempt == 1 and not message.suspect for message in rest)


@guarantee("G5")
async def test_stop_at_many_instants_of_many_receives_loses_nothing(kit: Kit) -> None:
    """While another client publishes, one source after another is stopped a little later than the one before."""
    await kit.make("t")
    other = await kit.client()

    async def publish() -> None:
        for number in range(120):
            await other.publish([Outgoing("t", b"%d" % number)])
            await asyncio.sleep(0.002)

    publishing = asyncio.create_task(publish())
    got: list[bytes] = []
    for instant in range(30):
        source = await kit.open("t")
        call = start(source, 3)
        await asyncio.sleep(instant / 5000)
        source.stop()
        messages = await kit.end(call)
        assert not await source.settle(messages, [])
        await source.aclose()
        got += bodies(messages)
    await publishing
    rest = await kit.get(await kit.open("t"), 120 - len(got))
    assert sorted(got + bodies(rest)) == sorted(numbered(120))


@guarantee("G5")
async def test_a_source_that_stops_leaves_the_messages_to_those_that_wait(kit: Kit) -> None:
    first, second = await kit.open("t"), await kit.open("t")
    calls = [await kit.waiting(first), await kit.waiting(second)]
    publishing = asyncio.create_task(kit.publish("t", b"a"))
    first.stop()
    await publishing
    got = [*await kit.end(calls[0])]
    if not got:
        got = await kit.end(calls[1])
    assert bodies(got) == [b"a"]


@guarantee("G1")
async def test_a_window_of_0_ends_a_waiting_receive_and_gives_back_what_it_has_not_returned(kit: Kit) -> None:
    source = await kit.open("t")
    call = await kit.waiting(source)
    source.resize(0)
    assert await kit.end(call) == []
    assert source.status().state == "paused"
    await kit.publish("t", *numbered(3))
    other = await kit.open("t")
    assert kit.ordered(await kit.get(other, 3)) == numbered(3)


@guarantee("G1")
async def test_a_paused_source_settles_and_goes_on_when_its_window_grows(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(4))
    messages = await kit.get(source, 2)
    source.resize(0)
    assert not await source.settle(messages, [])
    source.resize(100)
    assert source.status().state == "running"
    assert bodies(await kit.get(source, 2)) == [b"2", b"3"]
