"""The contract of transports, for each of them: publishing, and messages at rest."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from sluiceway.errors import OptionError, PayloadTooLarge, PublishError, TransportError
from sluiceway.message import Outgoing, Settlement, Stored
from sluiceway.source import Subscription
from sluiceway.transport import Transport
from tests.transports.kit import EARLY, MOMENT, Kit, bodies, now, numbered

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
    began = now()
    await kit.transport.publish([Outgoing("t", b"later", delay=3 * MOMENT), Outgoing("t", b"now")])
    assert (await kit.one(source)).body == b"now"
    assert (await kit.one(source)).body == b"later"
    assert now() - began >= 3 * MOMENT - EARLY


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
