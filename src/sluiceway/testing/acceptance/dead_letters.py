"""`sluiceway dlq` over the transport: list, show, replay, purge."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

from ...message import Message
from ...retry import Retry
from .guarantees import guarantee
from .kit import Kit, bodies, numbered

DEAD = "t.g.dead"


async def dlq(kit: Kit, *arguments: str) -> tuple[int, str, str]:
    """Run `sluiceway dlq` in a process of its own; returns its exit code and what it said."""
    url = kit.broker.url()
    assert url is not None
    command = [sys.executable, "-m", "sluiceway", "dlq", *arguments, "--url", url, "--group", "g"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLUICEWAY_")}
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    return done.returncode, done.stdout, done.stderr


async def fail(kit: Kit, *given: bytes) -> list[str]:
    """Let a pipeline dead-letter messages; returns their ids."""
    app = kit.app()

    @app.consumer("t", retry=Retry(attempts=1))
    async def handle(message: Message[bytes]) -> None:
        raise ValueError(f"unlucky {message.body.decode()}")

    async with app.running() as manager:
        sent = await kit.publish("t", *given, key="k", headers={"from": "test"})
        await kit.until(lambda: manager.stats()[0].finished >= len(given), "all have failed")
        await kit.until(lambda: not manager.stats()[0].held, "all are dead letters")
    return [message.id for message in sent]


@guarantee("at rest", needs=("durable", "browse"), hooks="url")
async def test_dead_letters_are_listed_and_shown_and_stay(kit: Kit) -> None:
    first, _ = await fail(kit, b"1", b"2")
    code, out, errors = await dlq(kit, "list", "t", "--json")
    assert code == 0, errors
    listed: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert sorted((one["topic"], one["error"]) for one in listed) == [("t", "unlucky 1"), ("t", "unlucky 2")]
    code, out, errors = await dlq(kit, "show", "t", "--id", first)
    assert code == 0, errors
    assert "ValueError: unlucky 1" in out
    assert sorted(await kit.at_rest(DEAD)) == [b"1", b"2"]


@guarantee("at rest", "G8", needs=("durable", "browse"), hooks="url")
async def test_a_replay_reaches_the_group_that_failed_and_no_other_as_it_was(kit: Kit) -> None:
    other = await kit.open("t", group="other")
    (id_,) = await fail(kit, b"1")
    await kit.take(other, 1)
    code, out, errors = await dlq(kit, "replay", "t", "--yes")
    assert (code, out) == (0, "1 message replayed\n"), errors
    message = await kit.one(await kit.open("t"))
    assert (message.id, message.body, message.key, message.attempt) == (id_, b"1", "k", 1)
    assert dict(message.headers) == {"from": "test"}
    await kit.nothing(other)
    assert await kit.at_rest(DEAD) == []


@guarantee("at rest", needs=("durable", "browse"), hooks="url")
async def test_a_replay_of_what_fails_again_meanwhile_ends(kit: Kit) -> None:
    """Each is replayed once, though it is a dead letter again at once."""
    await fail(kit, *numbered(50))
    app = kit.app()

    @app.consumer("t", retry=Retry(attempts=1))
    async def handle(message: Message[bytes]) -> None:
        raise ValueError("again")

    async with app.running() as manager:
        code, out, errors = await dlq(kit, "replay", "t", "--yes")
        assert (code, out) == (0, "50 messages replayed\n"), errors
        await kit.until(lambda: manager.stats()[0].finished >= 50, "all have failed again")
        await kit.until(lambda: not manager.stats()[0].held, "all are dead letters again")
    assert sorted(await kit.at_rest(DEAD)) == sorted(numbered(50))


@guarantee("at rest", needs=("durable", "browse"), hooks="url")
async def test_a_replay_whose_publish_is_refused_deletes_nothing(kit: Kit) -> None:
    await fail(kit, b"1")
    code, _, errors = await dlq(kit, "replay", "t", "--yes", "--to", "not..a.topic")
    assert code != 0, errors
    assert await kit.at_rest(DEAD) == [b"1"]


@guarantee("at rest", needs=("durable", "browse"), lacks="retains", hooks="url")
async def test_a_replay_to_a_topic_that_nobody_wants_is_refused_and_deletes_nothing(kit: Kit) -> None:
    await fail(kit, b"1", b"2")
    code, _, errors = await dlq(kit, "replay", "t", "--yes", "--to", "nobody")
    assert code != 0, errors
    assert sorted(await kit.at_rest(DEAD)) == [b"1", b"2"]


@guarantee("at rest", needs=("durable", "browse"), hooks="url")
async def test_a_purge_deletes_what_it_names_and_nothing_else(kit: Kit) -> None:
    first, *_ = await fail(kit, *numbered(4))
    assert (await dlq(kit, "purge", "t", "--id", first, "--yes"))[:2] == (0, "1 dead letter deleted\n")
    assert sorted(await kit.at_rest(DEAD)) == numbered(4)[1:]
    assert (await dlq(kit, "purge", "t", "--dry-run"))[0] == 0
    assert len(await kit.at_rest(DEAD)) == 3
    assert (await dlq(kit, "purge", "t", "--yes"))[0] == 0
    assert bodies([one async for one in kit.transport.browse(DEAD)]) == []
