"""Who gets what: groups, their members, and where a new group begins."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from ...message import Settlement
from .guarantees import guarantee
from .kit import Kit, bodies, numbered


@guarantee("groups")
async def test_each_group_gets_every_message_once(kit: Kit) -> None:
    sources = [await kit.open("t", group=f"g{number}") for number in range(4)]
    await kit.publish("t", *numbered(10))
    for source in sources:
        messages = await kit.get(source, 10)
        assert bodies(messages) == numbered(10)
        await source.settle(messages, [])
    await kit.nothing(*sources)


@guarantee("groups", needs="shares")
async def test_the_members_of_a_group_share_its_messages(kit: Kit) -> None:
    first, second = await kit.open("t"), await kit.open("t", client=await kit.client())
    await kit.publish("t", *numbered(100))
    got = []
    for _ in range(10):
        for source in (first, second):
            got += await kit.get(source, 5)
    assert sorted(bodies(got)) == sorted(numbered(100))
    await kit.nothing(first, second)


@guarantee("groups", needs="retains")
async def test_a_message_that_nobody_wants_yet_waits_for_the_first_group(kit: Kit) -> None:
    await kit.publish("t", *numbered(3))
    assert bodies(await kit.get(await kit.open("t"), 3)) == numbered(3)


@guarantee("groups")
async def test_a_group_exists_when_subscribe_returns(kit: Kit) -> None:
    source = await kit.open("t", start="latest")
    await source.aclose()
    await kit.publish("t", b"a")
    assert bodies(await kit.get(await kit.open("t", start="latest"), 1)) == [b"a"]


@guarantee("groups")
async def test_a_known_group_goes_on_where_it_was(kit: Kit) -> None:
    keeper = await kit.open("t", group="keeper")
    source = await kit.open("t")
    await kit.publish("t", *numbered(4))
    await source.settle(await kit.get(source, 2), [])
    await source.aclose()
    source = await kit.open("t")
    assert bodies(await kit.get(source, 2)) == [b"2", b"3"]
    await kit.nothing(source)
    assert bodies(await kit.get(keeper, 4)) == numbered(4)


@guarantee("groups", needs=("retains", "delay"))
async def test_a_new_group_from_the_earliest_gets_what_others_have_not_settled(kit: Kit) -> None:
    old = await kit.open("t", group="old")
    await kit.publish("t", *numbered(4))
    held, failed, *_ = await kit.get(old, 3)
    await old.settle([], [Settlement(failed, "retry", delay=kit.step)])
    new = await kit.open("t", group="new")
    messages = await kit.get(new, 4)
    assert bodies(messages) == numbered(4)
    assert {(one.attempt, one.deliveries) for one in messages} == {(1, 1)}
    assert messages[0].id == held.id
    await new.settle(messages, [])
    assert not await old.settle([held], [])
    assert bodies(await kit.get(old, 2)) in ([b"1", b"3"], [b"3", b"1"])


@guarantee("groups")
async def test_a_new_group_from_the_latest_gets_only_what_comes(kit: Kit) -> None:
    await kit.offer("t", b"unwanted")
    await kit.open("t", group="old", start="latest")
    await kit.publish("t", b"before")
    new = await kit.open("t", group="new", start="latest")
    await kit.publish("t", b"after")
    assert bodies(await kit.get(new, 1)) == [b"after"]
    await kit.nothing(new)


@guarantee("groups", needs="retains")
async def test_a_new_group_from_a_time_gets_what_was_published_since(kit: Kit) -> None:
    """By the message's own time, or by that at which the broker took it: here both say the same."""
    await kit.publish("t", b"old", timestamp=datetime.now(UTC).timestamp() - 600)
    if not kit.broker.virtual:
        await asyncio.sleep(0.05)
    since = datetime.now(UTC)
    await kit.publish("t", b"new", b"newer", timestamp=since.timestamp() + 0.001)
    source = await kit.open("t", start=since)
    assert bodies(await kit.get(source, 2)) == [b"new", b"newer"]
    await kit.nothing(source)


@guarantee("groups")
async def test_a_message_for_one_group_reaches_no_other(kit: Kit) -> None:
    one, other = await kit.open("t", group="one"), await kit.open("t", group="other")
    await kit.publish("t", b"a", group="one")
    assert bodies(await kit.get(one, 1)) == [b"a"]
    late = await kit.open("t", group="late")
    await kit.nothing(one, other, late)


@guarantee("groups", needs="retains")
async def test_a_message_for_a_group_that_is_not_there_yet_waits_for_it(kit: Kit) -> None:
    other = await kit.open("t", group="other")
    await kit.publish("t", b"a", group="one")
    await kit.nothing(other)
    assert bodies(await kit.get(await kit.open("t", group="one"), 1)) == [b"a"]


@guarantee("groups", needs="delay")
async def test_a_delayed_message_for_one_group_reaches_no_other(kit: Kit) -> None:
    one, other = await kit.open("t", group="one"), await kit.open("t", group="other")
    call = await kit.waiting(one)
    await kit.publish("t", b"a", group="one", delay=kit.step)
    assert bodies(await kit.end(call)) == [b"a"]
    await kit.nothing(other)
