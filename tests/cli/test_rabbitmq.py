"""The command line over RabbitMQ, which keeps nothing for groups that are not there and tells no age."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sluiceway import App
from sluiceway.message import Outgoing
from sluiceway.source import Subscription
from tests.transports.rabbitmq_kit import RabbitMQBroker, shared_server

Command = Callable[..., tuple[int, str, str]]

SHOP = """
from sluiceway import App
app = App({url!r}, group="shop")

@app.consumer("payments.created")
async def payments(message): raise AssertionError("a handler ran")

@app.consumer("payments.*", group="audit")
async def audit(message): raise AssertionError("a handler ran")

@app.consumer("orders")
async def orders(message): raise AssertionError("a handler ran")
"""


@pytest.fixture
def broker() -> RabbitMQBroker:
    return RabbitMQBroker(shared_server())


@pytest.fixture
def shop(here: Path, broker: RabbitMQBroker) -> str:
    """The URL of an app that nobody has run yet."""
    url = broker.url()
    (here / "shop.py").write_text(SHOP.format(url=url))
    return url


def waiting(sluiceway: Command) -> dict[str, tuple[int | None, float | None]]:
    code, out, errors = sluiceway("backlog", "shop:app", "--json")
    assert (code, errors) == (0, "")
    return {row["consumer"]: (row["messages"], row["seconds"]) for row in map(json.loads, out.splitlines())}


def test_what_is_published_before_the_first_run_waits_for_every_consumer_of_the_app(
    sluiceway: Command, shop: str
) -> None:
    assert waiting(sluiceway) == dict.fromkeys(("payments", "audit", "orders"), (None, None))
    code, out, errors = sluiceway("publish", "payments.created", "1", "2", "--app", "shop:app")
    assert code == 0, errors
    assert out.startswith("2 messages published: payments.created on amqp://")
    assert errors.splitlines() == [
        f"what {name} needs at the broker was made: it has not run yet" for name in ("payments", "audit")
    ]
    assert waiting(sluiceway) == {"payments": (2, None), "audit": (2, None), "orders": (None, None)}
    assert sluiceway("publish", "payments.created", "3", "--app", "shop:app")[::2] == (0, "")
    assert waiting(sluiceway)["payments"] == (3, None)


def test_a_url_alone_knows_no_consumers_so_nothing_is_made(sluiceway: Command, shop: str) -> None:
    code, out, errors = sluiceway("publish", "payments.created", "1", "--url", shop)
    assert (code, out) == (1, "")
    assert "1 of 1 message is not confirmed as published: no queue takes it" in errors
    assert "name its app with --app" in errors
    assert waiting(sluiceway)["payments"] == (None, None)


def test_what_may_not_be_made_is_said_and_published_to_those_that_are_there(
    sluiceway: Command, shop: str, here: Path
) -> None:
    async def only_the_audit() -> None:
        async with App(shop) as app:
            await app.transport.ensure([Subscription(topics=("payments.*",), group="audit", window=1)], create=True)
            await app.transport.publish([Outgoing("payments.created", b"0")])

    asyncio.run(only_the_audit())
    (here / "shop.py").write_text(SHOP.format(url=f"{shop}&declare=no"))
    code, _, errors = sluiceway("publish", "payments.created", "1", "--app", "shop:app")
    assert (code, errors.count("\n")) == (0, 1)
    assert errors.startswith("what payments needs at the broker cannot be made: ")
    assert waiting(sluiceway)["audit"] == (2, None)


def test_how_long_messages_wait_is_not_made_up(sluiceway: Command, shop: str) -> None:
    sluiceway("publish", "orders", "1", "--app", "shop:app")
    out = sluiceway("backlog", "shop:app", "--only", "orders")[1]
    assert out == "orders  1 message waiting; the broker cannot tell for how long\n"
    assert sluiceway("backlog", "shop:app", "--only", "orders", "--max-messages", "1")[0] == 0
    assert sluiceway("backlog", "shop:app", "--only", "orders", "--max-seconds", "3600")[0] == 1
