"""`sluiceway dlq`: dead letters are seen, sent back and deleted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sluiceway import App, Retry
from sluiceway._decisions.policy import DEAD_PREFIX, FailureRules, dead_letter, reason_of
from sluiceway.cli.dead import Letter
from sluiceway.cli.show import table_of
from sluiceway.message import Message, Outgoing, Stored
from sluiceway.source import Subscription
from sluiceway.transports.sqlite import SQLiteTransport
from tests.cli.kit import Shell

Command = Callable[..., tuple[int, str, str]]
URL = "sqlite:///shop.db"
DEAD = "payments.created.shop.dead"
RULES = FailureRules(consumer="payments", group="shop", retry=Retry())


def letter(number: int, body: bytes | None = None, error: Exception | None = None) -> Outgoing:
    """The dead letter of a message that was number so-and-so."""
    message: Message[object] = Message(
        "payments.created", body or f'{{"n": {number}}}'.encode(), f"id-{number}", key=f"key-{number}",
        headers={"from": "test"}, timestamp=1_000.5, failures=3,
    )  # fmt: skip
    try:
        raise error or ValueError(f"unlucky {number}")
    except Exception as raised:
        return dead_letter(message, reason_of(raised), RULES, now=2_000.0 + number)


def publish(*messages: Outgoing) -> None:
    async def work() -> None:
        async with App(URL) as app:
            for group in ("shop", "audit"):
                await app.transport.ensure(
                    [Subscription(topics=("payments.created",), group=group, window=1)], create=True
                )
            await app.transport.publish(messages)

    asyncio.run(work())


def stored(topic: str) -> list[Stored]:
    async def read() -> list[Stored]:
        async with App(URL) as app:
            return [one async for one in app.transport.browse(topic)]

    return asyncio.run(read())


def waiting(group: str) -> list[Message[object]]:
    """What a group would receive now."""

    async def read() -> list[Message[object]]:
        async with App(URL) as app:
            source = await app.transport.subscribe(Subscription(topics=("payments.created",), group=group, window=100))
            try:
                backlog = await source.backlog()
                return list(await source.receive(100)) if backlog is not None and backlog.messages else []
            finally:
                await source.aclose()

    return asyncio.run(read())


@pytest.fixture(autouse=True)
def shop(here: Path) -> None:
    (here / "shop.py").write_text(
        f"from sluiceway import App\napp = App({URL!r}, group='shop')\n"
        "@app.consumer('payments.created')\nasync def payments(message): ...\n"
        "@app.consumer('orders.*')\nasync def orders(message): ...\n"
    )


@pytest.mark.parametrize("name", [DEAD, "payments", "payments.created"])
def test_dead_letters_are_found_by_their_topic_the_consumer_or_the_consumed_topic(
    sluiceway: Command, name: str
) -> None:
    publish(letter(1), letter(2))
    code, out, _ = sluiceway("dlq", "list", name, "--app", "shop:app")
    assert code == 0
    assert "id-1" in out
    assert "id-2" in out
    assert f"{DEAD}: 2 dead letters: ValueError 2" in out


def test_without_an_app_topic_and_group_say_where(sluiceway: Command, here: Path) -> None:
    publish(letter(1))
    (here / "shop.py").unlink()
    assert "1 dead letter" in sluiceway("dlq", "list", "payments.created", "--group", "shop", "--url", URL)[1]


def test_a_limit_shows_the_oldest_and_counts_all(sluiceway: Command) -> None:
    publish(*map(letter, range(30)))
    out = sluiceway("dlq", "list", "payments", "--app", "shop:app", "--limit", "3")[1]
    assert len(out.splitlines()) == 5
    assert "30 dead letters, the oldest 3 shown (--limit 0 for all)" in out


def test_json_lists_one_object_per_line(sluiceway: Command) -> None:
    publish(letter(1), letter(2))
    out = sluiceway("dlq", "list", "payments", "--json")[1]
    first, second = map(json.loads, out.splitlines())
    assert (first["id"], second["id"]) == ("id-1", "id-2")
    assert (first["topic"], first["attempts"], first["error"]) == ("payments.created", 4, "unlucky 1")
    assert (first["published_at"], first["failed_at"]) == (1_000.5, 2_001.0)


def test_numbers_that_a_strangers_dead_letter_does_not_have_are_not_made_up(sluiceway: Command) -> None:
    strange = {"attempts": "many", "published-at": "nan", "failed-at": "1e300"}
    headers = {f"sluiceway-dead-{name}": value for name, value in strange.items()}
    publish(Outgoing(DEAD, b"1", id="id-1", headers=headers, timestamp=3_000.5))
    told = json.loads(sluiceway("dlq", "list", "payments", "--json")[1])
    assert (told["attempts"], told["published_at"], told["failed_at"]) == (None, 3_000.5, 3_000.5)
    assert "at attempt ?" in sluiceway("dlq", "show", "payments", "--id", "id-1")[1]


def test_a_stranger_cannot_write_to_the_terminal(sluiceway: Command) -> None:
    publish(letter(1, b"\x1b[2J", ValueError("\x1b[2Jgone\x07")))
    for arguments in (["list", "payments"], ["show", "payments", "--id", "id-1"]):
        code, out, _ = sluiceway("dlq", *arguments)
        assert code == 0
        assert "\\x1b[2Jgone" in out
        assert "\x07" not in out
        assert "\x1b[2J" not in out


def test_a_dead_letter_is_shown_whole(sluiceway: Command) -> None:
    publish(letter(1))
    out = sluiceway("dlq", "show", "payments", "--id", "id-1")[1]
    for part in (
        "payments.created, group shop, consumer payments",
        "ValueError: unlucky 1",
        "from: test",
        '"n": 1',
        "Traceback",
    ):
        assert part in out


def test_a_binary_body_is_shown_as_hex_and_as_base64(sluiceway: Command) -> None:
    publish(letter(1, b"\xff\xfe\x00abc"))
    assert "ff fe 00 61 62 63" in sluiceway("dlq", "show", "payments", "--id", "id-1")[1]
    assert json.loads(sluiceway("dlq", "show", "payments", "--id", "id-1", "--json")[1])["body_base64"] == "//4AYWJj"


def test_an_id_that_is_not_there_is_an_error_and_nothing_is_done(sluiceway: Command) -> None:
    publish(letter(1))
    for command in (["show"], ["replay", "--yes"], ["purge", "--yes"]):
        code, _, errors = sluiceway("dlq", command[0], "payments", "--id", "id-1", "--id", "id-9", *command[1:])
        if command[0] != "show":
            assert code == 2
            assert f"no dead letter in {DEAD} has the id id-9; nothing was done" in errors
    assert len(stored(DEAD)) == 1


def test_replay_reaches_the_group_that_failed_and_no_other_as_it_was(sluiceway: Command) -> None:
    publish(letter(1))
    assert sluiceway("dlq", "replay", "payments", "--yes")[:2] == (0, "1 message replayed\n")
    assert stored(DEAD) == []
    (message,) = waiting("shop")
    assert waiting("audit") == []
    assert (message.id, message.key, message.body) == ("id-1", "key-1", b'{"n": 1}')
    assert dict(message.headers) == {"from": "test"}
    assert message.attempt == 1
    assert message.timestamp == 1_000.5


def test_replay_to_a_topic_reaches_every_group_of_it(sluiceway: Command) -> None:
    publish(letter(1))
    assert sluiceway("dlq", "replay", "payments", "--to", "payments.created", "--yes")[0] == 0
    assert [one.id for one in waiting("shop")] == ["id-1"]
    assert [one.id for one in waiting("audit")] == ["id-1"]


def test_replay_to_a_misspelt_topic_is_refused_and_nothing_is_lost(sluiceway: Command) -> None:
    publish(letter(1))
    code, _, errors = sluiceway("dlq", "replay", "payments", "--to", "payments.creatd", "--yes")
    assert code != 0
    assert "did you mean 'payments.created'? Nothing was replayed" in errors
    assert [one.id for one in stored(DEAD)] == ["id-1"]


def test_replay_takes_ids_and_limits(sluiceway: Command) -> None:
    publish(*map(letter, range(5)))
    sluiceway("dlq", "replay", "payments", "--yes", "--id", "id-3")
    sluiceway("dlq", "replay", "payments", "--yes", "--limit", "2")
    assert [one.id for one in stored(DEAD)] == ["id-2", "id-4"]


def test_many_are_replayed_in_batches(sluiceway: Command) -> None:
    publish(*map(letter, range(1_001)))
    assert sluiceway("dlq", "replay", "payments", "--yes")[1] == "1,001 messages replayed\n"
    assert stored(DEAD) == []


@pytest.mark.parametrize("command", ["replay", "purge"])
def test_a_dry_run_does_nothing(sluiceway: Command, command: str) -> None:
    publish(letter(1), letter(2))
    code, out, _ = sluiceway("dlq", command, "payments", "--dry-run")
    assert code == 0
    assert out.startswith("would ")
    assert "2" in out
    assert len(stored(DEAD)) == 2


@pytest.mark.parametrize("command", ["replay", "purge"])
def test_without_a_terminal_to_ask_on_yes_is_needed(shell: Shell, here: Path, command: str) -> None:
    publish(letter(1))
    done = shell("dlq", command, "payments")
    assert done.returncode == 2
    assert "say --yes" in done.stderr
    assert len(stored(DEAD)) == 1


def test_purge_deletes(sluiceway: Command) -> None:
    publish(*map(letter, range(3)))
    assert sluiceway("dlq", "purge", "payments", "--yes", "--limit", "2")[:2] == (0, "2 dead letters deleted\n")
    assert [one.id for one in stored(DEAD)] == ["id-2"]


def test_a_letter_that_does_not_say_where_from_is_kept_and_told_of(sluiceway: Command) -> None:
    stranger = Outgoing(DEAD, b"?", id="stranger", headers={DEAD_PREFIX + "topic": "payments.created"})
    publish(letter(1), stranger)
    code, out, errors = sluiceway("dlq", "replay", "payments", "--yes")
    assert (code, out) == (1, "1 message replayed\n")
    assert "1 message does not say where from; --to TOPIC says where to" in errors
    assert [one.id for one in stored(DEAD)] == ["stranger"]
    assert sluiceway("dlq", "list", "payments")[0] == 0


def test_what_fails_again_while_it_is_replayed_is_not_replayed_again(shell: Shell, here: Path) -> None:
    shell.shop()
    shell("publish", "payments.created", *["13"] * 300)
    running = shell.start("run", "shop:app", "--json", "--log-level", "error")
    running.until("status", lambda event: event["consumers"][0]["dead_lettered"] == 300)
    done = shell("dlq", "replay", "payments", "--yes")  # the consumer runs on, and they all fail again
    assert done.stdout == "300 messages replayed\n", done.stderr
    running.until("status", lambda event: event["consumers"][0]["dead_lettered"] == 600)
    assert len(stored(DEAD)) == 300


def of_topic(topic: str, number: int) -> Outgoing:
    """A dead letter that a consumer of `orders.*` would have of a topic."""
    return msgspec.structs.replace(letter(number), topic=f"{topic}.shop.dead")


@pytest.mark.parametrize("name", ["orders", "orders.*"])
def test_the_dead_letters_of_a_patterns_consumer_are_found(sluiceway: Command, name: str) -> None:
    publish(of_topic("orders.eu", 1), of_topic("orders.us", 2), of_topic("refunds.eu", 3), letter(4))
    code, out, errors = sluiceway("dlq", "list", name, "--json")
    assert (code, errors) == (0, "")
    found = {(one["dead_letter_topic"], one["id"]) for one in map(json.loads, out.splitlines())}
    assert found == {("orders.eu.shop.dead", "id-1"), ("orders.us.shop.dead", "id-2")}
    _, out, _ = sluiceway("dlq", "list", "--json")
    assert {json.loads(line)["id"] for line in out.splitlines()} == {"id-1", "id-2", "id-4"}
    assert "id-2" in sluiceway("dlq", "show", name, "--id", "id-2")[1]


def test_a_topic_that_a_pattern_matches_has_the_dead_letters_of_the_patterns_group(
    sluiceway: Command, here: Path
) -> None:
    (here / "shop.py").write_text(
        f"from sluiceway import App\napp = App({URL!r})\n"
        "@app.consumer('orders.*', group='shop')\nasync def orders(message): ...\n"
    )
    publish(of_topic("orders.eu", 1), of_topic("orders.us", 2))
    code, out, errors = sluiceway("dlq", "list", "orders.eu", "--json")
    assert (code, errors, json.loads(out)["id"]) == (0, "", "id-1")


def test_a_purge_of_a_pattern_spares_what_another_consumer_reads_more_exactly(sluiceway: Command, here: Path) -> None:
    with (here / "shop.py").open("a") as file:
        file.write("@app.consumer('orders.eu')\nasync def eu(message): ...\n")
    publish(of_topic("orders.eu", 1), of_topic("orders.us", 2))
    assert sluiceway("dlq", "purge", "orders", "--yes")[1] == "1 dead letter deleted\n"
    assert [one.id for one in stored("orders.eu.shop.dead")] == ["id-1"]
    assert stored("orders.us.shop.dead") == []


def test_a_pattern_without_dead_letters_says_so(sluiceway: Command) -> None:
    publish(letter(1))
    assert sluiceway("dlq", "list", "orders") == (0, "orders.*.shop.dead: no dead letters\n", "")
    assert sluiceway("dlq", "replay", "orders", "--yes")[1] == "nothing to replay in orders.*.shop.dead\n"


def test_where_the_broker_cannot_say_which_there_are_one_is_named(
    sluiceway: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(letter(1))
    monkeypatch.delattr(SQLiteTransport, "dead_letter_topics")
    text = "sqlite:///shop.db cannot say which topics match orders.*.shop.dead: name one, like orders.eu.shop.dead"
    code, _, errors = sluiceway("dlq", "list", "orders")
    assert (code, errors) == (2, f"Error: {text}\n")
    code, out, errors = sluiceway("dlq", "list", "--json")
    assert (code, errors, json.loads(out)["id"]) == (0, f"{text}\n", "id-1")


def test_a_database_that_is_not_there_is_not_made(sluiceway: Command, here: Path) -> None:
    code, _, errors = sluiceway("dlq", "list", "payments")
    assert code == 3
    assert "shop.db is not there" in errors
    assert not (here / "shop.db").exists()


def test_on_a_terminal_a_long_message_gives_way_and_the_id_does_not(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(letter(1, error=ValueError("long " * 100)), letter(2))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "90")
    head, *rows = table_of([Letter(one) for one in stored(DEAD)]).splitlines()
    for name in ("id", "age", "from", "attempts", "error", "message"):
        assert name in head
    for number, row in enumerate(rows, 1):
        assert f"id-{number}" in row
        assert "payments.created" in row
        assert "ValueError" in row
    assert "long long" in rows[0]
    assert "…" in rows[0]
    assert len(rows[0]) <= 90


def test_a_misspelt_name_is_asked_about(sluiceway: Command) -> None:
    publish(letter(1))
    code, out, errors = sluiceway("dlq", "list", "paymets")
    assert (code, out) == (0, "paymets.shop.dead: no dead letters\n")
    assert errors == "no consumer of the app is called 'paymets' or reads that; did you mean 'payments'?\n"
    code, out, errors = sluiceway("dlq", "list", "payment.created.shop.dead")
    assert (code, out) == (0, "payment.created.shop.dead: no dead letters\n")
    assert errors.endswith("did you mean 'payments.created.shop.dead'?\n")


def test_a_file_of_another_program_is_refused_in_one_line(sluiceway: Command, here: Path) -> None:
    (here / "letter.db").write_text("this is a letter to a friend of mine, and no database" * 100)
    code, out, errors = sluiceway("dlq", "list", "payments", "--url", "sqlite:///letter.db")
    assert (code, out) == (3, "")
    assert errors.count("\n") == 1
    assert "is not a SQLite database" in errors
