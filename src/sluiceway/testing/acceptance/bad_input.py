"""What comes from elsewhere: strangers' messages, poison headers, bodies that cannot be, and other versions of us."""

from __future__ import annotations

from typing import Any

import pytest

from ... import envelope
from ...message import Message, Outgoing, Settlement
from ...retry import Retry
from .guarantees import guarantee
from .kit import Kit, bodies, numbered

MOST_REASON = 8 * 1024  # bytes of a dead letter's reason

POISON = {
    "numbers": {envelope.FAILURES: b"many", envelope.SUSPICIONS: b"-7", envelope.TIME: b"yesterday"},
    "huge numbers": {envelope.FAILURES: b"9" * 400, envelope.TIME: b"1e999", envelope.V: b""},
    "no UTF-8": {"note": b"\xff\xfe", envelope.ID: b"\xff", envelope.KEY: b"\xc3"},
    "empty": {envelope.ID: b"", envelope.KEY: b"", envelope.GROUP: b"", "": b""},
}


@guarantee("G13")
async def test_what_cannot_be_decoded_is_dead_lettered_with_a_short_reason_and_the_rest_flows(kit: Kit) -> None:
    app, seen = kit.app(), list[Any]()

    @app.consumer("t", payload=dict[str, int], max_payload=50_000)
    async def handle(message: Message[dict[str, int]]) -> None:
        seen.append(message.payload)

    bad = [b"", b"\xff\xfe", b"[1, 2]", b'{"a": "b"}', b"{" * 20_000, b'{"a":' + b" " * 60_000 + b"1}"]
    async with app.running():
        await kit.publish("t", *bad, b'{"a": 1}')
        dead = await kit.open("t.g.dead")
        letters = await kit.take(dead, len(bad))
        await kit.until(lambda: seen, "the good one is handled")
    assert seen == [{"a": 1}]
    assert sorted(bodies(letters)) == sorted(bad)
    for letter in letters:
        why = "".join(value for name, value in letter.headers.items() if name.startswith("sluiceway-dead-"))
        assert 0 < len(why.encode()) <= MOST_REASON
    assert await kit.left("t") == []


@guarantee("G13")
async def test_a_failure_with_a_huge_text_is_dead_lettered_all_the_same(kit: Kit) -> None:
    app = kit.app()

    @app.consumer("t", retry=Retry(attempts=1))
    async def handle(message: Message[bytes]) -> None:
        raise ValueError("ünspeakable \x00 " * 10_000)

    async with app.running():
        await kit.publish("t", b"x" * kit.features.max_payload)
        (letter,) = await kit.take(await kit.open("t.g.dead"), 1)
    assert len(letter.body) == kit.features.max_payload
    assert await kit.left("t") == []


@guarantee("G13", "versions", hooks="publish_raw")
async def test_a_strangers_message_is_welcome(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.broker.publish_raw("t", b"\x00hello")
    await kit.broker.publish_raw("t", b"headed", {"colour": b"blue"})
    first, second = await kit.get(source, 2)
    assert (first.body, first.topic, first.attempt, first.suspect) == (b"\x00hello", "t", 1, False)
    assert second.headers.get("colour") == "blue"
    assert first.id
    assert first.id != second.id
    await source.settle([second], [Settlement(first, "retry")])
    again = await kit.one(source)
    assert (again.body, again.id, again.attempt) == (b"\x00hello", first.id, 2)
    assert not await source.settle([again], [])


@guarantee("G13", hooks="publish_raw")
async def test_a_strangers_empty_id_is_none_so_that_no_two_messages_share_one(kit: Kit) -> None:
    source = await kit.open("t")
    for body in (b"a", b"b"):
        await kit.broker.publish_raw("t", body, {envelope.ID: b""})
    first, second = await kit.get(source, 2)
    assert first.id
    assert second.id
    assert first.id != second.id


@pytest.mark.parametrize("kind", POISON)
@guarantee("G13", hooks="publish_raw")
async def test_headers_that_cannot_be_read_wedge_nothing(kit: Kit, kind: str) -> None:
    app, seen = kit.app(), list[bytes]()

    @app.consumer("t", retry=Retry(attempts=2, base_delay=kit.step))
    async def handle(message: Message[bytes]) -> None:
        if message.body == b"bad" and message.attempt == 1:
            raise ValueError("so that it goes round once")
        seen.append(message.body)

    async with app.running() as manager:
        await kit.broker.publish_raw("t", b"bad", POISON[kind])
        await kit.publish("t", *numbered(5))
        await kit.until(lambda: set(seen) >= set(numbered(5)), "the good ones are handled")
        await kit.until(lambda: not manager.stats()[0].held, "nothing is in hand")
        dead = await kit.at_rest("t.g.dead") if kit.features.browse else []
        if not dead and envelope.GROUP not in POISON[kind]:
            await kit.until(lambda: b"bad" in seen, "it is handled, if it is not dead-lettered")
    assert await kit.left("t") == []


# -- other versions --------------------------------------------------------------------------------------------------


@guarantee("versions", hooks="publish_raw")
async def test_a_message_of_a_newer_version_is_dead_lettered_as_it_was(kit: Kit) -> None:
    app, seen = kit.app(), list[bytes]()

    @app.consumer("t")
    async def handle(message: Message[bytes]) -> None:
        seen.append(message.body)

    newer = {envelope.V: b"2", envelope.ID: b"theirs", "sluiceway-hop": b"7", "own": b"header"}
    async with app.running():
        await kit.broker.publish_raw("t", b"newer", newer)
        await kit.publish("t", b"ours")
        (letter,) = await kit.take(await kit.open("t.g.dead"), 1)
        await kit.until(lambda: seen, "ours is handled")
    assert seen == [b"ours"]
    assert (letter.body, letter.id) == (b"newer", "theirs")
    assert "version 2" in letter.headers["sluiceway-dead-error"]
    assert letter.headers["own"] == "header"
    assert letter.headers["sluiceway-hop"] == "7"
    assert await kit.left("t") == []


@guarantee("versions", hooks="publish_raw")
async def test_headers_that_a_newer_version_added_pass_through_retries_and_dead_letters(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.broker.publish_raw("t", b"a", {envelope.V: b"1", envelope.ID: b"theirs", "sluiceway-hop": b"7"})
    await source.settle([], [Settlement(await kit.one(source), "retry", delay=kit.step)])
    message = await kit.one(source)
    assert (message.id, message.attempt, message.headers["sluiceway-hop"]) == ("theirs", 2, "7")
    letter = Outgoing("t.g.dead", message.body, message.key, message.headers, message.id)
    assert not await source.settle([], [Settlement(message, "dead_letter", outputs=(letter,))])
    dead = await kit.one(await kit.open("t.g.dead"))
    assert (dead.id, dead.headers["sluiceway-hop"]) == ("theirs", "7")


@guarantee("versions")
async def test_headers_with_our_prefix_that_we_do_not_know_are_the_users(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a", headers={"sluiceway-hop": "7", "sluiceway-": "x"})
    await source.settle([], [Settlement(await kit.one(source), "retry")])
    message = await kit.one(source)
    assert dict(message.headers) == {"sluiceway-hop": "7", "sluiceway-": "x"}
