"""`sluiceway backlog`: what waits is told, and nothing is received, made or changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sluiceway import App, Message
from sluiceway.source import Subscription
from tests.cli.kit import Shell

Command = Callable[..., tuple[int, str, str]]
URL = "sqlite:///shop.db"

SHOP = f"""
from sluiceway import App
app = App({URL!r}, group="shop")

@app.consumer("payments.created")
async def payments(message): raise AssertionError("a handler ran")

@app.consumer("orders.*", group="audit")
async def orders(message): raise AssertionError("a handler ran")
"""


def publish(*topics: str, delay: float = 0.0) -> None:
    """Publish a message to each, for groups that are there."""

    async def work() -> None:
        async with App(URL) as app:
            for topic, group in (("payments.created", "shop"), ("orders.*", "audit")):
                await app.transport.ensure([Subscription(topics=(topic,), group=group, window=1)], create=True)
            for topic in topics:
                await app.publish(topic, 1, delay=delay)

    asyncio.run(work())


@pytest.fixture(autouse=True)
def shop(here: Path) -> None:
    (here / "shop.py").write_text(SHOP)


def told(sluiceway: Command, *arguments: str) -> dict[str, tuple[int | None, float | None]]:
    code, out, errors = sluiceway("backlog", "--json", *arguments)
    assert (code, errors) == (0, "")
    rows = map(json.loads, out.splitlines())
    return {row["consumer"]: (row["messages"], row["seconds"]) for row in rows}


def test_messages_and_the_age_of_the_oldest_are_told_per_consumer(sluiceway: Command) -> None:
    publish("payments.created", "payments.created")
    publish("orders.eu", delay=600)
    rows = told(sluiceway)
    assert rows["payments"][0] == 2
    assert rows["payments"][1] is not None
    assert 0 < rows["payments"][1] < 60
    assert rows["orders"] == (1, 0.0)
    code, out, _ = sluiceway("backlog", "shop:app")
    assert code == 0
    assert "payments  2 messages waiting, the oldest for 0." in out
    assert "orders    1 message waiting, none of them due\n" in out


def test_nothing_is_received_so_that_a_consumer_finds_all_of_it_untouched(sluiceway: Command) -> None:
    publish("payments.created")
    for _ in range(2):
        assert told(sluiceway, "--only", "payments")["payments"][0] == 1

    async def receive() -> Message[object]:
        async with App(URL) as app:
            source = await app.transport.subscribe(Subscription(topics=("payments.created",), group="shop", window=1))
            (message,) = await source.receive(1)
            await source.aclose()
            return message

    message = asyncio.run(receive())
    assert (message.deliveries, message.attempt) == (1, 1)


def test_a_consumer_that_runs_is_not_disturbed_and_what_it_has_in_hand_does_not_wait(shell: Shell) -> None:
    shell.shop(sleep=60, shutdown=0.1)
    shell("publish", "payments.created", *map(str, range(20)))
    running = shell.start("run", "--json", "--set", "payments.max_demand=8")
    running.until("status", lambda event: event["consumers"][0]["in_hand"] == 8)
    done = shell("backlog", "shop:app", "--json")
    assert json.loads(done.stdout)["messages"] == 12
    running.until("status", lambda event: event["consumers"][0]["in_hand"] == 8)


def test_a_group_that_is_not_there_yet_is_not_made(sluiceway: Command, here: Path) -> None:
    async def only_a_file() -> None:
        async with App(URL) as app:
            await app.publish("payments.created", 1)

    asyncio.run(only_a_file())
    for _ in range(2):
        assert told(sluiceway) == {"payments": (None, None), "orders": (None, None)}
    _, out, _ = sluiceway("backlog")
    assert "payments  not known: group 'shop' has no queue for topic 'payments.created'; the first run makes" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--max-messages", "2"), 0),
        (("--max-messages", "1"), 1),
        (("--max-seconds", "3600"), 0),
        (("--max-seconds", "0"), 1),
        (("--max-messages", "1", "--only", "orders"), 0),
    ],
    ids=range(5),
)
def test_the_exit_code_says_whether_more_waits_than_is_allowed(
    sluiceway: Command, arguments: tuple[str, ...], code: int
) -> None:
    publish("payments.created", "payments.created")
    assert sluiceway("backlog", *arguments)[0] == code


def test_what_is_not_known_is_not_within_limits(sluiceway: Command, here: Path) -> None:
    async def only_a_file() -> None:
        async with App(URL) as app:
            await app.publish("elsewhere", 1)

    asyncio.run(only_a_file())
    assert sluiceway("backlog")[0] == 0
    assert sluiceway("backlog", "--max-messages", "1000")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--only", "payment"), 2, "--only: there is no consumer 'payment'; did you mean 'payments'?"),
        (("--url", "memory://"), 2, "lives inside one process, so nobody else sees what waits; give a --url"),
        ((), 3, "shop.db is not there"),
    ],
)
def test_wrong_use_and_a_missing_broker_are_told(
    sluiceway: Command, here: Path, arguments: tuple[str, ...], code: int, text: str
) -> None:
    found, out, errors = sluiceway("backlog", *arguments)
    assert (found, out) == (code, "")
    assert text in errors
    assert not (here / "shop.db").exists()


@pytest.mark.parametrize("command", ["run", "inspect", "backlog"])
def test_the_app_is_named_as_an_argument_or_with_app_and_once(sluiceway: Command, command: str) -> None:
    publish()
    more = ("--until-empty", "--json") if command == "run" else ()
    assert sluiceway(command, "shop:app", *more)[0] == sluiceway(command, "--app", "shop:app", *more)[0] == 0
    code, _, errors = sluiceway(command, "shop:app", "--app", "shop:other")
    assert code == 2
    assert "the app is named twice: shop:app and --app shop:other" in errors
