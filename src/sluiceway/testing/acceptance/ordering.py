"""`order_by`: one key at a time, in order, over all sources of a group; and parking."""

from __future__ import annotations

import asyncio

from ...message import Settlement
from ...source import Source
from .guarantees import guarantee
from .kit import Kit, bodies, numbered, start


async def pair(kit: Kit) -> tuple[Source, Source]:
    """Two sources of one group, in order of keys."""
    return await kit.open("t", order_by="key"), await kit.open("t", order_by="key", client=await kit.client())


@guarantee("G9", needs="order")
async def test_one_source_gets_all_messages_of_a_key_in_order(kit: Kit) -> None:
    source = await kit.open("t", order_by="key")
    await kit.publish("t", *numbered(5), key="k")
    assert bodies(await kit.get(source, 5)) == numbered(5)


@guarantee("G9", needs="order=group")
async def test_a_key_held_by_one_source_is_not_handed_to_another(kit: Kit) -> None:
    first, second = await pair(kit)
    await kit.publish("t", *numbered(3), key="k")
    held = await kit.one(first)
    await kit.nothing(second)
    await first.settle([held], [])
    assert bodies(await kit.get(second, 2)) == [b"1", b"2"]
    await kit.nothing(first)


@guarantee("G9", needs="order=group")
async def test_a_waiting_source_wakes_when_the_key_is_free(kit: Kit) -> None:
    first, second = await pair(kit)
    await kit.publish("t", *numbered(2), key="k")
    held = await kit.one(first)
    call = await kit.waiting(second)
    await first.settle([held], [])
    assert bodies(await kit.end(call)) == [b"1"]


@guarantee("G9", needs="order=group")
async def test_other_keys_and_messages_without_a_key_flow(kit: Kit) -> None:
    first, second = await pair(kit)
    await kit.publish("t", b"held", key="k")
    await kit.one(first)
    await kit.publish("t", b"behind", key="k")
    await kit.publish("t", b"other", key="l")
    await kit.publish("t", b"a", b"b")
    assert bodies(await kit.get(second, 3)) == [b"other", b"a", b"b"]
    await kit.nothing(second)
    assert bodies(await kit.get(first, 1)) == [b"behind"]


@guarantee("G9", needs=("order=group", "delay"))
async def test_a_key_waits_for_the_retry_of_its_earlier_message(kit: Kit) -> None:
    first, second = await pair(kit)
    await kit.publish("t", *numbered(3), key="k")
    await kit.publish("t", b"other", key="l")
    failed = await kit.one(first)
    began = kit.now()
    await first.settle([], [Settlement(failed, "retry", delay=3 * kit.step)])
    assert bodies(await kit.get(second, 1)) == [b"other"]
    assert bodies(await kit.get(second, 3)) == numbered(3)
    kit.passed(began, 3 * kit.step)


@guarantee("G9", needs=("order=group", "release", "delay"))
async def test_a_key_waits_for_the_delayed_release_of_its_earlier_message(kit: Kit) -> None:
    first, second = await pair(kit)
    await kit.publish("t", *numbered(3), key="k")
    began = kit.now()
    await first.settle([], [Settlement(await kit.one(first), "release", delay=3 * kit.step)])
    assert bodies(await kit.get(second, 3)) == numbered(3)
    kit.passed(began, 3 * kit.step)


@guarantee("G9", needs=("order", "delay"))
async def test_the_retry_of_a_later_message_does_not_hold_up_an_earlier_one(kit: Kit) -> None:
    source = await kit.open("t", order_by="key")
    await kit.publish("t", *numbered(3), key="k")
    first, second = await kit.get(source, 2)
    await source.settle([], [Settlement(second, "retry", delay=3 * kit.step), Settlement(first, "release")])
    assert bodies(await kit.get(source, 3)) == numbered(3)


@guarantee("G9", needs="order")
async def test_a_retry_at_once_comes_before_later_messages_of_its_key(kit: Kit) -> None:
    source = await kit.open("t", order_by="key")
    await kit.publish("t", *numbered(3), key="k")
    await source.settle([], [Settlement(await kit.one(source), "retry")])
    assert bodies(await kit.get(source, 3)) == numbered(3)


@guarantee("G9", needs=("order=group", "release"))
async def test_released_messages_keep_their_order(kit: Kit) -> None:
    first, second = await pair(kit)
    await kit.publish("t", *numbered(4), key="k")
    messages = await kit.get(first, 3)
    await first.settle([], [Settlement(message, "release") for message in reversed(messages)])
    assert bodies(await kit.get(second, 4)) == numbered(4)


