"""The contract of transports on who gets what: topics and patterns, groups, and where a new group begins."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from sluiceway.message import Outgoing, Settlement
from tests.transports.kit import MOMENT, Kit, bodies, numbered, waiting

pytestmark = pytest.mark.virtual_time


# -- topics and patterns -----------------------------------------------------------------------------------------


@pytest.mark.needs("wildcards")
@pytest.mark.parametrize(
    ("pattern", "wanted", "others"),
    [
        ("a.*", ["a.b", "a.c"], ["a", "a.b.c", "b.a"]),
        ("*", ["a", "b"], ["a.b"]),
        ("#", ["a", "a.b", "a.b.c"], ["a.dead"]),
        ("a.#", ["a", "a.b", "a.b.c"], ["b", "ab", "a.b.dead"]),
        ("#.z", ["z", "a.z", "a.b.z"], ["z.a"]),
        ("a.#.z", ["a.z", "a.b.z", "a.b.c.z"], ["a", "z"]),
        ("*.*.c", ["a.b.c"], ["b.c", "a.a.b.c"]),
        ("a.*", ["a.b"], ["a.dead"]),
        ("a.dead", ["a.dead"], ["a.b.dead", "a"]),
    ],
)
async def test_a_pattern_gets_what_it_matches(kit: Kit, pattern: str, wanted: list[str], others: list[str]) -> None:
    await kit.publish(wanted[0], b"before")
    source = await kit.open(pattern)
    for topic in [*wanted, *others]:
        await kit.publish(topic, topic.encode())
    got = await kit.get(source, 1 + len(wanted))
    assert bodies(got) == [b"before", *(topic.encode() for topic in wanted)]
    assert [message.topic for message in got[1:]] == wanted
    await kit.nothing(source)


@pytest.mark.needs("wildcards")
async def test_within_a_group_the_exact_topic_comes_before_a_pattern(kit: Kit) -> None:
    pattern, exact = await kit.open("a.*"), await kit.open("a.b")
    other_group = await kit.open("#", group="other")
    await kit.publish("a.b", b"exact")
    await kit.publish("a.c", b"pattern")
    assert bodies(await kit.get(exact, 1)) == [b"exact"]
    assert bodies(await kit.get(pattern, 1)) == [b"pattern"]
    assert bodies(await kit.get(other_group, 2)) == [b"exact", b"pattern"]
    await kit.nothing(pattern, exact)


@pytest.mark.needs("wildcards")
async def test_a_topic_that_two_patterns_of_one_subscription_match_comes_once(kit: Kit) -> None:
    source = await kit.open("a.*", "#", "a.b")
    await kit.publish("a.b", b"1")
    await kit.publish("a.c", b"2")
    assert sorted(bodies(await kit.get(source, 2))) == [b"1", b"2"]
    await kit.nothing(source)


async def test_a_source_of_several_topics_gets_all_of_them(kit: Kit) -> None:
    await kit.publish("a", b"1")
    source = await kit.open("a", "b.c", "d")
    for topic, body in [("d", b"2"), ("a", b"3"), ("b.c", b"4"), ("x", b"5")]:
        await kit.publish(topic, body)
    assert sorted(bodies(await kit.get(source, 4))) == [b"1", b"2", b"3", b"4"]
    await kit.nothing(source)


async def test_sources_with_overlapping_topics_share_what_both_want(kit: Kit) -> None:
    first, second = await kit.open("a", "both"), await kit.open("both", "b")
    await kit.publish("a", b"a")
    await kit.publish("b", b"b")
    await kit.publish("both", b"1", b"2")
    assert bodies([await kit.one(first)]) == [b"a"]
    assert bodies([await kit.one(second)]) == [b"b"]
    assert bodies([await kit.one(first), await kit.one(second)]) == [b"1", b"2"]
    await kit.nothing(first, second)


@pytest.mark.needs("wildcards")
async def test_ten_thousand_topics_are_nothing_special(kit: Kit) -> None:
    source = await kit.open("many.#")
    await kit.transport.publish([Outgoing(f"many.t{number}", b"%d" % number) for number in range(10_000)])
    messages = await kit.get(source, 10_000)
    assert bodies(messages) == numbered(10_000)
    assert messages[-1].topic == "many.t9999"
    assert not await source.settle(messages, [])


# -- groups ------------------------------------------------------------------------------------------------------


async def test_each_group_gets_every_message_once(kit: Kit) -> None:
    sources = [await kit.open("t", group=f"g{number}") for number in range(4)]
    await kit.publish("t", *numbered(10))
    for source in sources:
        messages = await kit.get(source, 10)
        assert bodies(messages) == numbered(10)
        await source.settle(messages, [])
    await kit.nothing(*sources)


async def test_the_members_of_a_group_share_its_messages(kit: Kit) -> None:
    first, second = await kit.open("t"), await kit.open("t", client=await kit.client())
    await kit.publish("t", *numbered(100))
    got = []
    for _ in range(10):
        for source in (first, second):
            got += await kit.get(source, 5)
    assert sorted(int(body) for body in bodies(got)) == list(range(100))
    await kit.nothing(first, second)


async def test_a_message_that_nobody_wants_yet_waits_for_the_first_group(kit: Kit) -> None:
    await kit.publish("t", *numbered(3))
    assert bodies(await kit.get(await kit.open("t"), 3)) == numbered(3)


async def test_a_group_exists_when_subscribe_returns(kit: Kit) -> None:
    source = await kit.open("t", start="latest")
    await source.aclose()
    await kit.publish("t", b"a")
    assert bodies(await kit.get(await kit.open("t", start="latest"), 1)) == [b"a"]


async def test_a_known_group_goes_on_where_it_was(kit: Kit) -> None:
    keeper = await kit.open("t", group="keeper")
    source = await kit.open("t")
    await kit.publish("t", *numbered(4))
    await source.settle(await kit.get(source, 2), [])
    await source.aclose()
    source = await kit.open("t", start="earliest")
    assert bodies(await kit.get(source, 2)) == [b"2", b"3"]
    await kit.nothing(source)
    assert bodies(await kit.get(keeper, 4)) == numbered(4)


async def test_a_new_group_from_the_earliest_gets_what_others_have_not_settled(kit: Kit) -> None:
    old = await kit.open("t", group="old")
    await kit.publish("t", *numbered(4))
    held, failed, *_ = await kit.get(old, 3)
    await old.settle([], [Settlement(failed, "retry", delay=MOMENT)])
    new = await kit.open("t", group="new", start="earliest")
    messages = await kit.get(new, 4)
    assert bodies(messages) == numbered(4)
    assert {(one.attempt, one.deliveries) for one in messages} == {(1, 1)}
    assert messages[0].id == held.id
    await new.settle(messages, [])
    assert not await old.settle([held], [])
    assert bodies(await kit.get(old, 2)) in ([b"1", b"3"], [b"3", b"1"])


async def test_a_new_group_from_the_latest_gets_only_what_comes(kit: Kit) -> None:
    await kit.publish("t", b"unwanted")
    await kit.open("t", group="old", start="latest")
    await kit.publish("t", b"before")
    new = await kit.open("t", group="new", start="latest")
    await kit.publish("t", b"after")
    assert bodies(await kit.get(new, 1)) == [b"after"]
    await kit.nothing(new)


async def test_a_new_group_from_a_time_gets_what_was_published_since(kit: Kit) -> None:
    since = datetime.now(UTC)
    for minutes in (-20, -10, 0, 10):
        await kit.publish("t", b"%d" % minutes, timestamp=(since + timedelta(minutes=minutes)).timestamp())
    source = await kit.open("t", start=since - timedelta(minutes=10))
    assert bodies(await kit.get(source, 3)) == [b"-10", b"0", b"10"]
    await kit.nothing(source)


async def test_a_message_for_one_group_reaches_no_other(kit: Kit) -> None:
    one, other = await kit.open("t", group="one"), await kit.open("t", group="other")
    await kit.publish("t", b"a", group="one")
    assert bodies(await kit.get(one, 1)) == [b"a"]
    late = await kit.open("t", group="late", start="earliest")
    await kit.nothing(one, other, late)


async def test_a_message_for_a_group_that_is_not_there_yet_waits_for_it(kit: Kit) -> None:
    other = await kit.open("t", group="other")
    await kit.publish("t", b"a", group="one")
    await kit.nothing(other)
    assert bodies(await kit.get(await kit.open("t", group="one"), 1)) == [b"a"]


@pytest.mark.needs("delay")
async def test_a_delayed_message_for_one_group_reaches_no_other(kit: Kit) -> None:
    one, other = await kit.open("t", group="one"), await kit.open("t", group="other")
    call = await waiting(one)
    await kit.publish("t", b"a", group="one", delay=MOMENT)
    assert bodies(await asyncio.wait_for(call, 5)) == [b"a"]
    await kit.nothing(other)
