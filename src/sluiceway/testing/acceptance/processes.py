"""Processes that run an app over the transport and are killed: nothing is lost, and only the guilty is blamed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from .guarantees import guarantee
from .kit import Kit, numbered

WINDOW = 20
PATIENCE = 60.0  # seconds: finding a message that kills its processes takes a process that has lived for 10


class Workers:
    """Processes that handle topic `t`, and the ledger of what they did: lines of `start` or `end`, pid and body."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._folder = tempfile.TemporaryDirectory()
        self._ledger = Path(self._folder.name) / "ledger"
        self._ledger.touch()
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        url = self._kit.broker.url()
        assert url is not None
        command = [sys.executable, "-m", "sluiceway.testing._actor", "work", url, "g", str(WINDOW), str(self._ledger)]
        process = subprocess.Popen(command)
        self._processes.append(process)
        return process

    def events(self) -> list[tuple[str, int, bytes]]:
        """What happened, pid, and body, in order."""
        lines = self._ledger.read_bytes().splitlines()
        return [(what.decode(), int(pid), body) for what, pid, body in (line.split(b" ") for line in lines)]

    def handled(self) -> set[bytes]:
        return {body for what, _, body in self.events() if what == "end"}

    @property
    def last(self) -> subprocess.Popen[bytes]:
        return self._processes[-1]

    async def until(self, wanted: set[bytes], *, respawn: bool = False) -> None:
        """Return when all that is wanted is handled. With `respawn` a process that was killed is replaced."""
        deadline = self._kit.now() + PATIENCE
        while not wanted <= self.handled():
            assert self._kit.now() < deadline, f"not handled: {sorted(wanted - self.handled())[:10]}"
            self.look_after(respawn=respawn)
            await asyncio.sleep(0.02)

    def look_after(self, *, respawn: bool) -> None:
        """Fail when the last process has ended, unless it was killed and may be: then start another one."""
        code = self.last.poll()
        assert code is None or (respawn and code == -signal.SIGKILL), (
            f"the process ended with {code}; it says why above"
        )
        if code is not None:
            self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._folder.cleanup()


async def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that is asked to drain."""
    process.send_signal(signal.SIGTERM)
    return await asyncio.to_thread(process.wait, 30)


@guarantee("G2", "G6", needs="durable", hooks="url")
async def test_a_killed_process_loses_nothing_and_repeats_at_most_its_window(kit: Kit) -> None:
    await kit.make("t")
    everything = set(numbered(300))
    await kit.publish("t", *numbered(300))
    with Workers(kit) as workers:
        first = workers.start()
        await kit.until(lambda: len(workers.handled()) >= 60, "some are handled")
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        second = workers.start()
        await workers.until(everything)
        assert await ended(second) == 0
        starts = Counter(body for what, _, body in workers.events() if what == "start")
        repeated = [body for body, count in starts.items() if count > 1]
        assert len(repeated) <= WINDOW
        assert all(count <= 2 for count in starts.values())
    assert await kit.left("t") == []


@guarantee("G5", needs="durable", hooks="url")
async def test_a_process_that_is_asked_to_end_gives_its_messages_to_the_next_one(kit: Kit) -> None:
    await kit.make("t")
    await kit.publish("t", *numbered(200))
    with Workers(kit) as workers:
        for share in (50, 100):
            process = workers.start()
            await kit.until(lambda share=share: len(workers.handled()) >= share, "some are handled")  # type: ignore[misc]
            assert await ended(process) == 0
        workers.start()
        await workers.until(set(numbered(200)))
        ends = Counter(body for what, _, body in workers.events() if what == "end")
        assert set(ends.values()) == {1}, "nothing that finished is repeated"


@guarantee("G7", needs=("durable", "browse"), hooks="url", slow=True)
async def test_a_message_that_kills_its_processes_is_the_only_dead_letter(kit: Kit) -> None:
    await kit.make("t")
    good = numbered(200)
    await kit.publish("t", *good[:70], b"poison", *good[70:])
    with Workers(kit) as workers:
        workers.start()
        await workers.until(set(good), respawn=True)
        deadline = kit.now() + PATIENCE
        while not (letters := [one async for one in kit.transport.browse("t.g.dead")]):
            assert kit.now() < deadline, "the message that kills is not dead-lettered"
            workers.look_after(respawn=True)
            await asyncio.sleep(0.05)
        deaths = sum(what == "start" and body == b"poison" for what, _, body in workers.events())
        assert await ended(workers.last) == 0
    assert [letter.body for letter in letters] == [b"poison"]
    assert letters[0].headers["sluiceway-dead-type"].endswith("KilledItsProcess")
    assert 1 <= deaths <= 5
    assert await kit.left("t") == []
