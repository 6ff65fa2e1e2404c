"""Who gets what: topics and patterns."""

from __future__ import annotations

import pytest

from ...message import Outgoing
from .guarantees import guarantee
from .kit import Kit, bodies, numbered

# -- topics and patterns -----------------------------------------------------------------------------------------


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
@guarantee("topics", needs="wildcards")
async def test_a_pattern_gets_what_it_matches(kit: Kit, pattern: str, wanted: list[str], others: list[str]) -> None:
    source = await kit.open(pattern)
    for topic in [*wanted, *others]:
        await kit.offer(topic, topic.encode())
    got = await kit.get(source, len(wanted))
    expected = [topic.encode() for topic in wanted]
    assert kit.ordered(got) == (expected if kit.features.order == "group" else sorted(expected))
    assert all(message.topic == message.body.decode() for message in got)
    await kit.nothing(source)


@guarantee("topics", needs=("wildcards", "retains"))
async def test_a_new_group_with_a_pattern_gets_what_is_there_and_what_comes(kit: Kit) -> None:
    await kit.publish("a.b", b"before")
    source = await kit.open("a.*")
    assert (await kit.one(source)).body == b"before"
    await kit.publish("a.c", b"after")
    assert (await kit.one(source)).body == b"after"
    await kit.nothing(source)


@guarantee("topics", needs="wildcards")
async def test_within_a_group_the_exact_topic_comes_before_a_pattern(kit: Kit) -> None:
    pattern, exact = await kit.open("a.*"), await kit.open("a.b")
    other_group = await kit.open("#", group="other")
    await kit.publish("a.b", b"exact")
    await kit.publish("a.c", b"pattern")
    assert bodies(await kit.get(exact, 1)) == [b"exact"]
    assert bodies(await kit.get(pattern, 1)) == [b"pattern"]
    assert kit.ordered(await kit.get(other_group, 2)) == [b"exact", b"pattern"]
    await kit.nothing(pattern, exact)


@guarantee("topics", needs="wildcards")
async def test_a_topic_that_two_patterns_of_one_subscription_match_comes_once(kit: Kit) -> None:
    source = await kit.open("a.*", "#", "a.b")
    await kit.publish("a.b", b"1")
    await kit.publish("a.c", b"2")
    assert sorted(bodies(await kit.get(source, 2))) == [b"1", b"2"]
    await kit.nothing(source)


@guarantee("topics")
async def test_a_source_of_several_topics_gets_all_of_them(kit: Kit) -> None:
    await kit.make("a")
    await kit.publish("a", b"1")
    source = await kit.open("a", "b.c", "d")
    for topic, body in [("d", b"2"), ("a", b"3"), ("b.c", b"4"), ("x", b"5")]:
        await kit.offer(topic, body)
    assert sorted(bodies(await kit.get(source, 4))) == [b"1", b"2", b"3", b"4"]
    await kit.nothing(source)


@guarantee("topics")
async def test_sources_with_overlapping_topics_share_what_both_want(kit: Kit) -> None:
    first, second = await kit.open("a", "both"), await kit.open("both", "b")
    await kit.publish("a", b"a")
    await kit.publish("b", b"b")
    assert bodies([await kit.one(first)]) == [b"a"]
    assert bodies([await kit.one(second)]) == [b"b"]
    await kit.publish("both", b"1", b"2")
    assert kit.ordered([await kit.one(first), await kit.one(second)]) == [b"1", b"2"]
    await kit.nothing(first, second)


@guarantee("topics", needs="wildcards", slow=True)
async def test_thousands_of_topics_are_nothing_special(kit: Kit) -> None:
    count = kit.broker.topics
    source = await kit.open("many.#", window=count)
    await kit.transport.publish([Outgoing(f"many.t{number}", b"%d" % number) for number in range(count)])
    messages = await kit.take(source, count)
    assert sorted(bodies(messages)) == sorted(numbered(count))
    assert all(message.topic == f"many.t{int(message.body)}" for message in messages)
