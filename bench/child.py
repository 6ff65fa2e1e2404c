"""Measures run in processes of their own: fresh, pinned, ended by a time limit, and gone when the bench is.

`measure` starts one from the parent's side; this module, run as a program, is the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

ROOT = Path(__file__).parent.parent
_PATH = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
_GRACE = 5  # seconds after its time limit in which the parent ends a child; later it ends by itself


class Job(Struct, frozen=True):
    """One measure: `call` is module:function, `given` its keywords, and it returns a dict of figures.

    `pinned`: it runs on one core. `tuned`: with the gc set as the command line sets it. `limit`: seconds it may take.
    """

    call: str
    given: dict[str, Any] = {}
    pinned: bool = True
    tuned: bool = True
    limit: float = 60.0


class MeasureFailed(Exception):
    """A child raised, was killed or took too long; its text is what it wrote."""


def measure(job: Job, **more: Any) -> dict[str, float]:
    """Run one job in a fresh process and return its figures. Raises MeasureFailed."""
    order = json.dumps([job.call, {**job.given, **more}, job.pinned, job.tuned, job.limit + _GRACE])
    with started([order]) as process:
        try:
            out, err = process.communicate(timeout=job.limit)
        except subprocess.TimeoutExpired:
            raise MeasureFailed(f"{job.call} took more than {job.limit:g} s") from None
    if process.returncode:
        lines = err.strip().splitlines() or [f"exit {process.returncode}"]
        raise MeasureFailed(f"{job.call}: {lines[-1]}\n" + "\n".join(lines[-25:]))
    figures: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return figures


@contextlib.contextmanager
def started(arguments: list[str], *, session: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A child that runs this module; it ends with the block. With a session of its own all that it started ends too;
    a child's child has none, so that it ends with its parent."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.child", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": _PATH}, text=True, start_new_session=session,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if session else process.kill()
        process.communicate()


def pin(core: int) -> None:
    """Run on one core from now on: `core` counts those that this process was given, -1 is the last."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(_cores)[core % len(_cores)]})


def first_core() -> set[int]:
    """The core that pinned measures leave free, where there are two."""
    return {min(_cores)}


def last_core() -> set[int]:
    """The core of pinned measures."""
    return {max(_cores)}


def unpin() -> None:
    """Run on any core from now on."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores)


def tune() -> None:
    """Set the gc as the command line does."""
    gc.set_threshold(50_000, 20, 100)
    gc.freeze()


def _all_cores() -> set[int]:
    """What this process may use; a child asks for more than its pinned parent has."""
    if not hasattr(os, "sched_getaffinity"):
        return {0}
    given = os.environ.get("BENCH_CORES")
    if given is None:
        given = os.environ["BENCH_CORES"] = ",".join(map(str, os.sched_getaffinity(0)))
    return {int(core) for core in given.split(",")}


_cores = _all_cores()


def main(order: str) -> None:
    """Do one job and print its figures."""
    call, given, pinned, tuned, limit = json.loads(order)
    signal.alarm(int(limit) + 1)  # whatever happened to the parent
    if pinned:
        pin(-1)
    else:
        unpin()
    logging.basicConfig(level=logging.WARNING)
    module, _, name = call.partition(":")
    function = getattr(importlib.import_module(module), name)
    if tuned:
        tune()
    figures = function(**given)
    if inspect.iscoroutine(figures):
        figures = asyncio.run(figures)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
