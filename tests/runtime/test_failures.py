"""Failures: every way in which a handler can fail, and how its message ends."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from sluiceway import (
    Message,
    OptionError,
    Pipeline,
    Reject,
    Release,
    Retry,
    RetryLater,
    RoutingError,
)

from .recording import Broker, bodies, running

pytestmark = pytest.mark.virtual_time

RETRY = Retry(attempts=3, base_delay=1.0, jitter=0)


async def run(handler: Any, *texts: str, ends: int | None = None, **options: Any) -> Broker:
    """Run the handler over a few messages until all have ended for good."""
    broker = Broker(*texts)
    options = {"retry": RETRY} | options
    async with running(Pipeline(broker.open, handler, **options), broker):
        await broker.settled(len(texts) if ends is None else ends)
    return broker


async def test_what_raises_is_retried_with_growing_delays_then_dead_lettered() -> None:
    attempts = []

    async def handle(message: Message[bytes]) -> None:
        attempts.append((message.id, message.attempt))
        raise ValueError("broken")

    broker = await run(handle, "a")
    assert attempts == [("m1", 1), ("m1", 2), ("m1", 3)]
    assert broker.outcomes("m1") == ["retry", "retry", "dead_letter"]
    assert [one.delay for one in broker.ended] == [1.0, 2.0, 0.0]
    assert all(one.counted for one in broker.ended)


async def test_an_exception_fails_its_own_message_only() -> None:
    async def handle(message: Message[bytes]) -> None:
        if message.body == b"5":
            raise ValueError("broken")

    broker = await run(handle, *map(bytes.decode, bodies(10)), retry=Retry(attempts=1))
    assert len(broker.acked) == 9
    assert [one.id for one in broker.dead] == ["m5"]


async def test_an_exception_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(message: Message[bytes]) -> None:
        raise ValueError("broken")

    await run(handle, "a", retry=Retry(attempts=1))
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[0] is ValueError
    assert "handle: message m1 of 'source' failed at attempt 1 of 1 (ValueError: broken); it goes to" in record.message


async def test_a_publish_that_is_awaited_is_told_how_to_write_it(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(message: Message[bytes]) -> None:
        await message.publish("elsewhere", 1)  # type: ignore[func-returns-value]

    broker = await run(handle, "a", retry=Retry(attempts=1))
    assert "message.publish(...) is not awaited" in caplog.text
    (dead,) = broker.dead[0].outputs
    assert "Write it without await" in dead.headers["sluiceway-dead-traceback"]


async def test_another_await_of_nothing_is_told_as_python_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(message: Message[bytes]) -> None:
        await message.fail("no")  # type: ignore[func-returns-value]

    await run(handle, "a", retry=Retry(attempts=1))
    assert "NoneType" in caplog.text
    assert "message.publish" not in caplog.text


async def test_a_dead_letter_says_what_why_where_and_when() -> None:
    async def handle(message: Message[bytes]) -> None:
        raise ValueError("broken")

    broker = await run(handle, "a", retry=Retry(attempts=2, base_delay=0))
    (dead,) = broker.dead[0].outputs
    assert (dead.topic, dead.body, dead.id) == ("source.default.dead", b"a", "m1")
    said = {name.removeprefix("sluiceway-dead-"): value for name, value in dead.headers.items()}
    assert said["type"] == "ValueError"
    assert said["error"] == "broken"
    assert 'raise ValueError("broken")' in said["traceback"]
    assert (said["topic"], said["group"], said["consumer"], said["attempts"]) == ("source", "default", "handle", "2")


async def test_reject_goes_to_dead_letters_at_once() -> None:
    async def handle(message: Message[bytes]) -> None:
        raise Reject("negative amount")

    broker = await run(handle, "a")
    assert broker.outcomes("m1") == ["dead_letter"]
    assert broker.dead[0].outputs[0].headers["sluiceway-dead-error"] == "negative amount"


async def test_retry_later_says_when_and_counts() -> None:
    async def handle(message: Message[bytes]) -> None:
        raise RetryLater(7.5)

    broker = await run(handle, "a")
    assert [(one.outcome, one.delay) for one in broker.ended] == [("retry", 7.5), ("retry", 7.5), ("dead_letter", 0)]


async def test_retry_later_without_a_delay_follows_the_policy() -> None:
    async def handle(message: Message[bytes]) -> None:
        if message.attempt == 1:
            raise RetryLater

    broker = await run(handle, "a")
    assert [(one.outcome, one.delay) for one in broker.ended] == [("retry", 1.0), ("ack", 0)]


async def test_retry_later_uncounted_never_exhausts() -> None:
    runs = 0

    async def handle(message: Message[bytes]) -> None:
        nonlocal runs
        runs += 1
        assert message.attempt == 1
        if runs < 20:
            raise RetryLater(1, counted=False)

    broker = await run(handle, "a")
    assert broker.outcomes("m1") == ["retry"] * 19 + ["ack"]


async def test_release_hands_back_untouched() -> None:
    runs = 0

    async def handle(message: Message[bytes]) -> None:
        nonlocal runs
        runs += 1
        assert message.attempt == 1
        if runs < 5:
            raise Release

    broker = await run(handle, "a")
    assert broker.outcomes("m1") == ["release"] * 4 + ["ack"]


async def test_message_fail_is_what_raise_is() -> None:
    async def handle(message: Message[bytes]) -> None:
        message.fail("no good")

    broker = await run(handle, "a", retry=Retry(attempts=1))
    assert broker.dead[0].outputs[0].headers["sluiceway-dead-error"] == "no good"


async def test_a_cancelled_inner_task_fails_the_message_and_not_the_processor() -> None:
    async def handle(message: Message[bytes]) -> None:
        if message.body == b"a":
            task = asyncio.create_task(asyncio.sleep(10))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task

    broker = await run(handle, "a", "b", "c", concurrency=1, retry=Retry(attempts=1))
    assert [one.id for one in broker.dead] == ["m1"]
    assert broker.acked == ["m2", "m3"]


@pytest.mark.parametrize(("error", "outcome"), [(KeyboardInterrupt("stop"), "release"), (SystemExit(3), "retry")])
async def test_an_exit_stops_the_app_and_is_raised_again_and_one_by_the_handler_counts_as_its_failure(
    error: BaseException, outcome: str
) -> None:
    broker = Broker(*bodies(50))
    finished = []

    async def handle(message: Message[bytes]) -> None:
        await asyncio.sleep(int(message.body) % 3)
        if message.body == b"7":
            raise error
        finished.append(message.id)

    pipeline = Pipeline(broker.open, handle, concurrency=10)
    with pytest.raises(type(error)) as raised:
        await pipeline.run()
    assert raised.value is error
    broker.check()
    assert broker.outcomes("m7") == [outcome]
    assert sorted(finished) == sorted(broker.acked)
    assert len(broker.waiting) + len(broker.delayed) + len(broker.acked) == 50


async def test_a_handler_that_always_exits_ends_as_a_dead_letter_and_stops_no_app_any_more() -> None:
    broker = Broker("poison")

    def handle(message: Message[bytes]) -> None:
        raise SystemExit(3)

    for _ in range(2):
        with pytest.raises(SystemExit):
            await Pipeline(broker.open, handle, retry=Retry(attempts=2, base_delay=0)).run()
    assert [one.id for one in broker.dead] == ["m1"]


async def test_any_other_base_exception_fails_its_message() -> None:
    class Odd(BaseException):
        pass

    async def handle(message: Message[bytes]) -> None:
        raise Odd("odd")

    broker = await run(handle, "a", retry=Retry(attempts=1))
    assert broker.outcomes("m1") == ["dead_letter"]


async def test_an_exception_without_a_text_does_not_cost_the_dead_letter() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

        def __bool__(self) -> bool:
            return False

    async def handle(message: Message[bytes]) -> None:
        if message.body == b"a":
            raise Mute
        message.fail(Mute())

    broker = await run(handle, "a", "b", retry=Retry(attempts=1))
    assert len(broker.dead) == 2


async def test_what_cannot_be_decoded_is_dead_lettered_at_once() -> None:
    async def handle(message: Message[dict[str, int]]) -> None: ...

    broker = Broker(b"\xff", b"{", b'{"a": "x"}', b"[" * 100_000, b'{"a": 1}')
    async with running(Pipeline(broker.open, handle, retry=Retry(attempts=1)), broker):
        await broker.settled(5)
    assert broker.acked == ["m5"]
    kinds = [one.outputs[0].headers["sluiceway-dead-type"] for one in broker.dead]
    assert kinds[:3] == ["sluiceway.errors.DecodeError"] * 3
    assert broker.dead[0].outputs[0].body == b"\xff"


async def test_what_is_over_max_payload_is_dead_lettered_undecoded() -> None:
    handled = []

    async def handle(message: Message[bytes]) -> None:
        handled.append(message.id)

    broker = await run(handle, "x" * 11, "x" * 10, max_payload=10)
    assert handled == broker.acked == ["m2"]
    assert "11 bytes; max_payload allows 10" in broker.dead[0].outputs[0].headers["sluiceway-dead-error"]


async def test_an_unknown_batcher_raises_on_the_users_own_line() -> None:
    raised: list[str] = []

    async def handle(message: Message[bytes]) -> None:
        try:
            message.to("s4")
        except RoutingError as error:
            raised.append(str(error))
            raise

    broker = await run(handle, "a", retry=Retry(attempts=1))
    assert raised == ["handle: there is no batcher 's4'; its batchers: none"]
    assert broker.outcomes("m1") == ["dead_letter"]


async def test_exhausted_drop_ends_without_a_dead_letter() -> None:
    async def handle(message: Message[bytes]) -> None:
        raise ValueError("broken")

    broker = await run(handle, "a", exhausted="drop")
    assert broker.outcomes("m1") == ["retry", "retry", "dead_letter"]
    assert broker.dead[0].outputs == ()


async def test_exhausted_retry_goes_on_for_ever() -> None:
    async def handle(message: Message[bytes]) -> None:
        if message.attempt < 50:
            raise ValueError("broken")

    broker = await run(handle, "a", exhausted="retry", retry=Retry(attempts=3, max_delay=1))
    assert broker.outcomes("m1") == ["retry"] * 49 + ["ack"]


async def test_a_type_that_is_never_retried_goes_to_dead_letters() -> None:
    async def handle(message: Message[bytes]) -> None:
        raise KeyError("x")

    broker = await run(handle, "a", retry=Retry(never=(LookupError,)))
    assert broker.outcomes("m1") == ["dead_letter"]


async def test_outputs_go_out_with_the_settle_and_not_on_failure() -> None:
    async def handle(message: Message[bytes]) -> None:
        message.publish("next", {"n": 1}, key="k", headers={"h": "v"}, delay=2)
        message.publish("next", b"raw")
        if message.attempt == 1:
            raise ValueError("broken")

    broker = await run(handle, "a")
    assert broker.outcomes("m1") == ["retry", "ack"]
    assert broker.ended[0].outputs == ()
    first, second = broker.ended[1].outputs
    assert (first.topic, first.body, first.key, first.headers["h"], first.delay) == ("next", b'{"n":1}', "k", "v", 2)
    assert second.body == b"raw"


async def test_the_handlers_value_is_not_awaited_twice_when_the_pipeline_is_busy() -> None:
    runs: list[str] = []

    async def handle(message: Message[bytes]) -> str:
        runs.append(message.id)
        await asyncio.sleep(0)
        return message.id

    await run(handle, *map(bytes.decode, bodies(200)), concurrency=7)
    assert sorted(runs) == sorted(f"m{n}" for n in range(1, 201))


def test_a_handler_with_a_yield_is_refused_where_it_is_declared() -> None:
    async def open_source() -> Any: ...

    def handle(message: Message[bytes]) -> Any:
        yield message

    async def handle_async(message: Message[bytes]) -> Any:
        yield message

    for handler in (handle, handle_async):
        with pytest.raises(OptionError, match="has a `yield`: a call would run nothing of it"):
            Pipeline(open_source, handler)
