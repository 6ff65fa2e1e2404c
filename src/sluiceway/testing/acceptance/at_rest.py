"""Messages at rest: browse, remove, and what waits."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from ...message import Settlement, Stored
from .guarantees import guarantee
from .kit import Kit, bodies, numbered


async def all_of(kit: Kit, topic: str, after: str | None = None) -> list[Stored]:
    return [stored async for stored in kit.transport.browse(topic, after=after)]


@guarantee("at rest", needs="browse")
async def test_browse_shows_what_rests_in_a_topic_and_consumes_nothing(kit: Kit) -> None:
    (sent,) = await kit.publish("t.g.dead", b"\x00a", key="k", headers={"why": "✓"})
    await kit.publish("t.h.dead", b"other")
    for _ in range(2):
        (stored,) = await all_of(kit, "t.g.dead")
        assert (stored.topic, stored.body, stored.id, stored.key) == ("t.g.dead", b"\x00a", sent.id, "k")
        assert (dict(stored.headers), stored.timestamp) == ({"why": "✓"}, sent.timestamp)
    assert await all_of(kit, "nothing.g.dead") == []
    assert bodies(await kit.get(await kit.open("t.g.dead"), 1)) == [b"\x00a"]


@guarantee("at rest", needs="browse")
async def test_browse_goes_on_behind_a_position(kit: Kit) -> None:
    await kit.publish("t.g.dead", *numbered(25))
    seen: list[bytes] = []
    after: str | None = None
    while True:
        page: list[Stored] = []
        async for stored in kit.transport.browse("t.g.dead", after=after):
            page.append(stored)
            if len(page) == 10:
                break
        if not page:
            break
        seen += bodies(page)
        after = page[-1].position
    assert seen == numbered(25)


@guarantee("at rest", needs="browse")
async def test_remove_deletes_what_browse_showed_and_nothing_else(kit: Kit) -> None:
    await kit.publish("t.g.dead", *numbered(6))
    stored = await all_of(kit, "t.g.dead")
    await kit.transport.remove(stored[1:4])
    assert await kit.at_rest("t.g.dead") == [b"0", b"4", b"5"]
    await kit.transport.remove(stored[1:5])
    assert await kit.at_rest("t.g.dead") == [b"0", b"5"]
    assert bodies(await all_of(kit, "t.g.dead", after=stored[2].position)) == [b"5"]
    assert kit.ordered(await kit.get(await kit.open("t.g.dead"), 2)) == [b"0", b"5"]


@guarantee("at rest", needs="browse")
async def test_browse_shows_a_message_once_though_groups_have_not_settled_it(kit: Kit) -> None:
    subscribers: list[Any] = [await kit.open("t", group=group) for group in ("a", "b")]
    await kit.publish("t", *numbered(3))
    shown = await kit.at_rest("t")
    assert sorted(set(shown)) == numbered(3)
    for source in subscribers:
        assert bodies(await kit.get(source, 3)) == numbered(3)


@guarantee("at rest", needs="backlog")
async def test_the_backlog_is_what_waits_for_the_group(kit: Kit) -> None:
    source = await kit.open("t")
    backlog = await source.backlog()
    assert backlog is not None
    assert (backlog.messages, backlog.seconds) == (0, 0)
    await kit.publish("t", *numbered(5))
    await kit.offer("other", b"x")
    backlog = await source.backlog()
    assert backlog is not None
    assert backlog.messages == 5
    await source.settle(await kit.get(source, 3), [])
    backlog = await source.backlog()
    assert backlog is not None
    assert backlog.messages == 2


@guarantee("at rest", needs="backlog")
async def test_the_backlog_says_how_long_the_oldest_has_waited(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(2), timestamp=datetime.now(UTC).timestamp() - 60)
    backlog = await source.backlog()
    assert backlog is not None
    if not kit.broker.tells_age:
        assert (backlog.messages, backlog.seconds) == (2, None)
        pytest.skip("n/a: the broker does not tell how long the oldest message has waited, and the source says so")
    assert backlog.seconds is not None
    assert 60 <= backlog.seconds < 90


@guarantee("at rest", needs=("backlog", "delay"))
async def test_the_backlog_counts_what_waits_for_its_retry_but_not_its_age(kit: Kit) -> None:
    if not kit.broker.tells_delayed:
        pytest.skip("n/a: the broker does not tell what of a group waits for its delay")
    source = await kit.open("t")
    await kit.publish("t", b"a")
    await source.settle([], [Settlement(await kit.one(source), "retry", delay=3600)])
    backlog = await source.backlog()
    assert backlog is not None
    assert (backlog.messages, backlog.seconds) == (1, 0)
