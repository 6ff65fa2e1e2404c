"""What a backlog costs in memory: the window, not the backlog."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

from sluiceway import App, Message, Pause

from .child import Job
from .pairs import Case, Figure
from .watch import Watch, handed_out

WAITING = 1_000_000
BODY = b"x" * 200
CHUNK = 5_000  # messages per publish
SECONDS = 5.0
MIB = 1024 * 1024
EMPTY, FULL = "empty.db", "million.db"


def consumer(path: Path, gate: Pause) -> App:
    """A slow handler, ten at once, the window automatic."""
    app = App(f"sqlite:///{path}")

    @app.consumer("t", concurrency=10, gates=[gate])
    async def consume(message: Message[bytes]) -> None:
        await asyncio.sleep(0.01)

    return app


async def fill(folder: str, scale: float) -> dict[str, float]:
    """A million messages, and a tenth more for what the runs take."""
    gate = Pause()
    gate.close()
    app = consumer(Path(folder) / FULL, gate)
    async with app.running():
        for _ in range(int(WAITING * 1.1 * scale) // CHUNK + 1):
            await app.publish_many("t", [BODY] * CHUNK)
    return {"rate": 0.0}


async def peak(folder: str, scale: float, file: str, waiting: int) -> dict[str, float]:
    """Run for some seconds, and say how large the process was at most."""
    path = Path(folder) / file
    app = consumer(path, Pause())
    async with app.running() as manager:
        watch = Watch(app)
        with watch.sampling(handed_out(path)):
            await asyncio.sleep(max(0.5, SECONDS * scale))
        watch.check()
        backlog = await manager.backlog("consume")
        assert backlog is not None
        assert backlog.messages >= waiting * scale, f"only {backlog.messages} messages waited"
        assert (watch.settled > 0) == (waiting > 0)
    return {"MiB": peak_bytes() / MIB, "window": watch.largest_window}


def peak_bytes() -> float:
    """The most bytes this program had in memory. getrusage also counts, on Linux, the process that started it."""
    try:
        status = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024.0


CASES = [
    Case(
        (Figure("SQLite, 1,000,000 waiting, 10 ms handler: rise of peak memory", "MiB", "MiB", "rise", 10.0, 1.0),),
        Job("bench.memory_use:peak", {"file": FULL, "waiting": WAITING}),
        Job("bench.memory_use:peak", {"file": EMPTY, "waiting": 0}),
        Job("bench.memory_use:fill", limit=300),
        folder=True,
    ),
]
