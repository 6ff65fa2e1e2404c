"""What is the in-memory transport's own, beside the contract that all transports share."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluiceway.errors import OptionError, TransportError
from sluiceway.message import Message, Outgoing, Settlement
from sluiceway.source import Subscription
from sluiceway.testing import run
from sluiceway.testing.acceptance.kit import bodies, numbered, start
from sluiceway.transports.memory import MemorySource, MemoryTransport

pytestmark = pytest.mark.virtual_time


@pytest.fixture
def transport() -> MemoryTransport:
    return MemoryTransport()


@pytest.fixture
def name() -> Iterator[str]:
    yield "a name of this test"
    MemoryTransport._named.clear()


async def subscribe(transport: MemoryTransport, *topics: str, group: str = "g", **options: object) -> MemorySource:
    return await transport.subscribe(Subscription(topics=topics, group=group, window=1000, **options))  # type: ignore[arg-type]


async def publish(transport: MemoryTransport, topic: str, *contents: bytes, **fields: object) -> None:
    await transport.publish([Outgoing(topic, body, **fields) for body in contents])  # type: ignore[arg-type]


async def drain(source: MemorySource) -> list[Message[object]]:
    """All that can be received without waiting."""
    messages: list[Message[object]] = []
    while some := await take(source, 1000):
        messages += some
    return messages


async def take(source: MemorySource, demand: int) -> list[Message[object]]:
    """What one receive gets without waiting."""
    call = start(source, demand)
    await asyncio.sleep(0)
    source.resize(0)
    messages = await call
    source.resize(1000)
    return messages


# -- making one --------------------------------------------------------------------------------------------------


def test_a_url_with_a_name_is_shared_and_one_without_is_new(name: str) -> None:
    assert MemoryTransport.from_url(f"memory://{name}") is MemoryTransport.named(name)
    assert MemoryTransport.from_url("memory://") is not MemoryTransport.from_url("memory://")
    assert MemoryTransport.named("other") is not MemoryTransport.named(name)


@pytest.mark.parametrize("url", ["redis://x", "memory", "memory:x"])
def test_another_url_is_refused_and_the_error_says_what_is_allowed(url: str) -> None:
    with pytest.raises(OptionError, match=f"must be memory:// or memory://name, got '{url}'"):
        MemoryTransport.from_url(url)


@pytest.mark.parametrize("option", ["lease", "max_payload"])
def test_an_option_that_cannot_be_is_refused(option: str) -> None:
    with pytest.raises(OptionError, match=f"MemoryTransport: {option} must be .*, got 0"):
        MemoryTransport(**{option: 0})


async def test_a_subscription_without_topics_is_refused(transport: MemoryTransport) -> None:
    with pytest.raises(OptionError, match="at least one topic"):
        await subscribe(transport)


# -- leases ------------------------------------------------------------------------------------------------------


async def test_a_dropped_source_gives_back_what_it_held_when_its_lease_has_passed(transport: MemoryTransport) -> None:
    source, other = await subscribe(transport, "t"), await subscribe(transport, "t")
    await publish(transport, "t", b"a")
    await source.receive(1)
    del source
    gc.collect()
    began = asyncio.get_running_loop().time()
    (message,) = await other.receive(1)
    assert message.suspect
    assert asyncio.get_running_loop().time() - began == pytest.approx(30)


async def test_a_source_that_lives_keeps_its_deliveries_for_ever(transport: MemoryTransport) -> None:
    source, other = await subscribe(transport, "t"), await subscribe(transport, "t")
    await publish(transport, "t", b"a")
    held = await source.receive(1)
    call = start(other)
    await asyncio.sleep(7 * 24 * 3600)
    assert not call.done()
    assert not await source.settle(held, [])
    other.stop()
    assert await call == []


async def test_what_is_kept_at_closing_can_be_settled_until_its_lease_ends(transport: MemoryTransport) -> None:
    source, other = await subscribe(transport, "t"), await subscribe(transport, "t")
    await publish(transport, "t", b"a", b"b")
    first, second = await source.receive(2)
    await source.aclose(keep=[first, second])
    assert transport.held("g") == 2
    await asyncio.sleep(29)
    assert not await source.settle([first], [])
    (again,) = await other.receive(10)
    assert (again.body, again.suspect) == (b"b", True)
    assert [one.kind for one in await source.settle([second], [])] == ["lost"]


async def test_a_crashed_source_receives_and_settles_nothing_more(transport: MemoryTransport) -> None:
    source = await subscribe(transport, "t")
    await publish(transport, "t", b"a")
    held = await source.receive(1)
    call = start(source)
    await asyncio.sleep(0)
    transport.crash(source)
    assert await call == []
    assert await source.receive(1) == []
    assert [one.kind for one in await source.settle(held, [])] == ["lost"]


async def test_the_transport_counts_what_a_group_holds(transport: MemoryTransport) -> None:
    first, second = await subscribe(transport, "t"), await subscribe(transport, "t")
    await publish(transport, "t", *numbered(5))
    await first.receive(3)
    messages = await second.receive(2)
    assert (transport.held("g"), transport.held("nobody")) == (5, 0)
    await second.settle(messages, [])
    assert transport.held("g") == 3


# -- loops -------------------------------------------------------------------------------------------------------


def test_messages_outlive_the_loop_and_what_its_sources_held_comes_back() -> None:
    transport = MemoryTransport()

    async def first() -> MemorySource:
        source = await subscribe(transport, "t")
        await publish(transport, "t", b"a", b"b")
        held = await source.receive(1)
        await publish(transport, "t", b"later", delay=100)
        await source.settle([], [Settlement(held[0], "retry", delay=50)])
        assert bodies(await source.receive(1)) == [b"b"]
        return source

    async def second() -> list[bytes]:
        source = await subscribe(transport, "t")
        return [(await source.receive(1))[0].body for _ in range(3)]

    abandoned = run(first())
    assert run(second()) == [b"b", b"a", b"later"]
    assert abandoned.status().held_by_broker == 0


async def test_a_publish_from_another_thread_is_handed_over(transport: MemoryTransport) -> None:
    source = await subscribe(transport, "t")
    call = start(source)
    await asyncio.sleep(0)
    await asyncio.to_thread(lambda: asyncio.run(publish(transport, "t", b"a")))
    assert bodies(await call) == [b"a"]


async def test_a_source_in_a_second_running_loop_is_refused(transport: MemoryTransport) -> None:
    await subscribe(transport, "t")
    with pytest.raises(TransportError, match="another running event loop"):
        await asyncio.to_thread(lambda: asyncio.run(subscribe(transport, "t")))


async def test_a_waiting_receive_returns_in_the_turn_after_the_publish(transport: MemoryTransport) -> None:
    source = await subscribe(transport, "t")
    call = start(source)
    await asyncio.sleep(0)
    await publish(transport, "t", b"a")
    await asyncio.sleep(0)
    assert call.done()


async def test_a_cancelled_receive_passes_its_wake_up_on(transport: MemoryTransport) -> None:
    first, second = await subscribe(transport, "t"), await subscribe(transport, "t")
    calls = [start(first), start(second)]
    await asyncio.sleep(0)
    await publish(transport, "t", b"a")
    calls[0].cancel()
    assert bodies(await calls[1]) == [b"a"]
    assert calls[0].cancelled()


async def test_nothing_of_a_settled_message_remains(transport: MemoryTransport) -> None:
    source = await subscribe(transport, "t", order_by="key")
    for number in range(100):
        await publish(transport, "t", b"a", key=f"k{number}")
    messages = await source.receive(100)
    await source.settle(messages[50:], [Settlement(message, "retry", delay=1) for message in messages[:50]])
    await asyncio.sleep(2)
    await source.settle(await source.receive(100), [])
    (queue,) = source.hold.queues
    assert not any((queue._lanes, queue.ready, queue.back, queue.sleepers, source.hold.held))  # type: ignore[attr-defined]


def test_an_entry_has_the_order_of_the_fields_of_a_message() -> None:
    fields = "topic body id key headers timestamp scope token deliveries failures suspicions suspect"
    assert Message.__struct_fields__[:12] == tuple(fields.split())


# -- subscriptions that come later -------------------------------------------------------------------------------


async def test_messages_move_when_a_better_subscription_comes(transport: MemoryTransport) -> None:
    pattern = await subscribe(transport, "a.*")
    await publish(transport, "a.b", *numbered(3))
    await publish(transport, "a.c", b"c")
    held = await pattern.receive(1)
    exact = await subscribe(transport, "a.b")
    await publish(transport, "a.b", b"3")
    assert bodies(await drain(exact)) == [b"1", b"2", b"3"]
    assert bodies(await drain(pattern)) == [b"c"]
    await pattern.settle([], [Settlement(held[0], "retry")])
    assert [(one.body, one.attempt) for one in await drain(exact)] == [(b"0", 2)]


async def test_a_subscription_waits_for_its_source_to_come_back(transport: MemoryTransport) -> None:
    exact = await subscribe(transport, "a.b")
    pattern = await subscribe(transport, "a.*")
    await exact.aclose()
    await publish(transport, "a.b", b"a")
    assert await drain(pattern) == []
    assert bodies(await drain(await subscribe(transport, "a.b"))) == [b"a"]


async def test_a_waiting_source_goes_on_when_subscriptions_change(transport: MemoryTransport) -> None:
    source = await subscribe(transport, "a", "b")
    call = start(source)
    await asyncio.sleep(0)
    await subscribe(transport, "b", "c")
    await asyncio.sleep(0)
    await publish(transport, "a", b"1")
    assert bodies(await call) == [b"1"]


async def test_a_new_topic_of_a_known_group_gets_what_waits_there(transport: MemoryTransport) -> None:
    await publish(transport, "b", b"unwanted")
    await subscribe(transport, "a")
    other = await subscribe(transport, "b", group="other")
    await publish(transport, "b", b"theirs")
    source = await subscribe(transport, "b")
    assert bodies(await drain(source)) == [b"unwanted", b"theirs"]
    assert bodies(await drain(other)) == [b"unwanted", b"theirs"]


async def test_order_by_takes_hold_of_what_is_held_delayed_and_waiting(transport: MemoryTransport) -> None:
    plain = await subscribe(transport, "t")
    for key in "kl":
        await publish(transport, "t", *numbered(3), key=key)
    messages = await plain.receive(6)
    by_key = {(message.key, message.body): message for message in messages}
    first = by_key["k", b"0"]
    later = [Settlement(by_key["l", b"0"], "retry", delay=60)]
    rest = [message for message in messages if message is not first and message is not later[0].message]
    await plain.settle([], later + [Settlement(message, "release") for message in rest])
    ordered = await subscribe(transport, "t", order_by="key")
    assert await drain(ordered) == []
    await plain.settle([first], [])
    assert [(one.key, one.body) for one in await drain(ordered)] == [("k", b"1"), ("k", b"2")]
    await asyncio.sleep(61)
    assert [(one.key, one.body) for one in await drain(ordered)] == [("l", b"0"), ("l", b"1"), ("l", b"2")]


async def test_parking_works_without_order_by(transport: MemoryTransport) -> None:
    source = await subscribe(transport, "t")
    await publish(transport, "t", *numbered(2), key="k")
    await publish(transport, "t", b"no key")
    first, second, third = await source.receive(3)
    await source.settle([], [Settlement(second, "park"), Settlement(third, "park")])
    assert bodies(await drain(source)) == [b"no key"]
    await source.settle([first], [])
    assert bodies(await drain(source)) == [b"1"]


async def test_removing_a_delayed_message_frees_its_key(transport: MemoryTransport) -> None:
    source = await subscribe(transport, "t", order_by="key")
    await publish(transport, "t", *numbered(2), key="k")
    (first,) = await source.receive(1)
    await source.settle([], [Settlement(first, "retry", delay=3600)])
    assert await drain(source) == []
    await transport.remove([stored async for stored in transport.browse("t") if stored.body == b"0"])
    assert bodies(await drain(source)) == [b"1"]


# -- whatever happens --------------------------------------------------------------------------------------------

MOVES = ["publish", "receive", "ack", "retry", "later", "uncounted", "release", "park", "wait", "expire"]


@settings(max_examples=150, deadline=None)
@given(
    ordered=st.booleans(),
    moves=st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 1), st.integers(0, 9)), max_size=80),
)
def test_nothing_is_lost_or_doubled_whatever_two_sources_do(ordered: bool, moves: list[tuple[str, int, int]]) -> None:
    run(_play(ordered, moves))


async def _play(ordered: bool, moves: list[tuple[str, int, int]]) -> None:
    transport = MemoryTransport()
    order = {"order_by": "key"} if ordered else {}
    sources = [await subscribe(transport, "t", **order) for _ in range(2)]
    held: list[list[Message[object]]] = [[], []]
    numbers, acked, published = count(), list[Message[object]](), 0

    async def receive(index: int, demand: int) -> None:
        held[index] += await take(sources[index], demand)
        assert transport.held("g") == len(held[0]) + len(held[1])
        if ordered:
            keys = [{message.key for message in mine} for mine in held]
            assert not keys[0] & keys[1]

    async def settle(index: int, move: str, message: Message[object]) -> None:
        held[index].remove(message)
        if move == "ack":
            acked.append(message)
            assert not await sources[index].settle([message], [])
            return
        outcome = move if move in ("release", "park") else "retry"
        settlement = Settlement(message, outcome, 5.0 if move == "later" else 0.0, move != "uncounted")  # type: ignore[arg-type]
        assert not await sources[index].settle([], [settlement])

    for move, index, number in moves:
        if move == "publish":
            published += 3
            await publish(transport, "t", *(b"%d" % next(numbers) for _ in range(3)), key=f"k{number % 3}")
        elif move == "receive":
            await receive(index, 1 + number)
        elif move == "wait":
            await asyncio.sleep(number)
        elif move == "expire":
            transport.expire(sources[index])
            held[index].clear()
        elif held[index]:
            await settle(index, move, held[index][number % len(held[index])])
    while transport.held("g") or (await sources[0].backlog()).messages:
        for index in (0, 1):
            await receive(index, 100)
            for message in list(held[index]):
                await settle(index, "ack", message)
        await asyncio.sleep(10)
    assert sorted(int(message.body) for message in acked) == list(range(published))
