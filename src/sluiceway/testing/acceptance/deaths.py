"""What happens when a source ends: in good order, by a lost lease, by the death of its process."""

from __future__ import annotations

import asyncio

import pytest

from ...message import Outgoing, Settlement
from ...source import Source
from .guarantees import guarantee
from .kit import Kit, bodies, numbered

# -- in good order -----------------------------------------------------------------------------------------------


@guarantee("G5", needs="release")
async def test_closing_gives_back_what_is_unsettled_uncounted_and_in_its_place(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(5))
    messages = await kit.get(source, 4)
    await source.settle([messages[1]], [])
    await source.aclose()
    await source.aclose()
    again = await kit.get(await kit.open("t"), 4)
    assert kit.ordered(again) == [b"0", b"2", b"3", b"4"]
    assert all((one.attempt, one.deliveries, one.suspect) == (1, 1, False) for one in again)


@guarantee("G5")
async def test_closing_wakes_those_that_wait_for_what_it_gives_back(kit: Kit) -> None:
    source, other = await kit.open("t"), await kit.open("t")
    await kit.publish("t", b"a")
    await kit.one(source)
    call = await kit.waiting(other)
    await source.aclose()
    assert bodies(await kit.end(call)) == [b"a"]


@guarantee("G5")
async def test_what_is_kept_at_closing_is_not_handed_out_again(kit: Kit) -> None:
    source, other = await kit.open("t"), await kit.open("t")
    await kit.publish("t", *numbered(3))
    messages = await kit.get(source, 3)
    await source.aclose(keep=[messages[1]])
    assert kit.ordered(await kit.get(other, 2)) == [b"0", b"2"]
    await kit.nothing(other)


@guarantee("G10", needs="lease")
async def test_what_is_kept_at_closing_comes_back_as_a_suspect_when_its_lease_ends(kit: Kit) -> None:
    source, other = await kit.open("t"), await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(source)
    await source.aclose(keep=[message])
    await kit.broker.expire(source)
    assert (await kit.one(other)).suspect


# -- a lost lease ------------------------------------------------------------------------------------------------


@guarantee("G10", needs="lease")
async def test_a_delivery_comes_back_when_its_lease_ends(kit: Kit) -> None:
    source, other = await kit.open("t"), await kit.open("t")
    await kit.publish("t", *numbered(3))
    messages = await kit.get(source, 3)
    await source.settle(messages[:1], [])
    await kit.broker.expire(source)
    again = await kit.get(other, 2)
    assert kit.ordered(again) == [b"1", b"2"]
    assert all(one.suspect for one in again)


@guarantee("G10", needs="lease")
async def test_settling_a_lost_delivery_is_refused_and_changes_nothing(kit: Kit) -> None:
    source, other, outputs = await kit.open("t"), await kit.open("t"), await kit.open("out")
    await kit.publish("t", *numbered(4))
    messages = await kit.get(source, 4)
    await kit.broker.expire(source)
    again = await kit.get(other, 4)
    others = [
        Settlement(messages[1], "retry"),
        Settlement(messages[2], "release"),
        Settlement(messages[3], "ack", outputs=(Outgoing("out", b"x"),)),
    ]
    refused = await source.settle(messages[:1], others)
    assert {(one.message.body, one.kind) for one in refused} == {(body, "lost") for body in numbered(4)}
    await kit.nothing(source, outputs)
    assert not await other.settle(again, [])