@guarantee("G9", needs=("order", "park"))
async def test_what_was_parked_reaches_a_consumer_that_has_no_order(kit: Kit) -> None:
    source = await kit.open("t", order_by="key")
    await kit.publish("t", b"a", key="k")
    await source.settle([], [Settlement(await kit.one(source), "park")])
    await source.aclose()
    assert bodies(await kit.get(await kit.open("t"), 1)) == [b"a"]


@guarantee("G9", needs="order=group")
async def test_closing_a_source_frees_its_keys_in_order(kit: Kit) -> None:
    first, second = await pair(kit)
    await kit.publish("t", *numbered(4), key="k")
    await kit.get(first, 2)
    call = await kit.waiting(second)
    await first.aclose()
    got = await kit.end(call)
    assert bodies(got + await kit.get(second, 4 - len(got))) == numbered(4)


@guarantee("G9", needs="order")
async def test_the_death_of_a_process_frees_its_keys_in_order(kit: Kit) -> None:
    source = await kit.open("t", order_by="key")
    await kit.publish("t", *numbered(4), key="k")
    held = await kit.get(source, 2)
    await kit.broker.expire(source)
    again = await kit.get(await kit.open("t", order_by="key"), 4)
    assert bodies(again) == numbered(4)
    assert all(one.suspect for one in again[:2])
    assert kit.broker.pushes_ahead or not any(one.suspect for one in again[2:])
    assert len(await source.settle(held, [])) == 2


@guarantee("G9", needs=("order", "park", "delay"))
async def test_a_parked_message_comes_after_the_retry_it_is_parked_behind(kit: Kit) -> None:
    source = await kit.open("t", order_by="key")
    await kit.publish("t", *numbered(4), key="k")
    failed, second, third = await kit.get(source, 3)
    began = kit.now()
    await source.settle([], [Settlement(failed, "retry", delay=3 * kit.step)])
    await source.settle([], [Settlement(third, "park"), Settlement(second, "park")])
    again = await kit.get(source, 4)
    kit.passed(began, 3 * kit.step)
    assert bodies(again) == numbered(4)
    assert [one.attempt for one in again] == [2, 1, 1, 1]
    assert not any(one.suspect for one in again)


@guarantee("G9", needs=("order", "park"))
async def test_a_parked_message_waits_until_the_earlier_one_in_hand_is_settled(kit: Kit) -> None:
    source = await kit.open("t", order_by="key")
    await kit.publish("t", *numbered(3), key="k")
    first, second = await kit.get(source, 2)
    await source.settle([], [Settlement(second, "park")])
    await kit.nothing(source)
    await source.settle([first], [])
    again = await kit.get(source, 2)
    assert bodies(again) == [b"1", b"2"]
    assert [(one.attempt, one.deliveries) for one in again] == [(1, 1), (1, 1)]


@guarantee("G9", needs=("order", "park"))
async def test_a_message_parked_behind_nothing_comes_again(kit: Kit) -> None:
    source = await kit.open("t", order_by="key")
    await kit.publish("t", *numbered(2), key="k")
    await source.settle([], [Settlement(await kit.one(source), "park")])
    assert bodies(await kit.get(source, 2)) == numbered(2)


@guarantee("G9", needs="order=group")
async def test_keys_stay_in_order_whatever_happens(kit: Kit) -> None:
    """Two sources settle in every way; at the end each key was acked in order and nothing is left."""
    sources = await pair(kit)
    keys = [f"key {number}" for number in range(5)]
    for number in range(60):
        await kit.publish("t", b"%d" % number, key=keys[number % 5])
    acked: dict[str | None, list[int]] = {key: [] for key in keys}
    step = 0
    while sum(map(len, acked.values())) < 60:
        for source in sources:
            call = start(source, 2)
            await asyncio.wait([call], timeout=kit.step / 10)
            source.resize(0)
            messages = await call
            source.resize(100)
            for message in messages[:1]:
                step += 1
                if step % 3 == 0:
                    await source.settle([], [Settlement(message, "release")])
                elif step % 4 == 0:
                    await source.settle([], [Settlement(message, "retry", counted=False)])
                else:
                    await source.settle([message], [])
                    acked[message.key].append(int(message.body))
            await source.settle([], [Settlement(message, "release") for message in messages[1:]])
    assert acked == {key: list(range(number, 60, 5)) for number, key in enumerate(keys)}
    await kit.nothing(*sources)
