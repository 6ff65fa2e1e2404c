"""Faults between app and broker: nothing is lost, nothing is settled twice, whatever goes wrong."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluiceway import App, Batch, Message, OptionError, Retry
from sluiceway.source import Source, Subscription
from sluiceway.testing import Fault, Faults, FaultyTransport, run, running
from sluiceway.testing.record import Recorder
from sluiceway.testing.wrapping import SourceWrapper, TransportWrapper
from sluiceway.transport import Transport
from sluiceway.transports.memory import MemoryTransport


def counting(**options: object) -> tuple[App, Counter[str]]:
    app = App()
    ran: Counter[str] = Counter()

    @app.consumer("t", **options)  # type: ignore[arg-type]
    async def handle(message: Message[int]) -> None:
        ran[message.id] += 1
        await app.publish("out", message.payload)

    return app, ran


async def outcomes(faults: Faults, **options: object) -> tuple[list[str], int, float]:
    """How the deliveries of one message ended, how often its handler ran, and when it was over."""
    app, ran = counting(**options)
    async with running(app, faults=faults) as harness:
        sent = await harness.publish("t", 1)
        async with asyncio.timeout(10_000):
            await harness.idle()
        return (
            [one.outcome + " lost" * one.lost for one in harness.of(sent)],
            ran[sent],
            asyncio.get_running_loop().time(),
        )


@pytest.mark.virtual_time
class TestScripts:
    async def test_a_settle_that_did_not_arrive_is_sent_again(self) -> None:
        assert (await outcomes(Faults(settle=[Fault("disconnect")])))[:2] == (["ack"], 1)

    async def test_a_settle_whose_answer_is_lost_counts_once(self) -> None:
        assert (await outcomes(Faults(settle=[Fault("disconnect", after=True)])))[:2] == (["ack"], 1)

    async def test_a_receive_that_fails_makes_the_pipeline_start_anew(self) -> None:
        assert (await outcomes(Faults(receive=[Fault("disconnect")] * 8)))[:2] == (["ack"], 1)

    async def test_what_was_received_and_did_not_arrive_comes_again(self) -> None:
        assert (await outcomes(Faults(receive=[Fault("disconnect", after=True)])))[:2] == (["ack"], 1)

    async def test_a_duplicate_runs_twice_with_one_id(self) -> None:
        assert (await outcomes(Faults(receive=[Fault("duplicate")])))[:2] == (["ack", "ack"], 2)

    async def test_a_drop_comes_again_later_and_uncounted(self) -> None:
        ended, ran, at = await outcomes(Faults(receive=[Fault("drop", seconds=30)]), retry=Retry(attempts=1))
        assert (ended, ran) == (["release", "ack"], 1)
        assert at >= 30

    async def test_a_lost_lease_makes_its_message_run_again(self) -> None:
        assert (await outcomes(Faults(settle=[Fault("lose_lease")])))[:2] == (["ack lost", "ack"], 2)

    async def test_a_crash_before_the_ack_makes_its_message_run_again(self) -> None:
        assert (await outcomes(Faults(settle=[Fault("crash")])))[:2] == (["ack"], 2)

    async def test_a_crash_after_the_ack_does_not(self) -> None:
        assert (await outcomes(Faults(settle=[Fault("crash", after=True)])))[:2] == (["ack"], 1)

    async def test_a_crash_at_the_first_call_of_a_life_is_one_too(self) -> None:
        assert (await outcomes(Faults(receive=[Fault("crash")] * 3)))[:2] == (["ack"], 1)

    async def test_a_suspect_that_is_lost_before_it_runs_alone_is_not_waited_for(self) -> None:
        faults = Faults(settle=[Fault("crash"), Fault("crash")], suspect=[Fault("lose_lease")])
        ended, ran, _ = await outcomes(faults, retry=Retry(attempts=9))
        assert (ended[-1], ran) == ("ack", 3)
        assert ("suspect", Fault("lose_lease")) in faults.happened

    async def test_a_publish_that_fails_fails_its_handler(self) -> None:
        ended, ran, _ = await outcomes(Faults(publish=[Fault("disconnect")]), retry=Retry(base_delay=1))
        assert (ended, ran) == (["retry", "ack"], 2)

    async def test_a_broker_that_cannot_be_opened_is_tried_again(self) -> None:
        assert (await outcomes(Faults(subscribe=[Fault("disconnect")] * 5)))[:2] == (["ack"], 1)

    async def test_a_delay_is_ended_by_a_drain(self) -> None:
        app, _ = counting()
        async with running(app, faults=Faults(receive=[Fault("delay", seconds=1000)])):
            await asyncio.sleep(1)
        assert asyncio.get_running_loop().time() < 30


def test_what_happened_is_listed_in_order() -> None:
    faults = Faults(receive=[None, Fault("drop")], settle=[Fault("delay", seconds=1)])
    for call in ("receive", "settle", "receive", "receive"):
        faults.next(call)  # type: ignore[arg-type]
    assert faults.happened == [("settle", Fault("delay", seconds=1)), ("receive", Fault("drop"))]


def test_what_cannot_go_wrong_is_refused() -> None:
    with pytest.raises(OptionError, match="'drop' cannot happen at settle; possible: disconnect, delay, lose_lease"):
        Faults(settle=[Fault("drop")])
    with pytest.raises(OptionError, match="there is no call 'recieve'; calls: subscribe, receive"):
        Faults(recieve=[])
    with pytest.raises(OptionError, match="rate must be a probability"):
        Faults.random(1, rate=1)
    with pytest.raises(OptionError, match="kinds must be some of crash, delay"):
        Faults.random(1, kinds=["fire"])  # type: ignore[list-item]


def test_a_seed_repeats_its_faults_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    drawn = Faults.random(rate=0.5)
    assert drawn.seed is not None
    assert f"Faults.random({drawn.seed}) repeats them" in caplog.text
    again = Faults.random(drawn.seed, rate=0.5)
    calls = ["receive", "settle", "publish", "suspect", "subscribe"] * 20
    assert [drawn.next(call) for call in calls] == [again.next(call) for call in calls]  # type: ignore[arg-type]
    assert len(drawn.happened) > 20
    drawn.stop()
    assert not any(drawn.next(call) for call in calls)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.booleans(), st.booleans())
def test_whatever_goes_wrong_every_message_ends_and_none_twice(seed: int, batched: bool, ordered: bool) -> None:
    run(_survive(seed, batched, ordered))


async def _survive(seed: int, batched: bool, ordered: bool) -> None:
    random.seed(seed)  # the runtime's jitter
    app = App()
    ran: Counter[str] = Counter()

    @app.consumer("t", retry=Retry(attempts=50, base_delay=1), order_by="key" if ordered else None)
    async def handle(message: Message[int]) -> int:
        ran[message.id] += 1
        await asyncio.sleep(message.payload % 3 / 10)
        message.publish("next", message.payload)
        if message.payload % 7 == 3 and ran[message.id] < 3:
            raise ValueError("unlucky")
        return message.payload

    if batched:

        @handle.batch(size=3)
        async def book(batch: Batch[int]) -> None:
            await app.publish("out", batch.values)

    @app.consumer("next", retry=Retry(attempts=50))
    async def follow(message: Message[int]) -> None:
        await asyncio.sleep(0)

    faults = Faults.random(seed, rate=0.1)
    async with running(app, faults=faults) as harness:
        ids = await harness.publish_many("t", range(25), key=lambda number: "abc"[number % 3])
        async with asyncio.timeout(100_000):
            await harness.idle()
        faults.stop()
        ended = Counter(one.message.id for one in harness.deliveries if one.outcome == "ack" and not one.lost)
        assert harness.dead_letters() == []
        assert len({one.message for one in harness.deliveries}) == len(harness.deliveries), "a delivery ended twice"
    assert all(ended[one] and ran[one] for one in ids), "lost"
    if not any(fault.kind == "duplicate" for _, fault in faults.happened):
        assert set(ended.values()) == {1}
        assert len(ended) == 50, "a follow-up was lost or sent twice"


async def test_wrappers_hand_on_every_word_of_the_contracts() -> None:
    transport = MemoryTransport()
    source = await transport.subscribe(Subscription(topics=("t",), group="g", window=1))
    for contract, made in ((Transport, TransportWrapper(transport)), (Source, SourceWrapper(source))):
        words = {name for name in (*vars(contract), *contract.__annotations__) if not name.startswith("_")}
        assert words <= set(dir(made)), contract
        for name in words:
            theirs = getattr(contract, name, None)
            if inspect.isfunction(theirs):
                assert str(inspect.signature(theirs)) == str(inspect.signature(getattr(type(made), name))), name
    assert isinstance(FaultyTransport(Recorder(MemoryTransport()), Faults()), Transport)
