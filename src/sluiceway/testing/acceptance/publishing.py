"""Publishing: what goes in comes out, or is refused."""

from __future__ import annotations

import asyncio

import pytest

from ...errors import OptionError, PayloadTooLarge, PublishError, TransportError
from ...message import Outgoing, Settlement
from ...source import Subscription
from ...transport import Transport
from .guarantees import guarantee
from .kit import Kit, bodies, numbered

# -- the transport -----------------------------------------------------------------------------------------------


@guarantee("publish")
async def test_a_transport_is_a_transport(kit: Kit) -> None:
    assert isinstance(kit.transport, Transport)
    assert kit.features.max_payload > 0


@guarantee("publish")
async def test_connect_and_close_are_idempotent(kit: Kit) -> None:
    await kit.transport.connect()
    other = await kit.client()
    await other.connect()
    await other.aclose()
    await other.aclose()


@guarantee("publish")
async def test_ensure_makes_a_group_that_gets_what_is_published_before_it_subscribes(kit: Kit) -> None:
    subscription = Subscription(topics=("t",), group="g", window=10, start="latest")
    findings = await kit.transport.ensure([subscription], create=True)
    assert not [finding for finding in findings if finding.level == "error"]
    await kit.publish("t", b"a")
    assert bodies(await kit.get(await kit.open("t", start="latest"), 1)) == [b"a"]


@guarantee("publish")
async def test_ensure_without_create_makes_nothing(kit: Kit) -> None:
    subscription = Subscription(topics=("t",), group="g", window=10)
    await kit.transport.ensure([subscription], create=False)
    await kit.offer("t", b"a")
    await kit.nothing(await kit.open("t", start="latest"))


# -- what goes in comes out --------------------------------------------------------------------------------------

ODD = ["", "plain", "ünï çödé ✓ 漢字 🦀", "a\nb\tc\x00d", "quote\"'`\\", "x" * 2000, "key\udcff\udc80"]


@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff\xfe\x00\x01", bytes(range(256)), b'{"a": 1}', b"x" * 50_000])
@guarantee("publish")
async def test_a_body_comes_as_it_was_published(kit: Kit, body: bytes) -> None:
    source = await kit.open("t")
    await kit.publish("t", body)
    message = await kit.one(source)
    assert message.body == body
    assert type(message.body) is bytes


@pytest.mark.parametrize("key", [None, *ODD])
@guarantee("publish")
async def test_a_key_comes_as_it_was_published(kit: Kit, key: str | None) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a", key=key)
    assert (await kit.one(source)).key == key


@guarantee("publish")
async def test_headers_come_as_they_were_published(kit: Kit) -> None:
    source = await kit.open("t")
    headers = {f"{number}{text}": text for number, text in enumerate(ODD)}
    await kit.publish("t", b"a", headers=headers)
    assert dict((await kit.one(source)).headers) == headers


@guarantee("publish")
async def test_a_message_published_is_a_message_kept(kit: Kit) -> None:
    """What a publisher or a handler does to headers later changes nothing at the broker."""
    source, other = await kit.open("t"), await kit.open("t", group="other")
    headers = {"a": "b"}
    await kit.publish("t", b"a", headers=headers)
    headers["a"] = "changed"
    assert (await kit.one(source)).headers["a"] == "b"
    assert (await kit.one(other)).headers["a"] == "b"


@guarantee("publish")
async def test_id_and_timestamp_come_as_they_were_published(kit: Kit) -> None:
    source = await kit.open("t")
    sent = Outgoing("t", b"a", id="own id ✓", timestamp=1234567890.123456)
    await kit.transport.publish([sent])
    message = await kit.one(source)
    assert (message.id, message.timestamp) == ("own id ✓", 1234567890.123456)
    assert (message.attempt, message.deliveries, message.suspect) == (1, 1, False)


@guarantee("publish")
async def test_two_messages_with_one_id_are_two_messages(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a", b"b", id="same")
    first, second = await kit.get(source, 2)
    await source.settle([first], [Settlement(second, "retry")])
    assert (await kit.one(source)).body == b"b"


@guarantee("publish")
async def test_publishing_nothing_is_harmless(kit: Kit) -> None:
    await kit.transport.publish([])


@guarantee("publish")
async def test_a_body_of_the_largest_size_is_taken(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"x" * kit.features.max_payload)
    assert len((await kit.one(source)).body) == kit.features.max_payload


@guarantee("publish")
async def test_one_byte_more_is_refused_and_nothing_of_the_call_is_published(kit: Kit) -> None:
    source = await kit.open("t")
    huge = Outgoing("t", b"x" * (kit.features.max_payload + 1))
    with pytest.raises(PayloadTooLarge) as caught:
        await kit.transport.publish([Outgoing("t", b"a"), huge, Outgoing("t", b"b")])
    assert isinstance(caught.value, PublishError)
    assert huge in caught.value.failed
    await kit.nothing(source)


@pytest.mark.parametrize("topic", ["", "a..b", "a.*", "#", "a b", ".a"])
@guarantee("publish")
async def test_a_topic_that_cannot_be_is_refused_and_nothing_of_the_call_is_published(kit: Kit, topic: str) -> None:
    source = await kit.open("t")
    with pytest.raises((OptionError, TransportError)):
        await kit.transport.publish([Outgoing("t", b"a"), Outgoing(topic, b"b")])
    await kit.nothing(source)


@guarantee("publish")
async def test_a_subscription_to_what_cannot_be_a_topic_is_refused(kit: Kit) -> None:
    with pytest.raises((OptionError, TransportError)):
        await kit.open("a..b")


@guarantee("publish", lacks="retains")
async def test_what_no_group_wants_is_refused_and_said_to_be(kit: Kit) -> None:
    source = await kit.open("t")
    lost = Outgoing("nobody", b"lost")
    with pytest.raises(PublishError) as caught:
        await kit.transport.publish([Outgoing("t", b"a"), lost, Outgoing("t", b"b")])
    assert lost in caught.value.failed
    there = [body for body in (b"a", b"b") if body not in bodies(caught.value.failed)]
    assert sorted(bodies(await kit.get(source, len(there)))) == there
    await kit.nothing(source)


@guarantee("publish")
async def test_many_messages_of_one_call_come_all_and_in_order(kit: Kit) -> None:
    source = await kit.open("t", window=5_000)
    await kit.publish("t", *numbered(5_000))
    assert bodies(await kit.take(source, 5_000)) == numbered(5_000)


@guarantee("publish")
async def test_publishing_at_once_from_many_tasks_loses_nothing(kit: Kit) -> None:
    source, other = await kit.open("t"), await kit.client()
    clients = (kit.transport, other)
    await asyncio.gather(*(clients[number % 2].publish([Outgoing("t", b"%d" % number)]) for number in range(100)))
    assert sorted(bodies(await kit.get(source, 100))) == sorted(numbered(100))


@guarantee("publish", needs="delay")
async def test_a_delayed_message_comes_when_it_is_due(kit: Kit) -> None:
    source = await kit.open("t")
    began = kit.now()
    await kit.transport.publish([Outgoing("t", b"later", delay=3 * kit.step), Outgoing("t", b"now")])
    assert (await kit.one(source)).body == b"now"
    assert (await kit.one(source)).body == b"later"
    kit.passed(began, 3 * kit.step)
