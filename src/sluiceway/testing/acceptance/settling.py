"""How deliveries end: acks, retries, releases, dead letters, and settles that are sent twice."""

from __future__ import annotations

from typing import Any

import pytest

from ...message import Outcome, Outgoing, Settlement
from .guarantees import guarantee
from .kit import Kit, bodies, numbered


@guarantee("G2")
async def test_an_acked_message_never_comes_again(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(3))
    assert not await source.settle(await kit.get(source, 3), [])
    await source.flush()
    await kit.nothing(source)
    await source.aclose()
    await kit.nothing(await kit.open("t"))


@guarantee("G2")
async def test_acks_of_any_subset_leave_the_rest_held(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(10))
    messages = await kit.get(source, 10)
    await source.settle(messages[1::2], [])
    await source.aclose()
    assert kit.ordered(await kit.get(await kit.open("t"), 5)) == numbered(10)[0::2]


@guarantee("G8")
async def test_a_counted_retry_is_the_same_message_with_one_failure_more(kit: Kit) -> None:
    source = await kit.open("t")
    (sent,) = await kit.publish("t", b"\x00body", key="k", headers={"a": "b"})
    for attempt in (1, 2, 3):
        message = await kit.one(source)
        assert (message.attempt, message.failures, message.suspect) == (attempt, attempt - 1, False)
        assert (message.id, message.body, message.key, dict(message.headers)) == (sent.id, b"\x00body", "k", {"a": "b"})
        assert (message.topic, message.timestamp) == ("t", sent.timestamp)
        assert not await source.settle([], [Settlement(message, "retry")])


