"""How long what a killed process held takes to be handled by another."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from functools import partial
from subprocess import Popen

from sluiceway import App, Message
from sluiceway.telemetry import Settled

from ..child import Job, started, unpin
from ..pairs import Case, Figure
from .throughput import GROUP, new_topic

MESSAGES = 100  # as many as the window of the killed process


def recovery(url: str, scale: float, options: str) -> dict[str, float]:
    """Kill a process whose handlers hang, and wait until another has settled all that there is."""
    unpin()
    given = {"url": url + options, "topic": new_topic()}
    order = [json.dumps([f"{__name__}:{call}", given, False, True, 55]) for call in ("victim", "rescuer")]
    with started(order[:1], session=False) as victim:
        _line(victim)
        asyncio.run(_publish(given["url"], given["topic"]))
        _line(victim)
        with started(order[1:], session=False) as rescuer:
            _line(rescuer)
            killed = time.monotonic()
            victim.kill()
            out, err = rescuer.communicate(timeout=50)
            assert rescuer.returncode == 0, err
    return {"s": json.loads(out.strip().splitlines()[-1])["at"] - killed}


def _line(process: Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline(), process.communicate()[1]


async def _publish(url: str, topic: str) -> None:
    async with App(url, group=GROUP) as app:
        await app.publish_many(topic, [b"x"] * MESSAGES)


async def victim(url: str, topic: str) -> dict[str, float]:
    """Says when it is there, and when it has so many that it asks for no more until some have begun."""
    async with _app(url, topic, partial(asyncio.sleep, 3600)).running() as manager:
        print("ready", flush=True)
        while manager.stats()[0].held <= MESSAGES // 2 + 10:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        print("held", flush=True)
        await asyncio.sleep(3600)
    return {}


async def rescuer(url: str, topic: str) -> dict[str, float]:
    """Says when it is there, and when it has settled the last."""
    done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    settled = 0

    def count(event: Settled) -> None:
        nonlocal settled
        settled += event.count if event.outcome == "ack" else 0
        if settled == MESSAGES and not done.done():
            done.set_result(time.monotonic())

    app = _app(url, topic, partial(asyncio.sleep, 0))
    app.telemetry.attach(count, Settled)
    async with app.running():
        print("ready", flush=True)
        return {"at": await done}


def _app(url: str, topic: str, wait: Callable[[], Awaitable[None]]) -> App:
    app = App(url, group=GROUP)

    @app.consumer(topic, name="consume", concurrency=10, max_demand=MESSAGES)
    async def consume(message: Message[bytes]) -> None:
        await wait()

    return app


def cases(broker: str, name: str, *, alive: str) -> list[Case]:
    """The row of one broker. `alive`: the option of its URL that says how often a process must show that it lives."""
    lease = ", lease 3 s" if alive == "lease" else ""
    row = f"{name}, SIGKILL of a process{lease}: until another has settled all it held"
    job = Job(f"{__name__}:recovery", {"options": f"?{alive}=3"}, pinned=False)
    return [Case((Figure(row, "s", "s", "bound", 5.0, 1.0),), job, server=broker, most=3)]
