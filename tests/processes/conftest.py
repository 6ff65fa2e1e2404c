from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .handlers import LEDGER, Told


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """What handlers note, in whatever process."""
    path = tmp_path / "ledger"
    monkeypatch.setenv(LEDGER, str(path))
    return Told(path)


@pytest.fixture(autouse=True)
def nothing_is_left(told: Told) -> Iterator[None]:
    """No worker process outlives its test, also not as a zombie."""
    before = children()
    yield
    assert children() <= before


def children() -> set[int]:
    """The processes that this one has started and not reaped."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            found.update(map(int, (task / "children").read_text().split()))
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once `true()` holds, which only other processes change."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def until_gone(*pids: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(runs, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if runs(pid)]} run on; this is {os.getpid()}"
        time.sleep(0.01)
