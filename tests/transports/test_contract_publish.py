"""The contract of transports, for each of them: publishing, topics, patterns, groups, and messages at rest."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sluiceway.errors import OptionError, PayloadTooLarge, PublishError, TransportError
from sluiceway.message import Outgoing, Settlement, Stored
from sluiceway.source import Subscription
from sluiceway.transport import Transport
from tests.transports.kit import MOMENT, Kit, bodies, numbered, waiting

pytestmark = pytest.mark.virtual_time


# -- the transport -----------------------------------------------------------------------------------------------


async def test_a_transport_is_a_transport(kit: Kit) -> None:
    assert isinstance(kit.transport, Transport)
    assert kit.transport.features.max_payload > 0


async def test_connect_and_close_are_idempotent(kit: Kit) -> None:
    await kit.transport.connect()
    other = await kit.client()
    await other.connect()
    await other.aclose()
    await other.aclose()


async def test_ensure_makes_a_group_that_gets_what_is_published_before_it_subscribes(kit: Kit) -> None:
    subscription = Subscription(topics=("t",), group="g", window=10, start="latest")
    findings = await kit.transport.ensure([subscription], create=True)
    assert not [finding for finding in findings if finding.level == "error"]
    await kit.publish("t", b"a")
    assert bodies(await kit.get(await kit.open("t", start="latest"), 1)) == [b"a"]


async def test_ensure_without_create_makes_nothing(kit: Kit) -> None:
    subscription = Subscription(topics=("t",), group="g", window=10)
    await kit.transport.ensure([subscription], create=False)
    await kit.publish("t", b"a")
    await kit.nothing(await kit.open("t", start="latest"))


# -- what goes in comes out --------------------------------------------------------------------------------------

ODD = ["", "plain", "ünï çödé ✓ 漢字 🦀", "a\nb\tc\x00d", "quote\"'`\\", "x" * 2000, "key\udcff\udc80"]


@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff\xfe\x00\x01", bytes(range(256)), b'{"a": 1}', b"x" * 50_000])
async def test_a_body_comes_as_it_was_published(kit: Kit, body: bytes) -> None:
    source = await kit.open("t")
    await kit.publish("t", body)
    message = await kit.one(source)
    assert message.body == body
    assert type(message.body) is bytes


@pytest.mark.parametrize("key", [None, *ODD])
async def test_a_key_comes_as_it_was_published(kit: Kit, key: str | None) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a", key=key)
    assert (await kit.one(source)).key == key


async def test_headers_come_as_they_were_published(kit: Kit) -> None:
    source = await kit.open("t")
    headers = {f"{number}{text}": text for number, text in enumerate(ODD)}
    await kit.publish("t", b"a", headers=headers)
    assert dict((await kit.one(source)).headers) == headers


async def test_a_message_published_is_a_message_kept(kit: Kit) -> None:
    """What a publisher or a handler does to headers later changes nothing at the broker."""
    source, other = await kit.open("t"), await kit.open("t", group="other")
    headers = {"a": "b"}
    await kit.publish("t", b"a", headers=headers)
    headers["a"] = "changed"
    assert (await kit.one(source)).headers["a"] == "b"
    assert (await kit.one(other)).headers["a"] == "b"


async def test_id_and_timestamp_come_as_they_were_published(kit: Kit) -> None:
    source = await kit.open("t")
    sent = Outgoing("t", b"a", id="own id ✓", timestamp=1234567890.123456)
    await kit.transport.publish([sent])
    message = await kit.one(source)
    assert (message.id, message.timestamp) == ("own id ✓", 1234567890.123456)
    assert (message.attempt, message.deliveries, message.suspect) == (1, 1, False)


async def test_two_messages_with_one_id_are_two_messages(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a", b"b", id="same")
    first, second = await kit.get(source, 2)
    await source.settle([first], [Settlement(second, "retry")])
    assert (await kit.one(source)).body == b"b"


async def test_publishing_nothing_is_harmless(kit: Kit) -> None:
    await kit.transport.publish([])


async def test_a_body_of_the_largest_size_is_taken(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"x" * kit.transport.features.max_payload)
    assert len((await kit.one(source)).body) == kit.transport.features.max_payload


async def test_one_byte_more_is_refused_and_nothing_of_the_call_is_published(kit: Kit) -> None:
    source = await kit.open("t")
    huge = Outgoing("t", b"x" * (kit.transport.features.max_payload + 1))
    with pytest.raises(PayloadTooLarge) as caught:
        await kit.transport.publish([Outgoing("t", b"a"), huge, Outgoing("t", b"b")])
    assert isinstance(caught.value, PublishError)
    assert huge in caught.value.failed
    await kit.nothing(source)


@pytest.mark.parametrize("topic", ["", "a..b", "a.*", "#", "a b", ".a"])
async def test_a_topic_that_cannot_be_is_refused_and_nothing_of_the_call_is_published(kit: Kit, topic: str) -> None:
    source = await kit.open("t")
    with pytest.raises((OptionError, TransportError)):
        await kit.transport.publish([Outgoing("t", b"a"), Outgoing(topic, b"b")])
    await kit.nothing(source)


async def test_a_subscription_to_what_cannot_be_a_topic_is_refused(kit: Kit) -> None:
    with pytest.raises((OptionError, TransportError)):
        await kit.open("a..b")


@pytest.mark.needs("delay")
async def test_a_delayed_message_comes_when_it_is_due(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"later", delay=3 * MOMENT)
    await kit.publish("t", b"now")
    began = asyncio.get_running_loop().time()
    assert (await kit.one(source)).body == b"now"
    await kit.nothing(source)
    assert (await kit.one(source)).body == b"later"
    assert asyncio.get_running_loop().time() - began >= 3 * MOMENT - 0.01


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


# -- messages at rest --------------------------------------------------------------------------------------------


async def all_of(kit: Kit, topic: str, after: str | None = None) -> list[Stored]:
    return [stored async for stored in kit.transport.browse(topic, after=after)]


@pytest.mark.needs("browse")
async def test_browse_shows_what_rests_in_a_topic_and_consumes_nothing(kit: Kit) -> None:
    (sent,) = await kit.publish("t.dead", b"\x00a", key="k", headers={"why": "✓"})
    await kit.publish("other.dead", b"other")
    for _ in range(2):
        (stored,) = await all_of(kit, "t.dead")
        assert (stored.topic, stored.body, stored.id, stored.key) == ("t.dead", b"\x00a", sent.id, "k")
        assert (dict(stored.headers), stored.timestamp) == ({"why": "✓"}, sent.timestamp)
    assert await all_of(kit, "nothing.here") == []
    assert bodies(await kit.get(await kit.open("t.dead"), 1)) == [b"\x00a"]


@pytest.mark.needs("browse")
async def test_browse_goes_on_behind_a_position(kit: Kit) -> None:
    await kit.publish("t.dead", *numbered(25))
    seen: list[bytes] = []
    after: str | None = None
    while True:
        page: list[Stored] = []
        async for stored in kit.transport.browse("t.dead", after=after):
            page.append(stored)
            if len(page) == 10:
                break
        if not page:
            break
        seen += bodies(page)
        after = page[-1].position
    assert seen == numbered(25)


@pytest.mark.needs("browse")
async def test_remove_deletes_what_browse_showed_and_nothing_else(kit: Kit) -> None:
    await kit.publish("t.dead", *numbered(6))
    stored = await all_of(kit, "t.dead")
    await kit.transport.remove(stored[1:4])
    assert await kit.at_rest("t.dead") == [b"0", b"4", b"5"]
    await kit.transport.remove(stored[1:5])
    assert await kit.at_rest("t.dead") == [b"0", b"5"]
    assert bodies(await all_of(kit, "t.dead", after=stored[2].position)) == [b"5"]
    assert bodies(await kit.get(await kit.open("t.dead"), 2)) == [b"0", b"5"]


@pytest.mark.needs("browse")
async def test_browse_shows_a_message_once_though_groups_have_not_settled_it(kit: Kit) -> None:
    subscribers: list[Any] = [await kit.open("t", group=group) for group in ("a", "b")]
    await kit.publish("t", *numbered(3))
    shown = await kit.at_rest("t")
    assert sorted(set(shown)) == numbered(3)
    for source in subscribers:
        assert bodies(await kit.get(source, 3)) == numbered(3)


@pytest.mark.needs("backlog")
async def test_the_backlog_is_what_waits_for_the_group(kit: Kit) -> None:
    source = await kit.open("t")
    backlog = await source.backlog()
    assert backlog is not None
    assert (backlog.messages, backlog.seconds) == (0, 0)
    await kit.publish("t", *numbered(5), timestamp=datetime.now(UTC).timestamp() - 60)
    await kit.publish("other", b"x")
    backlog = await source.backlog()
    assert backlog is not None
    assert backlog.messages == 5
    assert 60 <= backlog.seconds < 90
    await source.settle(await kit.get(source, 3), [])
    backlog = await source.backlog()
    assert backlog is not None
    assert backlog.messages == 2


@pytest.mark.needs("backlog", "delay")
async def test_the_backlog_counts_what_waits_for_its_retry_but_not_its_age(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    await source.settle([], [Settlement(await kit.one(source), "retry", delay=3600)])
    backlog = await source.backlog()
    assert backlog is not None
    assert (backlog.messages, backlog.seconds) == (1, 0)
