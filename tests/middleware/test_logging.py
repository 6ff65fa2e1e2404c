"""The logging middleware: one record per message, with fields, without payloads."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from sluiceway import Message, OptionError, Reject, Release, Retry, RetryLater
from sluiceway.middleware.logging import Logging
from tests.middleware.kit import ONCE, Shop

pytestmark = pytest.mark.virtual_time
NAME = "sluiceway.messages"


def records(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.name == NAME]


async def test_a_handled_message_is_one_record_with_fields_and_without_its_payload(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    shop = Shop(middleware=[Logging()])
    ids: list[str] = []

    @shop.app.consumer("t")
    async def pay(message: Message[str]) -> None:
        ids.append(message.id)

    await shop.run("secret")
    (record,) = records(caplog)
    assert record.levelno == logging.INFO
    assert (record.consumer, record.topic, record.message_id, record.attempt, record.outcome) == (
        "pay", "t", ids[0], 1, "handled"
    )  # fmt: skip
    assert record.seconds >= 0
    assert record.getMessage().startswith(f"pay: message {ids[0]} of 't', attempt 1: handled in 0.0")
    assert "secret" not in str(record.__dict__)


@pytest.mark.parametrize(
    ("raised", "outcomes"),
    [
        (ValueError("no"), ["failed", "failed"]),
        (Reject("no"), ["rejected"]),
        (RetryLater(1), ["retry_later", "retry_later"]),
        ("told", ["failed", "failed"]),
    ],
    ids=["raised", "rejected", "later", "by message.fail"],
)
async def test_a_failure_is_a_record_per_attempt_with_its_outcome_and_no_second_traceback(
    raised: Exception | str, outcomes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shop = Shop()

    @shop.app.consumer("t", middleware=[Logging()], retry=Retry(attempts=2))
    async def pay(message: Message[str]) -> None:
        if isinstance(raised, str):
            message.fail(raised)
        else:
            raise raised

    await shop.run("x")
    found = records(caplog)
    assert [record.outcome for record in found] == outcomes
    assert [record.attempt for record in found] == list(range(1, len(outcomes) + 1))
    assert all(record.exc_info is None for record in found)


async def test_a_release_is_told_as_such(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shop = Shop()

    @shop.app.consumer("t", middleware=[Logging()])
    async def pay(message: Message[str]) -> None:
        if message.deliveries == 1 and not records(caplog):
            raise Release

    await shop.run("x")
    assert [record.outcome for record in records(caplog)] == ["released", "handled"]


async def test_level_and_logger_are_chosen_and_a_level_that_is_off_logs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "loud")
    shop = Shop()
    both = [Logging("DEBUG", logger="quiet"), Logging(logging.DEBUG, logger=logging.getLogger("loud"))]

    @shop.app.consumer("t", middleware=both, retry=ONCE)
    async def pay(message: Message[str]) -> int:
        return 1

    await shop.run("x")
    assert [(record.name, record.levelname) for record in caplog.records if record.name in ("loud", "quiet")] == [
        ("loud", "DEBUG")
    ]


@pytest.mark.parametrize("level", ["loud", None, True, 1.5])
def test_a_level_that_there_is_not_is_an_option_error(level: Any) -> None:
    with pytest.raises(OptionError, match="Logging: level must be a number or one of CRITICAL"):
        Logging(level)


def test_a_level_is_named_in_capitals_or_not() -> None:
    assert Logging("info").level == Logging("INFO").level == Logging().level


async def test_among_batch_middleware_it_is_an_option_error() -> None:
    shop = Shop(batch_middleware=[Logging()])

    @shop.app.consumer("t")
    async def pay(message: Message[str]) -> None: ...

    @pay.batch()
    async def book(batch: Any) -> None: ...

    with pytest.raises(OptionError, match="pay: Logging goes round messages; move it from batch_middleware to mid"):
        await shop.run()