@guarantee("G10", needs="lease")
async def test_what_a_source_received_before_it_lost_it_settles_nothing_that_it_received_since(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    stale = await kit.one(source)
    await kit.broker.expire(source)
    fresh = await kit.one(source)
    assert [one.kind for one in await source.settle([stale], [])] == ["lost"]
    assert not await source.settle([fresh], [])


@guarantee("G10", needs="lease")
async def test_a_source_that_lost_some_still_settles_the_others(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"lost")
    lost = await kit.one(source)
    await kit.broker.expire(source)
    taken = await kit.one(await kit.open("t"))
    await kit.publish("t", b"ours")
    ours = await kit.one(source)
    assert [one.message for one in await source.settle([ours, lost], [])] == [lost]
    await source.aclose()
    rest = await kit.open("t")
    await kit.nothing(rest)
    assert taken.body == b"lost"


@guarantee("G10", needs="lease")
async def test_a_lease_that_is_renewed_does_not_end(kit: Kit) -> None:
    source, other = await kit.open("t"), await kit.open("t")
    if source.renewer is None or source.lease is None:
        pytest.skip("n/a: the source keeps its own leases")
    await kit.publish("t", *numbered(2))
    messages = await kit.get(source, 2)
    renewer = await asyncio.to_thread(source.renewer)
    for _ in range(8):
        await kit.nothing(other, seconds=source.lease / 4)
        assert not await asyncio.to_thread(renewer.renew, [message.token for message in messages])
    await asyncio.to_thread(renewer.close)
    assert not await source.settle(messages, [])


@guarantee("G10", needs="lease")
async def test_a_renewal_says_which_leases_are_lost(kit: Kit) -> None:
    source, other = await kit.open("t"), await kit.open("t")
    if source.renewer is None:
        pytest.skip("n/a: the source keeps its own leases")
    await kit.publish("t", b"a")
    message = await kit.one(source)
    await kit.broker.expire(source)
    await kit.one(other)
    renewer = await asyncio.to_thread(source.renewer)
    assert list(await asyncio.to_thread(renewer.renew, [message.token])) == [message.token]
    await asyncio.to_thread(renewer.close)


# -- the death of a process --------------------------------------------------------------------------------------


async def after_deaths(kit: Kit, deaths: int = 1) -> Source:
    """A source of a topic with one message, which processes have died with in hand."""
    await kit.make("t")
    await kit.publish("t", b"a")
    for _ in range(deaths):
        await kit.broker.die_holding("t", "g", 1)
    return await kit.open("t")


@guarantee("G6", "G7")
async def test_what_a_dead_process_held_comes_back_as_suspects_and_nothing_else_does(kit: Kit) -> None:
    await kit.make("t")
    await kit.publish("t", *numbered(5))
    await kit.broker.die_holding("t", "g", 3)
    messages = await kit.get(await kit.open("t"), 5)
    assert sorted(bodies(messages)) == numbered(5)
    assert {one.body for one in messages if one.suspect} == {b"0", b"1", b"2"}
    assert all(one.attempt == 1 for one in messages)


@guarantee("G7")
async def test_a_suspicion_written_counts_as_an_attempt_and_ends_with_a_retry(kit: Kit) -> None:
    source = await after_deaths(kit)
    message = await kit.one(source)
    assert (message.attempt, message.suspect) == (1, True)
    assert await source.suspect(message)
    assert (message.attempt, message.suspicions) == (2, 1)
    await source.settle([], [Settlement(message, "retry")])
    message = await kit.one(source)
    assert (message.attempt, message.failures, message.suspicions, message.suspect) == (2, 1, 0, False)


@pytest.mark.parametrize("counted", [True, False])
@guarantee("G7")
async def test_a_suspect_whose_handler_ended_is_no_suspect_any_more(kit: Kit, counted: bool) -> None:
    source = await after_deaths(kit)
    message = await kit.one(source)
    await source.settle([], [Settlement(message, "retry", counted=counted)])
    message = await kit.one(source)
    assert (message.failures, message.suspicions, message.suspect) == (int(counted), 0, False)


@pytest.mark.parametrize("deaths", [1, 2, 3])
@guarantee("G7")
async def test_the_deaths_that_had_a_message_in_hand_are_two_suspicions_at_most(kit: Kit, deaths: int) -> None:
    source = await after_deaths(kit, deaths)
    message = await kit.one(source)
    assert (message.attempt, message.deliveries, message.suspect) == (1, 1 + deaths, True)
    assert await source.suspect(message)
    assert message.suspicions == min(deaths, 2)
    await source.settle([], [Settlement(message, "release")])
    assert not (await kit.one(source)).suspect


@guarantee("G7")
async def test_a_suspicion_is_written_durably(kit: Kit) -> None:
    source = await after_deaths(kit)
    assert await source.suspect(await kit.one(source))
    await source.aclose()
    message = await kit.one(await kit.open("t"))
    assert (message.attempt, message.suspicions, message.suspect) == (2, 1, False)


@guarantee("G7", needs="release")
async def test_a_suspect_that_is_released_is_a_suspect_again(kit: Kit) -> None:
    source = await after_deaths(kit)
    for _ in range(3):
        message = await kit.one(source)
        assert (message.attempt, message.suspect) == (1, True)
        await source.settle([], [Settlement(message, "release")])


@guarantee("G7", needs=("release", "delay"))
async def test_a_suspect_that_is_released_for_a_while_keeps_its_suspicions(kit: Kit) -> None:
    source = await after_deaths(kit)
    assert await source.suspect(await kit.one(source))
    await source.aclose()
    await kit.broker.die_holding("t", "g", 1)
    source = await kit.open("t")
    for _ in range(2):
        message = await kit.one(source)
        assert (message.attempt, message.suspicions, message.suspect) == (2, 1, True)
        await source.settle([], [Settlement(message, "release", delay=kit.step)])


@guarantee("G7")
async def test_a_message_whose_every_process_dies_is_at_its_next_attempt_each_time(kit: Kit) -> None:
    await kit.make("t")
    await kit.publish("t", b"a")
    for attempt in (1, 2, 3):
        await kit.broker.die_holding("t", "g", 1)
        source = await kit.open("t")
        message = await kit.one(source)
        assert (message.attempt, message.suspect) == (attempt, True)
        assert await source.suspect(message)
        assert message.attempt == attempt + 1
        await source.settle([], [Settlement(message, "release")])
        await source.aclose()


@guarantee("G7", needs="lease")
async def test_a_suspicion_against_a_lost_delivery_is_not_written(kit: Kit) -> None:
    source, other = await kit.open("t"), await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(source)
    await kit.broker.expire(source)
    again = await kit.one(other)
    assert not await source.suspect(message)
    await other.settle([], [Settlement(again, "release")])
    assert (await kit.one(other)).suspicions == 0


@guarantee("G8")
async def test_failures_before_the_death_are_kept(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    await source.settle([], [Settlement(await kit.one(source), "retry")])
    await source.aclose()
    await kit.broker.die_holding("t", "g", 1)
    message = await kit.one(await kit.open("t"))
    assert (message.attempt, message.failures, message.suspect) == (2, 1, True)
