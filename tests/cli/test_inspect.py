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
    assert options["concurrency"] == {"value": 20, "origin": "command line"}
    assert options["order_by"] == {"value": "key", "origin": "consumer"}
    assert options["buffer_time"] == {"value": 0.25, "origin": "default"}
    assert options["group"] == {"value": "shop", "origin": "app"}
    assert options["batch_size"] == {"value": 50, "origin": "consumer"}  # said by @payments.batch
    assert options["batchers"] == {"value": "default", "origin": "consumer"}
    assert options["timeout"] == {"value": None, "origin": "default"}


def test_the_topology_is_shown(sluiceway: Command) -> None:
    views = inspected(sluiceway)
    assert views["payments"]["dead_letters"] == ["payments.created.shop.dead"]
    assert views["payments"]["runs_on"] == "tasks"
    assert views["payments"]["batchers"] == [
        {"name": "default", "size": 50, "seconds": 0.5, "keyed": True, "concurrency": 1, "split": None}
    ]
    assert views["orders"]["runs_on"] == "threads"
    assert views["orders"]["dead_letters"] == ["{topic}.shop.dead"]


def test_the_delays_of_retries_are_those_that_the_attempts_can_reach(sluiceway: Command) -> None:
    def failure(retry: str) -> object:
        guarantees = inspected(sluiceway, "--set", f"payments.retry={retry}")["payments"]["guarantees"]
        assert isinstance(guarantees, dict)
        return guarantees["failure"].partition(", then")[0]

    assert failure('{"attempts": 4}') == "4 attempts, 0.5 to 4 s apart"
    assert failure('{"attempts": 4, "jitter": 0}') == "4 attempts, 1 to 4 s apart"
    assert failure('{"attempts": 2, "base_delay": 3600, "jitter": 0.1}') == "2 attempts, 3240 to 3600 s apart"
    assert failure('{"attempts": 2, "base_delay": 3600, "jitter": 0}') == "2 attempts, 3600 s apart"
    assert failure('{"attempts": 20, "max_delay": 60}') == "20 attempts, 0.5 to 60 s apart"
    assert failure('{"attempts": 1}') == "no retry"


def test_retries_for_ever_are_told_with_the_delay_that_they_grow_to(sluiceway: Command) -> None:
    def failure(retry: str) -> object:
        settings = ("--set", "payments.exhausted=retry", "--set", f"payments.retry={retry}")
        guarantees = inspected(sluiceway, *settings)["payments"]["guarantees"]
        assert isinstance(guarantees, dict)
        return guarantees["failure"].partition(";")[0]

    assert failure("{}") == "tried for ever, 0.5 to 300 s apart"
    assert failure('{"multiplier": 1, "base_delay": 8}') == "tried for ever, 4 to 8 s apart"


def test_the_share_of_a_delay_that_is_left_to_chance_is_shown(sluiceway: Command) -> None:
    out = sluiceway("inspect", "shop:app", "--set", 'payments.retry={"jitter": 0.25}')[1]
    assert "4 attempts, 1 s × 2, at most 300 s, each up to 25 % less by chance" in out
    out = sluiceway("inspect", "shop:app", "--set", 'payments.retry={"jitter": 0}')[1]
    assert "4 attempts, 1 s × 2, at most 300 s  " in out


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


FULL = """
from sluiceway import App, Batch, CircuitBreaker, Message, Pause, RateLimit, Split
from sluiceway.middleware.logging import Logging


async def traced(message, call_next):
    return await call_next(message)


async def committed(batch, call_next):
    return await call_next(batch)


class Night:
    def allow(self, now, wanted): return wanted
    def took(self, now, count): ...
    def opens_at(self, now): return None
    def on_change(self, call): ...


app = App("memory://", middleware=[Logging()], batch_middleware=[committed])
database = CircuitBreaker("database", failures=3, reset_after=5)


@app.consumer("a", middleware=[traced], gates=[RateLimit(100, 60), RateLimit(5, 1, burst=1), database, Night()])
def a(message: Message[int]) -> int: ...


@a.batch(split=Split.bytes(1_000_000))
async def book(batch: Batch[int]) -> None: ...


@app.consumer("b")
def b(message: Message[int]) -> None: ...
"""


def test_middleware_splits_and_gates_are_shown_with_their_figures(sluiceway: Command, here: Path) -> None:
    (here / "full.py").write_text(FULL)
    code, out, errors = sluiceway("inspect", "full:app", "--json")
    assert (code, errors) == (0, "")
    a, b = json.loads(out)["consumers"]
    assert a["middleware"] == ["Logging", "traced"]
    assert a["batch_middleware"] == ["committed"]
    assert a["gates"] == [
        "RateLimit of 100 in 60 s",
        "RateLimit of 5 in 1 s, 1 at once",
        "CircuitBreaker 'database', closed: 3 failures in 10 s open it, for 5 to 300 s",
        "Night",
    ]
    assert a["batchers"][0]["split"] == "1,000,000 bytes"
    assert (b["middleware"], b["gates"], b["runs_on"]) == (["Logging"], [], "tasks")
    _, out, _ = sluiceway("inspect", "full:app")
    for line in (
        "→ batches default: 100 messages or 1 s, split by 1,000,000 bytes",
        "→ middleware Logging, traced",
        "→ batch middleware committed",
        "→ gate RateLimit of 100 in 60 s",
    ):
        assert f"    {line}\n" in out


REFUSED = {
    "process and prepare": """
@app.consumer("t", executor="process")
async def pay(message: Message[int]) -> None: ...

@pay.prepare
async def load(messages) -> None: ...
""",
    "process and a middleware that decodes": """
from sluiceway.middleware.decode import Decode

@app.consumer("t", executor="process", middleware=[Decode()])
async def pay(message: Message[int]) -> None: ...
""",
    "idempotency and batches": """
from sluiceway.middleware.idempotency import Idempotency, MemoryStore

@app.consumer("t", middleware=[Idempotency(MemoryStore())])
async def pay(message: Message[int]) -> None: ...

@pay.batch()
async def book(batch) -> None: ...
""",
    "middleware of messages round batches": """
from sluiceway.middleware.logging import Logging

@app.consumer("t", batch_middleware=[Logging()])
class pay(Consumer[int]):
    async def handle_batch(self, batch) -> None: ...
""",
    "options of batches and no batch handler": """
@app.consumer("t", batch_size=5)
async def pay(message: Message[int]) -> None: ...
""",
    "a context and no lifespan": """
@app.consumer("t")
async def pay(message: Message[int], database) -> None: ...
""",
    "a class with a context and no lifespan": """
@app.consumer("t")
class pay(Consumer[int]):
    def __init__(self, database) -> None: ...
    async def handle(self, message) -> None: ...
""",
    "a payload that cannot be decoded": """
@app.consumer("t", payload=object())
async def pay(message) -> None: ...
""",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_start_refuses_is_refused_with_the_same_words(sluiceway: Command, here: Path, name: str) -> None:
    (here / "wrong.py").write_text(
        "from sluiceway import App, Consumer, Message\napp = App('memory://')\n" + REFUSED[name]
    )
    started, events, _ = sluiceway("run", "wrong:app", "--until-empty", "--json")
    code, out, said = sluiceway("inspect", "wrong:app")
    assert (started, code, out) == (2, 2, "")
    assert said == f"Error: {json.loads(events)['reason']}\n"