@guarantee("G8")
async def test_an_uncounted_retry_counts_nothing(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    for _ in range(4):
        message = await kit.one(source)
        assert (message.attempt, message.deliveries, message.suspect) == (1, 1, False)
        assert not await source.settle([], [Settlement(message, "retry", counted=False)])


@pytest.mark.parametrize("counted", [True, False])
@guarantee("G8", needs="delay")
async def test_a_retry_waits_for_its_delay_and_holds_nothing(kit: Kit, counted: bool) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(source)
    began = kit.now()
    await source.settle([], [Settlement(message, "retry", delay=3 * kit.step, counted=counted)])
    assert source.status().held_by_broker in (0, None)
    again = await kit.one(source)
    kit.passed(began, 3 * kit.step)
    assert again.attempt == 1 + counted


@guarantee("G8", needs="delay")
async def test_retries_come_when_each_is_due(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(3))
    messages = await kit.get(source, 3)
    delays = (3 * kit.step, kit.step, 2 * kit.step)
    later = [Settlement(message, "retry", delay=delay) for message, delay in zip(messages, delays, strict=True)]
    began = kit.now()
    await source.settle([], later)
    for _ in range(3):
        message = await kit.one(source)
        kit.passed(began, delays[int(message.body)])
    await kit.nothing(source)


@guarantee("G8", needs="delay")
async def test_a_waiting_retry_survives_its_source(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    await source.settle([], [Settlement(await kit.one(source), "retry", delay=kit.step)])
    await source.aclose()
    assert (await kit.one(await kit.open("t"))).attempt == 2


@pytest.mark.parametrize("delayed", [False, True])
@guarantee("G8", needs="delay")
async def test_a_retry_goes_to_the_group_that_failed_only(kit: Kit, delayed: bool) -> None:
    failing, happy = await kit.open("t", group="failing"), await kit.open("t", group="happy")
    await kit.publish("t", b"a")
    await happy.settle([await kit.one(happy)], [])
    await failing.settle([], [Settlement(await kit.one(failing), "retry", delay=kit.step * delayed)])
    assert (await kit.one(failing)).attempt == 2
    await kit.nothing(happy)


@guarantee("G3", needs="release")
async def test_a_released_message_comes_again_untouched_in_its_place(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(6))
    messages = await kit.get(source, 4)
    await source.settle([messages[1]], [Settlement(messages[index], "release") for index in (2, 0, 3)])
    again = await kit.get(source, 5)
    assert kit.ordered(again) == [b"0", b"2", b"3", b"4", b"5"]
    assert all((one.attempt, one.deliveries, one.suspect) == (1, 1, False) for one in again)


@guarantee("G3", needs=("release", "delay"))
async def test_a_release_with_a_delay_comes_again_untouched_when_it_is_due(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a", b"b")
    first, second = await kit.get(source, 2)
    began = kit.now()
    await source.settle([second], [Settlement(first, "release", delay=3 * kit.step)])
    message = await kit.one(source)
    kit.passed(began, 3 * kit.step)
    assert (message.body, message.attempt, message.deliveries, message.suspect) == (b"a", 1, 1, False)


@guarantee("G3", needs="release")
async def test_a_release_after_a_failure_keeps_the_count_of_failures(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    await source.settle([], [Settlement(await kit.one(source), "retry")])
    await source.settle([], [Settlement(await kit.one(source), "release")])
    message = await kit.one(source)
    assert (message.attempt, message.failures, message.suspect) == (2, 1, False)


@guarantee("G2")
async def test_a_dead_letter_ends_the_delivery_and_is_stored(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    message = await kit.one(source)
    letter = Outgoing("t.g.dead", message.body, message.key, {"why": "bad"}, message.id)
    assert not await source.settle([], [Settlement(message, "dead_letter", outputs=(letter,))])
    await kit.nothing(source)
    dead = await kit.one(await kit.open("t.g.dead"))
    assert (dead.body, dead.id, dict(dead.headers)) == (b"a", message.id, {"why": "bad"})


@guarantee("G3")
async def test_a_dead_letter_without_outputs_drops_the_message(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    assert not await source.settle([], [Settlement(await kit.one(source), "dead_letter")])
    await source.aclose()
    await kit.nothing(await kit.open("t"))


@guarantee("G2")
async def test_an_ack_publishes_its_outputs_in_order(kit: Kit) -> None:
    source, results = await kit.open("t"), await kit.open("results")
    await kit.publish("t", b"a")
    outputs = tuple(Outgoing("results", body) for body in numbered(5))
    call = await kit.waiting(results)
    assert not await source.settle([], [Settlement(await kit.one(source), "ack", outputs=outputs)])
    got = await call
    assert bodies(got + await kit.get(results, 5 - len(got))) == numbered(5)
    await kit.nothing(source)


@guarantee("G3")
async def test_acks_and_settlements_go_in_one_call(kit: Kit) -> None:
    source = await kit.open("t")
    await kit.publish("t", *numbered(5))
    acked, retried, dropped, released, kept = await kit.get(source, 5)
    others: list[Any] = [Settlement(retried, "retry"), Settlement(dropped, "dead_letter")]
    others.append(Settlement(released, "release"))
    assert not await source.settle([acked], others)
    assert sorted((one.body, one.attempt) for one in await kit.get(source, 2)) == [(b"1", 2), (b"3", 1)]
    await kit.nothing(source)
    assert not await source.settle([kept], [])


@guarantee("G3")
async def test_settling_nothing_is_harmless(kit: Kit) -> None:
    source = await kit.open("t")
    assert not await source.settle([], [])
    await source.flush()


@guarantee("G3")
async def test_settling_twice_is_harmless(kit: Kit) -> None:
    """The runtime settles again when a settle raised: whatever comes of it, nothing happens twice."""
    source, copies = await kit.open("t"), await kit.open("t.g.dead")
    await kit.publish("t", *numbered(4))
    acked, retried, dead, other = await kit.get(source, 4)
    others = [
        Settlement(retried, "retry", delay=kit.step),
        Settlement(dead, "dead_letter", outputs=(Outgoing("t.g.dead", b"2"),)),
    ]
    for _ in range(2):
        refused = await source.settle([acked], others)
    assert all(one.kind == "lost" for one in refused)
    assert bodies([await kit.one(source)]) == [b"1"]
    await kit.nothing(source)
    if kit.features.atomic:
        await kit.one(copies)
        await kit.nothing(copies)
    assert not await source.settle([other], [])


@pytest.mark.parametrize("outcome", ["retry", "release"])
@guarantee("G3")
async def test_a_settle_that_is_sent_again_when_the_message_has_come_again_leaves_that_alone(
    kit: Kit, outcome: Outcome
) -> None:
    source = await kit.open("t")
    await kit.publish("t", b"a")
    first = await kit.one(source)
    await source.settle([], [Settlement(first, outcome)])
    second = await kit.one(source)
    refused = await source.settle([], [Settlement(first, outcome)])  # as when its answer was lost
    assert all((one.message, one.kind) == (first, "lost") for one in refused)
    await kit.nothing(source)
    assert not await source.settle([second], [])
    await source.aclose()
    await kit.nothing(await kit.open("t"))


@guarantee("G3", "G13")
async def test_what_the_broker_rejects_stays_ours_and_publishes_nothing(kit: Kit) -> None:
    source, out = await kit.open("t"), await kit.open("out")
    await kit.publish("t", *numbered(2))
    first, second = await kit.get(source, 2)
    huge = Outgoing("out", b"x" * (kit.features.max_payload + 1))
    outputs = (Outgoing("out", b"fine"), huge)
    refused = await source.settle([], [Settlement(first, "ack", outputs=outputs), Settlement(second, "retry")])
    assert [(one.message, one.kind) for one in refused] == [(first, "rejected")]
    assert refused[0].detail
    assert (await kit.one(source)).body == b"1"
    await kit.nothing(out)
    assert not await source.settle([first], [])
    await source.aclose()
    assert bodies(await kit.get(await kit.open("t"), 1)) == [b"1"]
