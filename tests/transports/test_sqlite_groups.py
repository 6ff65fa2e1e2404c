"""Which queue a message is in when groups and patterns come one after the other."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from sluiceway.message import Outgoing, Settlement
from sluiceway.source import Subscription
from sluiceway.transports.sqlite import SQLiteTransport
from tests.transports.sqlite_kit import bodies, connected, get, numbered, publish, subscribe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


async def waits(transport: SQLiteTransport, *topics: str, group: str = "g") -> int:
    """How many messages wait for the group."""
    source = await subscribe(transport, *topics, group=group)
    backlog = await source.backlog()
    await source.aclose()
    assert backlog is not None
    return backlog.messages


async def test_the_first_group_gets_what_nobody_wanted_and_later_ones_what_is_left(path: Path) -> None:
    async with connected(path) as transport:
        await publish(transport, "a.b", *numbered(4))
        first = await subscribe(transport, "a.*", group="first")
        await first.settle((await get(first, 2))[:2], [])
        await transport.publish([Outgoing("a.b", b"only first", group="first")])
        second = await subscribe(transport, "a.#", group="second")
        assert bodies(await get(second, 2)) == [b"2", b"3"]
        assert bodies(await get(first, 3)) == [b"2", b"3", b"only first"]
        assert await waits(transport, "a.b", group="late") == 2


async def test_what_two_groups_have_yet_to_settle_is_one_message_for_a_third(path: Path) -> None:
    async with connected(path) as transport:
        for group in ("one", "two"):
            await subscribe(transport, "t", group=group)
        await publish(transport, "t", *numbered(3))
        await publish(transport, "t", b"later", delay=3600)
        third = await subscribe(transport, "t", group="three")
        assert bodies(await get(third, 3)) == numbered(3)
        backlog = await third.backlog()
        assert backlog is not None
        assert backlog.messages == 1


async def test_a_group_may_start_at_the_end_or_at_a_time(path: Path) -> None:
    async with connected(path) as transport:
        for hour in range(3):
            await publish(transport, "t", b"%d" % hour, timestamp=hour * 3600.0)
        latest = await subscribe(transport, "t", group="latest", start="latest")
        from_one = await subscribe(transport, "t", group="time", start=datetime.fromtimestamp(3600, UTC))
        await publish(transport, "t", b"new")
        assert bodies(await get(latest, 1)) == [b"new"]
        assert bodies(await get(from_one, 3)) == [b"1", b"2", b"new"]
        assert await waits(transport, "t", group="all") == 4


async def test_a_closer_match_takes_over_what_waits_under_a_pattern_and_what_comes_back(path: Path) -> None:
    async with connected(path) as transport:
        wide = await subscribe(transport, "a.#")
        await publish(transport, "a.b", *numbered(4))
        await publish(transport, "a.c", b"c")
        held, retried = await get(wide, 2)
        narrow = await subscribe(transport, "a.b")
        assert bodies(await get(narrow, 2)) == [b"2", b"3"]
        await wide.settle([], [Settlement(held, "release"), Settlement(retried, "retry")])
        again = await get(narrow, 2)
        assert [(message.body, message.attempt) for message in again] == [(b"0", 1), (b"1", 2)]
        assert bodies(await get(wide, 1)) == [b"c"]


async def test_what_a_closing_source_gives_back_goes_to_the_closer_match(path: Path) -> None:
    async with connected(path) as transport:
        wide = await subscribe(transport, "a.#")
        await publish(transport, "a.b", *numbered(3))
        await get(wide, 3)
        narrow = await subscribe(transport, "a.b")
        await wide.aclose()
        assert bodies(await get(narrow, 3)) == numbered(3)


async def test_a_message_for_a_group_that_has_not_subscribed_waits_for_its_first_match(path: Path) -> None:
    async with connected(path) as transport:
        await transport.publish([Outgoing("a.b", b"direct", group="g")])
        await publish(transport, "a.b", b"for all")
        other = await subscribe(transport, "a.b", group="other")
        assert bodies(await get(other, 1)) == [b"for all"]
        source = await subscribe(transport, "a.*")
        assert bodies(await get(source, 2)) == [b"direct", b"for all"]
        await publish(transport, "a.b", b"next")
        assert bodies(await get(source, 1)) == [b"next"]


async def test_a_group_that_renames_its_pattern_does_not_get_again_what_it_has_handled(path: Path) -> None:
    async with connected(path) as transport:
        await subscribe(transport, "t.a", group="slow")
        source = await subscribe(transport, "t.*")
        await publish(transport, "t.a", *numbered(3))
        await source.settle(await get(source, 2), [])
        await source.aclose()
        renamed = await subscribe(transport, "t.a")
        assert bodies(await get(renamed, 1)) == [b"2"]
        assert await waits(transport, "t.a") == 0


async def test_ensure_says_what_is_missing_and_makes_it(path: Path) -> None:
    async with connected(path) as transport:
        wanted = [Subscription(topics=("a", "b.*"), group="g", window=1)]
        missing = await transport.ensure(wanted, create=False)
        assert [finding.level for finding in missing] == ["error", "error"]
        assert missing[1].text == "group 'g' has no queue for topic 'b.*'; start once with create to make it"
        made = await transport.ensure(wanted, create=True)
        assert [finding.level for finding in made] == ["info", "info"]
        assert await transport.ensure(wanted, create=False) == []
        await publish(transport, "b.x", b"kept")
        assert bodies(await get(await subscribe(transport, "a", "b.*"), 1)) == [b"kept"]


async def test_a_source_of_several_topics_receives_in_the_order_of_publishing(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "a", "b", "c.#")
        for number in range(30):
            await publish(transport, ["a", "b", "c.d"][number % 3], b"%d" % number)
        first = await get(source, 10)
        await source.settle(first[5:], [Settlement(message, "release") for message in first[:5]])
        second = await get(source, 25)
        assert bodies(second) == [b"%d" % number for number in [*range(5), *range(10, 30)]]
        assert not await source.settle(second, [])
        assert await waits(transport, "a", "b", "c.#") == 0


async def test_removing_spares_what_a_consumer_has_in_hand(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(4))
        held = await get(source, 2)
        await source.settle([], [Settlement(held[0], "release")])
        stored = [one async for one in transport.browse("t")]
        assert bodies(stored) == numbered(4)
        assert bodies([one async for one in transport.browse("t", after=stored[1].position)]) == [b"2", b"3"]
        await transport.remove(stored)
        await transport.remove(stored)
        assert bodies([one async for one in transport.browse("t")]) == [b"1"]
        assert not await source.settle(held[1:], [])


async def test_browsing_goes_page_by_page_through_all(path: Path) -> None:
    async with connected(path) as transport:
        await publish(transport, "t.g.dead", *numbered(1201))
        await publish(transport, "u", b"other")
        assert bodies([one async for one in transport.browse("t.g.dead")]) == numbered(1201)


async def test_claims_of_two_sources_leave_no_trace_once_settled(path: Path) -> None:
    async with connected(path) as transport:
        one, two = await subscribe(transport, "t"), await subscribe(transport, "t")
        await publish(transport, "t", *numbered(600))
        for _ in range(150):
            for source in (one, two):
                await source.settle(await get(source, 2), [])
        rows = await transport._thread.run(lambda store: store.execute("SELECT * FROM claims").fetchall(), reads=True)
        assert len(rows) < 2 * 70
        assert await waits(transport, "t") == 0
