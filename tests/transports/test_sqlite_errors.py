"""What is said when the file, the folder, the disk or an option is not as it must be."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from sluiceway.errors import ConnectError, OptionError, PayloadTooLarge, PublishError, TransportError
from sluiceway.message import Outgoing, Settlement
from sluiceway.transports.sqlite import SQLiteSource, SQLiteTransport
from tests.transports.sqlite_kit import bodies, connected, get, numbered, publish, subscribe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


async def refusal(path: Path) -> str:
    """What connect says."""
    with pytest.raises(ConnectError) as caught:
        await SQLiteTransport(path).connect()
    return str(caught.value)


async def until_blocked(source: SQLiteSource) -> str:
    """What the source says is wrong, once it does."""
    async with asyncio.timeout(10):
        while (status := source.status()).state != "blocked":  # noqa: ASYNC110  # it can only be asked
            await asyncio.sleep(0.01)
    return str(status.error)


# -- the file and its folder


async def test_a_folder_is_no_database(tmp_path: Path) -> None:
    assert await refusal(tmp_path) == (f"cannot open the SQLite database {tmp_path}: it is a folder; name a file in it")


async def test_the_folder_must_be_there(tmp_path: Path) -> None:
    text = await refusal(tmp_path / "no" / "shop.db")
    assert text.endswith(f"there is no folder {tmp_path}/no; create it first")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_the_folder_must_be_writable(path: Path) -> None:
    path.parent.chmod(0o500)
    assert f"the folder {path.parent} is not writable for this user" in asyncio.run(refusal(path))
    path.parent.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_the_file_must_be_writable(path: Path) -> None:
    path.touch(0o400)
    assert "this user may not read and write it" in asyncio.run(refusal(path))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
async def test_a_place_where_no_file_can_be_made_is_named() -> None:
    assert "/proc" in await refusal(Path("/proc/shop.db"))


def test_a_file_that_is_no_database_is_left_as_it_is(path: Path) -> None:
    path.write_text("Dear diary, " * 100)
    assert asyncio.run(refusal(path)) == (
        f"{path} is not a SQLite database (or it is encrypted); it was left as it is: use another file"
    )
    assert path.read_text() == "Dear diary, " * 100


@pytest.mark.parametrize("mark", ["CREATE TABLE notes(text)", "PRAGMA application_id = 77"])
def test_the_database_of_another_program_is_left_as_it_is(path: Path, mark: str) -> None:
    other = apsw.Connection(str(path))
    other.execute(mark)
    other.close()
    before = path.read_bytes()
    text = asyncio.run(refusal(path))
    assert text.startswith(f"the SQLite database {path} belongs to another program")
    assert text.endswith("it was left as it is: use another file")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_a_database_of_a_newer_version_is_refused(path: Path) -> None:
    async with connected(path):
        pass
    other = apsw.Connection(str(path))
    other.execute("PRAGMA user_version = 9")
    other.close()
    text = await refusal(path)
    assert "has schema version 9, and this Sluiceway knows versions up to 1" in text
    assert "upgrade this one, or use another file" in text


def damage(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    for page in range(30, len(blob) // 4096 - 1):
        blob[page * 4096 : page * 4096 + 64] = os.urandom(64)
    path.write_bytes(blob)


async def test_a_damaged_database_is_reported_and_not_waited_for(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *[b"x" * 3000] * 100)
        await source.aclose()
    damage(path)
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        with pytest.raises(TransportError, match=r"cannot receive: the SQLite database .* is damaged .*\.recover"):
            await asyncio.wait_for(source.receive(1000), 5)


async def test_an_empty_file_becomes_a_database(path: Path) -> None:
    await asyncio.to_thread(path.touch)
    async with connected(path) as transport:
        await publish(transport, "t", b"a")


async def test_many_processes_may_make_the_database_at_once(path: Path) -> None:
    transports = [SQLiteTransport(path) for _ in range(8)]
    await asyncio.gather(*(transport.connect() for transport in transports))
    for transport in transports:
        await publish(transport, "t", b"a")
        await transport.aclose()


async def test_a_transport_must_be_connected_and_not_closed(path: Path) -> None:
    transport = SQLiteTransport(path)
    with pytest.raises(TransportError, match=r"is not connected; await connect\(\) first"):
        await publish(transport, "t", b"a")
    await transport.connect()
    await transport.connect()
    source = await subscribe(transport, "t")
    await transport.aclose()
    await transport.aclose()
    assert await source.receive(1) == []
    source.stop()
    await source.aclose()
    with pytest.raises(TransportError, match=r"is not connected"):
        await publish(transport, "t", b"a")


# -- a full disk


async def test_a_full_disk_refuses_publishes_and_loses_nothing(path: Path) -> None:
    async with connected(path) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(3))
        messages = await get(source, 3)
        db = transport._thread._db
        pages: Any = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages[0]}").fetchall()
        batch = [Outgoing("t", b"x" * 100_000), Outgoing("t", b"small")]
        with pytest.raises(
            PublishError, match=r"^2 of 2 messages are not confirmed as published: the disk that holds .* is full"
        ) as caught:
            await transport.publish(batch)
        assert list(caught.value.failed) == batch
        dead = Settlement(messages[0], "dead_letter", outputs=(Outgoing("t.dead", b"x" * 100_000),))
        with pytest.raises(TransportError, match=r"cannot settle: the disk that holds .* is full"):
            await source.settle(messages[1:2], [dead])
        db.execute("PRAGMA max_page_count = 1000000").fetchall()
        assert not await source.settle(messages[1:2], [dead])
        assert not await source.settle(messages[2:], [])
        assert [stored.id async for stored in transport.browse("t.dead")] == [dead.outputs[0].id]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up all room; returns the file to delete."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


async def test_on_a_full_disk_a_receive_waits_and_says_why_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    async with connected(small_disk / "shop.db") as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(5))
        await transport._thread.run(
            lambda store: store.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE), reads=True
        )
        ballast = await asyncio.to_thread(fill, small_disk)
        with pytest.raises(PublishError, match="is full"):
            await publish(transport, "t", b"x" * 50_000)
        waiting = asyncio.create_task(source.receive(5))
        assert "is full; make room" in await until_blocked(source)
        await asyncio.to_thread(ballast.unlink)
        messages = await asyncio.wait_for(waiting, 10)
        assert bodies(messages) == numbered(5)
        assert source.status().state == "running"
        assert not await source.settle(messages, [])


# -- a lock that nobody lets go of


async def test_a_lock_held_too_long_is_reported_and_waited_out(path: Path) -> None:
    async with connected(path, busy_timeout=0.1) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(2))
        messages = await get(source, 1)
        tool = apsw.Connection(str(path))
        tool.execute("BEGIN IMMEDIATE")
        with pytest.raises(PublishError, match="was locked by another process for the whole of the busy timeout"):
            await publish(transport, "t", b"a")
        with pytest.raises(TransportError, match=r"cannot settle: .* was locked by another process"):
            await source.settle(messages, [])
        waiting = asyncio.create_task(source.receive(1))
        assert "locked" in await until_blocked(source)
        tool.execute("COMMIT")
        assert bodies(await asyncio.wait_for(waiting, 5)) == [b"1"]
        assert (source.status().state, source.status().error) == ("running", None)
        assert not await source.settle(messages, [])
        tool.close()


# -- options


async def test_a_body_over_the_limit_is_refused_with_the_whole_call(path: Path) -> None:
    async with connected(path, max_payload=100) as transport:
        large = Outgoing("t", b"x" * 101)
        with pytest.raises(PayloadTooLarge, match="a body of 101 bytes and the limit is 100") as caught:
            await transport.publish([Outgoing("t", b"fine"), large])
        assert list(caught.value.failed) == [large]
        assert [stored async for stored in transport.browse("t")] == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lease": 0}, "lease must be more than 0 seconds, got 0"),
        ({"lease": float("nan")}, "lease must be more than 0 seconds, got nan"),
        ({"max_payload": 0}, "max_payload must be 1 to 900000000 bytes, got 0"),
        ({"busy_timeout": -1}, "busy_timeout must be 0 or more seconds, got -1"),
        ({"path": ""}, "path must name a file, got ''"),
        ({"path": ":memory:"}, "for memory there is memory://"),
    ],
)
def test_an_option_that_cannot_be_is_refused_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=re.escape(text)):
        SQLiteTransport(**{"path": "shop.db", **options})


def test_a_url_names_a_relative_or_an_absolute_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert SQLiteTransport.from_url("sqlite:///data/my%20shop.db").path == f"{tmp_path.resolve()}/data/my shop.db"
    transport = SQLiteTransport.from_url("sqlite:////var/shop.db?lease=2.5&max_payload=1000&busy_timeout=1")
    assert (transport.path, transport.lease) == ("/var/shop.db", 2.5)
    assert transport.features.max_payload == 1000


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("sqlite://shop.db", "write sqlite:///relative.db or sqlite:////absolute.db"),
        ("sqlite:///", "names no SQLite file"),
        ("sqlite:///shop.db?leese=3", "no option 'leese'; did you mean 'lease'?"),
        ("sqlite:///shop.db?color=3", "no option 'color'; there are lease, max_payload, busy_timeout"),
        ("sqlite:///shop.db?lease=soon", "the option 'lease' of a sqlite URL must be a number, got 'soon'"),
        ("sqlite:///shop.db?lease=-1", "lease must be more than 0 seconds, got -1.0"),
    ],
)
def test_a_url_that_is_wrong_says_how_it_is_written(url: str, text: str) -> None:
    with pytest.raises(OptionError, match=re.escape(text)):
        SQLiteTransport.from_url(url)


async def test_positions_and_patterns_that_cannot_be_are_refused(path: Path) -> None:
    async with connected(path) as transport:
        with pytest.raises(OptionError, match="'x' is no position in a SQLite queue"):
            await anext(transport.browse("t", after="x"))
        with pytest.raises(OptionError, match="is a pattern"):
            await publish(transport, "t.*", b"")
        with pytest.raises(OptionError, match="words are letters"):
            await subscribe(transport, "t. .u")
        with pytest.raises(OptionError, match="names no topic"):
            await subscribe(transport)
