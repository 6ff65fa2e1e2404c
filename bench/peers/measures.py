"""One measure: a library's program, in its environment, on the core that the server leaves free."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from msgspec import Struct
from msgspec.structs import replace

from ..child import ROOT, MeasureFailed, last_core
from .environments import python_of
from .table import Peer

PROGRAMS = Path(__file__).parent / "programs"
PROBE = 500  # messages, of a first measure that says how many the others have
SECONDS = 2.5  # that a measure shall take messages
MOST = 50_000  # messages
EVEN = 100  # messages are a multiple of it, since some wait until what they read is full
LIMIT = 20.0  # seconds for a measure with what it publishes before

_topics = itertools.count()


class Row(Struct, frozen=True, kw_only=True):
    """One row, as it is in the results.

    `rate`: messages/s; `count`: messages of each measure. `ratio`: Sluiceway's rate over the same broker, with the same
    kind of handler, over this one; `floor`: the least that it must be.
    """

    broker: str
    peer: str
    rate: float | None
    count: int = 0
    settings: str
    ratio: float | None = None
    floor: float | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and (self.floor is None or (self.ratio is not None and self.ratio >= self.floor))


def failed(peer: Peer, error: str) -> Row:
    """A row without a rate."""
    return Row(broker=peer.broker, peer=peer.name, rate=None, settings=peer.settings, floor=peer.floor, error=error)


def compared(peers: Sequence[Peer], rows: Sequence[Row]) -> list[Row]:
    """The rows, which are those of `peers`, with the ratio of those beside which Sluiceway was measured."""
    ours = {(peer.broker, peer.batch): row.rate for peer, row in zip(peers, rows, strict=True) if peer.is_ours}
    found = []
    for peer, row in zip(peers, rows, strict=True):
        rate = ours.get((peer.broker, peer.batch))
        ratio = None if peer.is_ours or rate is None or row.rate is None else rate / row.rate
        found.append(replace(row, ratio=ratio))
    return found


def row(peer: Peer, url: str, rounds: int, step: Callable[[], None], *, scale: float = 1.0) -> Row:
    """The median of `rounds` measures. `step` is called after each. A failure makes a row without a rate."""
    count = PROBE
    try:
        probed = rate(peer, url, count)
        count = max(count, min(int(probed * SECONDS * scale), int(MOST * scale)) // EVEN * EVEN)
        rates = []
        for _ in range(rounds):
            rates.append(rate(peer, url, count))
            step()
    except MeasureFailed as error:
        return failed(peer, str(error))
    return Row(
        broker=peer.broker, peer=peer.name, rate=median(rates), count=count, settings=peer.settings, floor=peer.floor
    )


def rate(peer: Peer, url: str, count: int) -> float:
    """Messages/s of one run of the program. Raises MeasureFailed."""
    topic = f"peers-{os.getpid()}-{next(_topics)}"
    program = str(PROGRAMS / f"with_{peer.library}.py")
    command = [python_of(peer.library), program, peer.broker, url, topic, str(count), *["batch"] * peer.batch]
    process = subprocess.Popen(
        command, cwd=PROGRAMS, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, text=True,
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, last_core())
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise MeasureFailed(f"{peer.name} over {peer.broker} took more than {LIMIT:g} s for {count} messages") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    lines = [line for line in out.splitlines() if line.startswith('{"rate"')]
    if process.returncode or not lines:
        raise MeasureFailed(f"{peer.name} over {peer.broker} ended with {process.returncode}:\n{err.strip()[-2000:]}")
    return float(json.loads(lines[-1])["rate"])
