"""message.configure: how one delivery ends, whatever its consumer's options say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sluiceway import AlreadySettled, Batch, Message, OptionError, Pipeline, Reject, Release, Retry, RetryLater

from .recording import Broker, running

pytestmark = pytest.mark.virtual_time

Configure = Callable[[Message[Any]], None]
THREE = Retry(attempts=3, base_delay=1, jitter=0)


async def outcomes(
    configure: Configure, *, fails: BaseException | None = None, until: int = 1, **options: Any
) -> list[str]:
    """How the deliveries of one message end, the first `until` of them, by handler and in a batch."""
    found = []

    async def handle(message: Message[bytes]) -> None:
        configure(message)
        if fails is not None:
            raise fails

    async def same(message: Message[bytes]) -> None: ...

    async def in_batch(batch: Batch[Any]) -> None:
        configure(batch[0])
        if fails is not None:
            raise fails

    for handler, batch in ((handle, None), (same, in_batch)):
        broker = Broker("1")
        options.setdefault("retry", THREE)
        more: Any = {"batch_size": 1} if batch is not None else {}
        async with running(Pipeline(broker.open, handler, batch=batch, **more, **options), broker):
            await broker.until(lambda broker=broker: len(broker.ended) >= until)
        found.append([one.outcome if one.counted else f"{one.outcome} uncounted" for one in broker.ended[:until]])
    assert found[0] == found[1]
    return found[0]


async def test_a_failure_may_be_dead_lettered_though_attempts_are_left() -> None:
    error = ValueError("broken")
    assert await outcomes(lambda one: one.configure(on_failure="dead_letter"), fails=error) == ["dead_letter"]


@pytest.mark.parametrize("exhausted", ["drop", "retry"])
async def test_dead_letter_means_that_whatever_the_consumer_does_with_exhausted_ones(exhausted: Any) -> None:
    broker = Broker("1")

    async def handle(message: Message[bytes]) -> None:
        message.configure(on_failure="dead_letter")
        raise ValueError("broken")

    async with running(Pipeline(broker.open, handle, exhausted=exhausted), broker):
        await broker.settled(1)
    (dead,) = broker.dead
    assert dead.outputs[0].headers["sluiceway-dead-error"] == "broken"


async def test_a_failure_may_lose_the_message() -> None:
    broker = Broker("1")

    async def handle(message: Message[bytes]) -> None:
        message.configure(on_failure="drop")
        raise ValueError("broken")

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
    (dead,) = broker.dead
    assert dead.outputs == ()


async def test_a_failure_may_be_tried_for_ever() -> None:
    def configure(message: Message[Any]) -> None:
        message.configure(on_failure="retry")

    assert await outcomes(configure, fails=ValueError(), until=6) == ["retry"] * 6


async def test_a_failure_may_hand_the_message_back_uncounted() -> None:
    def configure(message: Message[Any]) -> None:
        message.configure(on_failure="release")

    assert await outcomes(configure, fails=ValueError(), until=5) == ["release uncounted"] * 5


async def test_a_message_may_have_a_retry_of_its_own() -> None:
    def configure(message: Message[Any]) -> None:
        message.configure(retry=Retry(attempts=2, base_delay=7, jitter=0))

    assert await outcomes(configure, fails=ValueError(), until=2) == ["retry", "dead_letter"]


async def test_on_a_thread_it_is_the_same() -> None:
    broker = Broker("1", "2")

    def handle(message: Message[bytes]) -> None:
        if message.id == "m1":
            message.configure(on_success="dead_letter")
        else:
            message.configure(on_failure="dead_letter")
            raise ValueError

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(2)
    assert [one.outcome for one in broker.ended] == ["dead_letter"] * 2


async def test_the_delay_is_that_of_its_own_retry() -> None:
    broker = Broker("1")

    async def handle(message: Message[bytes]) -> None:
        message.configure(retry=Retry(attempts=2, base_delay=7, jitter=0))
        raise ValueError

    async with running(Pipeline(broker.open, handle, retry=THREE), broker):
        await broker.settled(1)
    assert [one.delay for one in broker.ended] == [7, 0]


async def test_a_success_may_be_dead_lettered() -> None:
    assert await outcomes(lambda one: one.configure(on_success="dead_letter")) == ["dead_letter"]


async def test_the_dead_letter_of_a_success_says_so_and_is_there_whatever_exhausted_says() -> None:
    broker = Broker("1")

    async def handle(message: Message[bytes]) -> None:
        message.publish("elsewhere", 1)
        message.configure(on_success="dead_letter")

    async with running(Pipeline(broker.open, handle, exhausted="drop"), broker):
        await broker.settled(1)
    ((letter,),) = [one.outputs for one in broker.dead]  # and not what it published
    assert letter.topic == "source.default.dead"
    assert letter.headers["sluiceway-dead-error"] == "it succeeded, and was configured to end here"


async def test_a_success_may_be_handed_back() -> None:
    assert await outcomes(lambda one: one.configure(on_success="release"), until=3) == ["release uncounted"] * 3


async def test_a_success_that_is_handed_back_keeps_its_key_in_order() -> None:
    broker = Broker()
    broker.put("1", "2", key="k")
    handled: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)
        if len(handled) < 5:
            message.configure(on_success="release")

    async with running(Pipeline(broker.open, handle, order_by="key"), broker):
        await broker.settled(2)
    assert handled == ["m1", "m1", "m1", "m1", "m1", "m2"]


async def test_an_early_ack_is_a_success_too() -> None:
    broker = Broker("1")

    async def handle(message: Message[bytes]) -> None:
        message.configure(on_success="dead_letter")
        await message.ack()
        assert broker.outcomes("m1") == ["dead_letter"]

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)


@pytest.mark.parametrize(
    ("directive", "outcome"),
    [
        (Reject("no"), "dead_letter"),
        (Release(), "release uncounted"),
        (RetryLater(3), "retry"),
        (RetryLater(3, counted=False), "retry uncounted"),
    ],
)
@pytest.mark.parametrize("on_failure", ["retry", "dead_letter", "drop", "release"])
async def test_what_a_directive_says_comes_first(directive: BaseException, outcome: str, on_failure: Any) -> None:
    assert await outcomes(lambda one: one.configure(on_failure=on_failure), fails=directive) == [outcome]


async def test_the_last_call_counts_and_the_next_delivery_knows_nothing_of_it() -> None:
    broker = Broker("1")

    async def handle(message: Message[bytes]) -> None:
        if message.attempt == 1:
            message.configure(on_failure="dead_letter")
            message.configure(retry=Retry(attempts=9, base_delay=5, jitter=0))
        raise ValueError

    async with running(Pipeline(broker.open, handle, retry=THREE), broker):
        await broker.settled(1)
    assert [(one.outcome, one.delay) for one in broker.ended] == [("retry", 5), ("retry", 2), ("dead_letter", 0)]


async def test_prepare_may_configure_too() -> None:
    broker = Broker("1")

    async def prepare(messages: Any) -> None:
        messages[0].configure(on_failure="dead_letter")

    async def handle(message: Message[bytes]) -> None:
        raise ValueError

    async with running(Pipeline(broker.open, handle, prepare=prepare), broker):
        await broker.settled(1)
    assert broker.outcomes("m1") == ["dead_letter"]


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({"on_success": "retry"}, "on_success must be one of 'ack', 'dead_letter', 'release'; got 'retry'"),
        ({"on_success": None}, "on_success must be one of 'ack', 'dead_letter', 'release'; got None"),
        ({"on_failure": "ack"}, "on_failure must be one of None, 'retry', 'dead_letter', 'drop', 'release'; got 'ack'"),
        ({"on_failure": ["drop"]}, "on_failure must be one of None, "),
        ({"retry": 3}, "retry must be a Retry(...) or None; got 3"),
    ],
)
async def test_a_value_that_is_not_allowed_raises_on_the_users_own_line(values: Any, allowed: str) -> None:
    message: Message[Any] = Message("t", b"", "1")
    with pytest.raises(OptionError) as caught:
        message.configure(**values)
    assert allowed in str(caught.value)
    assert message.ending is None


async def test_a_settled_message_cannot_be_configured() -> None:
    broker = Broker("1")
    errors: list[BaseException] = []

    async def handle(message: Message[bytes]) -> None:
        await message.ack()
        with pytest.raises(AlreadySettled) as caught:
            message.configure(on_failure="drop")
        errors.append(caught.value)

    async with running(Pipeline(broker.open, handle), broker):
        await broker.settled(1)
    assert "is settled already" in str(errors[0])
