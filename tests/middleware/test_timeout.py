"""The timeout middleware: a limit for a part of the chain, fixed or from a header."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sluiceway import HandlerTimeout, Message, OptionError
from sluiceway.message import Handler
from sluiceway.middleware import compose
from sluiceway.middleware.timeout import Timeout
from tests.middleware.kit import ONCE, Shop

pytestmark = pytest.mark.virtual_time


def message(**headers: str) -> Message[Any]:
    return Message("t", b"", "id-1", headers=headers)


async def seconds_of(timeout: Timeout, one: Message[Any]) -> float:
    """How long a handler that takes a minute may run."""

    async def handle(message: Message[Any]) -> None:
        await asyncio.sleep(60)

    started = asyncio.get_running_loop().time()
    try:
        await compose([timeout], handle)(one)
    except HandlerTimeout:
        pass
    return asyncio.get_running_loop().time() - started


async def test_what_is_further_in_is_cancelled_when_its_time_is_up() -> None:
    assert await seconds_of(Timeout(5), message()) == pytest.approx(5)
    assert await seconds_of(Timeout(100), message()) == pytest.approx(60)


async def test_a_header_sets_the_limit_of_its_message_but_no_longer_one_than_the_fixed() -> None:
    timeout = Timeout(10, header="limit")
    assert await seconds_of(timeout, message(limit="2.5")) == pytest.approx(2.5)
    assert await seconds_of(timeout, message(limit="30")) == pytest.approx(10)
    assert await seconds_of(timeout, message()) == pytest.approx(10)
    assert await seconds_of(Timeout(header="limit"), message(limit="30")) == pytest.approx(30)
    assert await seconds_of(Timeout(header="limit"), message()) == pytest.approx(60)


async def test_the_message_fails_with_an_error_that_says_which_and_how_long() -> None:
    shop = Shop()

    @shop.app.consumer("t", middleware=[Timeout(0.5)], retry=ONCE)
    async def slow(message: Message[int]) -> None:
        await asyncio.sleep(60)

    await shop.run(1)
    (dead,) = await shop.dead()
    assert dead.headers["sluiceway-dead-type"] == "sluiceway.errors.HandlerTimeout"
    assert dead.headers["sluiceway-dead-error"] == f"message {dead.id} ran over 0.5 s"


@pytest.mark.parametrize("said", ["soon", "", "0", "-1", "nan", "inf"])
async def test_a_header_that_says_no_seconds_rejects_its_message(said: str) -> None:
    shop = Shop()

    @shop.app.consumer("t", middleware=[Timeout(5, header="limit")])
    async def never(message: Message[int]) -> None:
        raise AssertionError("not reached")

    await shop.run(1, headers={"limit": said})
    assert await shop.why_dead() == [f"header 'limit' must be seconds, more than 0; got {said!r}"]


async def test_a_part_of_the_chain_that_runs_over_can_be_answered_by_the_rest() -> None:
    async def instead(message: Message[Any], call_next: Handler) -> Any:
        try:
            return await call_next(message)
        except HandlerTimeout:
            return "a stale price"

    async def handle(message: Message[Any]) -> None:
        await asyncio.sleep(60)

    assert await compose([instead, Timeout(1)], handle)(message()) == "a stale price"


async def test_a_handlers_own_timeout_error_stays_its_own() -> None:
    async def handle(message: Message[Any]) -> None:
        raise TimeoutError("the database")

    with pytest.raises(TimeoutError, match="the database") as caught:
        await compose([Timeout(5)], handle)(message())
    assert not isinstance(caught.value, HandlerTimeout)


async def test_a_cancellation_from_outside_is_no_timeout() -> None:
    async def handle(message: Message[Any]) -> None:
        await asyncio.sleep(60)

    task = asyncio.ensure_future(compose([Timeout(50)], handle)(message()))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("wrong", [{}, {"seconds": 0}, {"seconds": "5"}, {"seconds": True}, {"header": ""}])
def test_a_limit_that_cannot_be_is_an_option_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="Timeout: "):
        Timeout(**wrong)
