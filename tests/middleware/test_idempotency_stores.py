"""What every store of idempotency promises: claims are leases with a token, and what is done stays done."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sluiceway import OptionError
from sluiceway.middleware.idempotency import Claim, MemoryStore, Store
from sluiceway.middleware.idempotency.sqlite import SQLiteStore
from tests.middleware.redis_server import redis_server

LONG = 60.0
SHORT = 0.15  # seconds, real: Redis and SQLite have clocks of their own
LATER = 0.25


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
    elif request.param == "sqlite":
        async with SQLiteStore(tmp_path / "keys.db") as store:
            yield store
    else:
        from sluiceway.middleware.idempotency.redis import RedisStore

        async with RedisStore(request.getfixturevalue("redis_url"), prefix=f"{tmp_path}:") as redis_store:
            yield redis_store


async def test_a_key_is_one_claimants_until_it_is_done_and_then_done_for_all(store: Store) -> None:
    assert await store.claim("k", "a", LONG) == Claim("claimed")
    assert await store.claim("k", "b", LONG) == Claim("busy")
    assert await store.claim("other", "b", LONG) == Claim("claimed")
    assert await store.done("k", "a", b"\x00result", LONG)
    assert await store.claim("k", "b", LONG) == Claim("done", b"\x00result")
    assert await store.claim("k", "a", LONG) == Claim("done", b"\x00result")


async def test_a_key_may_be_done_with_no_result(store: Store) -> None:
    await store.claim("k", "a", LONG)
    assert await store.done("k", "a", b"", LONG)
    assert await store.claim("k", "b", LONG) == Claim("done", b"")


async def test_a_released_key_is_free_at_once_and_a_second_release_does_nothing(store: Store) -> None:
    await store.claim("k", "a", LONG)
    await store.release("k", "a")
    assert await store.claim("k", "b", LONG) == Claim("claimed")
    await store.release("k", "a")
    assert await store.claim("k", "c", LONG) == Claim("busy")


async def test_a_claim_that_nobody_renews_runs_out(store: Store) -> None:
    await store.claim("k", "a", SHORT)
    await asyncio.sleep(LATER)
    assert await store.claim("k", "b", LONG) == Claim("claimed")


async def test_a_renewed_claim_lasts(store: Store) -> None:
    await store.claim("k", "a", SHORT)
    assert await store.renew("k", "a", LONG)
    await asyncio.sleep(LATER)
    assert await store.claim("k", "b", LONG) == Claim("busy")


async def test_whoever_lost_its_claim_can_neither_renew_nor_release_nor_finish_the_next_ones(store: Store) -> None:
    await store.claim("k", "a", SHORT)
    await asyncio.sleep(LATER)
    await store.claim("k", "b", LONG)
    assert not await store.renew("k", "a", LONG)
    await store.release("k", "a")
    assert not await store.done("k", "a", b"late", LONG)
    assert await store.claim("k", "c", LONG) == Claim("busy")
    assert await store.done("k", "b", b"right", LONG)
    assert not await store.done("k", "a", b"late", LONG)
    assert await store.claim("k", "c", LONG) == Claim("done", b"right")


async def test_a_claim_that_ran_out_and_that_nobody_took_can_still_be_done(store: Store) -> None:
    await store.claim("k", "a", SHORT)
    await asyncio.sleep(LATER)
    assert await store.done("k", "a", b"late", LONG)
    assert await store.claim("k", "b", LONG) == Claim("done", b"late")


async def test_what_is_done_cannot_be_released_renewed_or_done_again(store: Store) -> None:
    await store.claim("k", "a", LONG)
    await store.done("k", "a", b"first", LONG)
    await store.release("k", "a")
    assert not await store.renew("k", "a", LONG)
    assert not await store.done("k", "a", b"second", LONG)
    assert await store.claim("k", "b", LONG) == Claim("done", b"first")


async def test_what_is_done_is_known_for_its_time_and_no_longer(store: Store) -> None:
    await store.claim("k", "a", LONG)
    await store.done("k", "a", b"", SHORT)
    await asyncio.sleep(LATER)
    assert await store.claim("k", "b", LONG) == Claim("claimed")


async def test_of_many_who_claim_at_once_one_gets_it(store: Store) -> None:
    claims = await asyncio.gather(*(store.claim("k", f"token {n}", LONG) for n in range(20)))
    assert [claim.state for claim in claims].count("claimed") == 1
    assert [claim.state for claim in claims].count("busy") == 19


# -- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_memory_forgets_what_was_asked_for_least_recently_and_no_claim() -> None:
    store = MemoryStore(size=2)
    await store.claim("running", "a", LONG)
    for key in ("1", "2"):
        await store.claim(key, "a", LONG)
        await store.done(key, "a", b"", LONG)
    assert (await store.claim("1", "b", LONG)).state == "done"  # asked for: 2 is the oldest now
    await store.claim("3", "a", LONG)
    await store.done("3", "a", b"", LONG)
    assert (len(store._done), len(store._claimed)) == (2, 1)
    states = {key: (await store.claim(key, "b", LONG)).state for key in ("running", "1", "2", "3")}
    assert states == {"running": "busy", "1": "done", "2": "claimed", "3": "done"}


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "1"])
def test_a_size_that_cannot_be_is_an_option_error(size: Any) -> None:
    with pytest.raises(OptionError, match="MemoryStore: size must be 1 or more keys"):
        MemoryStore(size)


@pytest.mark.parametrize("path", [5, None, "", b"a.db"])
def test_a_path_that_names_no_file_is_an_option_error(path: Any) -> None:
    with pytest.raises(OptionError, match=r"SQLiteStore: path must name a file, like 'idempotency\.db'; got "):
        SQLiteStore(path)


def test_a_time_to_wait_that_cannot_be_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="SQLiteStore: busy_timeout must be seconds, more than 0; got -1"):
        SQLiteStore(busy_timeout=-1)


def test_what_is_no_redis_is_an_option_error() -> None:
    from sluiceway.middleware.idempotency.redis import RedisStore

    with pytest.raises(OptionError, match=r"RedisStore: redis must be a URL or a redis\.asyncio\.Redis; got 5"):
        RedisStore(5)  # type: ignore[arg-type]


# -- SQLite ----------------------------------------------------------------------------------------------------------

CLAIM_AND_DIE = """
import asyncio, os, signal, sys
from sluiceway.middleware.idempotency.sqlite import SQLiteStore

