"""Several processes that take what waits in one broker: started before the clock, then all at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from sluiceway import App, Pause

from .child import started
from .watch import Watch

QUIET = 0.5  # seconds without a settle, after which a worker asks whether anything is left


def rate(call: str, given: Sequence[dict[str, Any]], count: int) -> float:
    """Start `call` once for each of `given`, let them go, and return the messages/s until the last settle."""
    with ExitStack() as stack:
        workers = []
        for one in given:
            order = json.dumps([call, one, False, True, 55])
            workers.append(stack.enter_context(started([order], session=False)))
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", worker.communicate()[1]
        began = time.monotonic()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        outs = [worker.communicate(timeout=50) for worker in workers]
        for worker, (_, err) in zip(workers, outs, strict=True):
            assert worker.returncode == 0, err
    ended = [json.loads(out.strip().splitlines()[-1]) for out, _ in outs]
    settled = sum(one["settled"] for one in ended)
    assert settled == count, f"{settled} of {count} were settled"
    last: float = max(one["last"] for one in ended)
    return count / (last - began)


async def work(app: App, gate: Pause, count: int) -> dict[str, float]:
    """One of them: ready, then go until nothing is left."""
    last = 0.0

    def settled(_: int) -> None:
        nonlocal last
        last = time.monotonic()

    async with app.running() as manager:
        watch = Watch(app)
        watch.on_settled = settled
        print("ready", flush=True)
        await asyncio.to_thread(input)
        gate.open()
        began = time.monotonic()
        while True:
            await asyncio.sleep(0.1)
            watch.check()
            if watch.settled == count or time.monotonic() - max(began, last) > QUIET:  # the other may have taken all
                backlog = await manager.backlog("consume")
                if backlog is None or backlog.messages == 0:
                    break
    return {"settled": watch.settled, "last": last}
