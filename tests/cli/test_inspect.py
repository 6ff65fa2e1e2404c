"""`sluiceway inspect`: what would run, offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]

SHOP = """
from sluiceway import App, Message, Retry

app = App("sqlite:///shop.db", group="shop")


@app.consumer("payments.created", concurrency=5, order_by="key", retry=Retry(attempts=3))
async def payments(message: Message[int]) -> int: ...


@payments.batch(size=50, timeout=0.5, key=str)
async def book(batch) -> None: ...


@app.consumer("orders.*", exhausted="drop")
def orders(message: Message[bytes]) -> None: ...
"""


@pytest.fixture(autouse=True)
def shop(here: Path) -> None:
    (here / "shop.py").write_text(SHOP)


def inspected(sluiceway: Command, *arguments: str) -> dict[str, dict[str, object]]:
    code, out, errors = sluiceway("inspect", "shop:app", "--json", *arguments)
    assert (code, errors) == (0, "")
    return {one["name"]: one for one in json.loads(out)["consumers"]}


def test_every_option_is_shown_with_its_origin(sluiceway: Command) -> None:
    options = inspected(sluiceway, "--set", "payments.concurrency=20")["payments"]["options"]
    assert isinstance(options, dict)
    assert options["concurrency"] == {"value": "20", "origin": "command line"}
    assert options["order_by"] == {"value": "key", "origin": "consumer"}
    assert options["buffer_time"] == {"value": "0.25", "origin": "default"}
    assert options["group"] == {"value": "shop", "origin": "app"}
    assert options["batch_size"] == {"value": "50", "origin": "consumer"}  # said by @payments.batch
    assert options["batchers"] == {"value": "default", "origin": "consumer"}


def test_the_topology_is_shown(sluiceway: Command) -> None:
    views = inspected(sluiceway)
    assert views["payments"]["dead_letters"] == ["payments.created.shop.dead"]
    assert views["payments"]["runs_on"] == "tasks"
    assert views["payments"]["batchers"] == [
        {"name": "default", "size": 50, "seconds": 0.5, "keyed": True, "concurrency": 1}
    ]
    assert views["orders"]["runs_on"] == "threads"
    assert views["orders"]["dead_letters"] == ["{topic}.shop.dead"]


def test_the_window_and_other_guarantees_follow_from_options_and_broker(sluiceway: Command) -> None:
    views = inspected(sluiceway, "--set", "payments.max_demand=200")
    assert views["payments"]["window"] == [200, 200]
    assert views["orders"]["window"] == [10, 1000]
    guarantees = views["payments"]["guarantees"]
    assert isinstance(guarantees, dict)
    assert guarantees["order"] == "messages of one key one at a time, in order, over the whole group"
    assert guarantees["durable"].startswith("yes")
    assert guarantees["delivery"] == "at least once: acknowledged only after the handler and its batch"
    orders = views["orders"]["guarantees"]
    assert isinstance(orders, dict)
    assert "then dropped" in orders["failure"]


def test_the_default_batchers_size_follows_the_command_line(sluiceway: Command) -> None:
    (batcher,) = inspected(sluiceway, "--set", "payments.batch_size=7")["payments"]["batchers"]  # type: ignore[misc]
    assert batcher["size"] == 7
    assert batcher["seconds"] == 0.5


def test_nothing_is_connected_to(sluiceway: Command, here: Path) -> None:
    code, out, _ = sluiceway("inspect", "shop:app")
    assert code == 0
    assert "payments.created → group shop" in out
    assert not list(here.glob("shop.db*"))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("payment.concurrency=2", "there is no consumer 'payment'; did you mean 'payments'?"),
        ("payments.concurency=2", "there is no option 'concurency'; did you mean 'concurrency'?"),
        ("payments.concurrency=0", "payments: concurrency must be a whole number, 1 or more; got 0"),
        ("payments.concurrency=many", "payments: concurrency must be a whole number, 1 or more; got 'many'"),
        ("payments.max_demand=2", "payments: max_demand must be at least 105"),
        ("orders.batch_size=2", "orders: it has no default batcher, so batch_size would change nothing"),
        ("concurrency=2", "--set takes consumer.option=value, like payments.concurrency=20; got 'concurrency=2'"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_right(sluiceway: Command, setting: str, text: str) -> None:
    code, out, errors = sluiceway("inspect", "shop:app", "--set", setting)
    assert (code, out) == (2, "")
    assert text in errors