async def main():
    store = SQLiteStore(sys.argv[1])
    for key, lease in (("dead", 0.1), ("running", 60.0)):
        assert (await store.claim(key, "theirs", lease)).state == "claimed"
    await store.claim("done", "theirs", 60.0)
    await store.done("done", "theirs", b"result", 60.0)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_sqlite_keeps_claims_and_what_is_done_when_the_process_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.db")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CLAIM_AND_DIE, path)
    assert await process.wait() == -9
    await asyncio.sleep(0.2)
    async with SQLiteStore(path) as store:
        assert (await store.claim("dead", "ours", LONG)).state == "claimed"
        assert (await store.claim("running", "ours", LONG)).state == "busy"
        assert await store.claim("done", "ours", LONG) == Claim("done", b"result")


MANY_CLAIMS = """
import asyncio, sys
from sluiceway.middleware.idempotency.sqlite import SQLiteStore

async def main():
    async with SQLiteStore(sys.argv[1]) as store:
        for n in range(200):
            if (await store.claim(str(n), sys.argv[2], 60.0)).state == "claimed":
                print(n)

asyncio.run(main())
"""


def test_sqlite_gives_each_key_to_one_of_several_processes(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.db")
    command = [sys.executable, "-c", MANY_CLAIMS, path]
    running = [subprocess.Popen([*command, token], stdout=subprocess.PIPE, text=True) for token in "abc"]
    claimed = [int(line) for one in running for line in one.communicate(timeout=60)[0].split()]
    assert [one.returncode for one in running] == [0, 0, 0]
    assert sorted(claimed) == list(range(200))


async def test_sqlite_forgets_keys_that_have_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluiceway.middleware.idempotency.sqlite.SWEEP", 0.0)
    async with SQLiteStore(tmp_path / "keys.db") as store:
        for n in range(10):
            await store.claim(str(n), "a", 0.01)
        await asyncio.sleep(0.05)
        await store.claim("new", "a", LONG)
        (left,) = (await store._call(lambda: store._open().execute("SELECT count(*) FROM idempotency"))).fetchone()
        assert left == 1


async def test_sqlite_opens_again_after_a_close_and_a_second_close_does_nothing(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "keys.db")
    await store.claim("k", "a", LONG)
    await store.aclose()
    await store.aclose()
    assert (await store.claim("k", "b", LONG)).state == "busy"
    await store.aclose()


# -- Redis -----------------------------------------------------------------------------------------------------------


async def test_redis_lets_every_key_expire_and_keeps_a_client_that_was_given_open(redis_url: str) -> None:
    from redis.asyncio import Redis

    from sluiceway.middleware.idempotency.redis import RedisStore

    client: Any = Redis.from_url(redis_url)
    async with RedisStore(client, prefix="mine:") as store:
        await store.claim("claimed", "a", LONG)
        await store.claim("done", "a", LONG)
        await store.done("done", "a", b"", 2 * LONG)
    assert LONG - 5 < await client.ttl("mine:claimed") <= LONG
    assert 2 * LONG - 5 < await client.ttl("mine:done") <= 2 * LONG
    await client.aclose()
