"""What each test shows, and how it is run: `@guarantee("G8", needs="delay")`."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from ..clock import VirtualClockLoop
from .brokers import Broker
from .kit import Kit

LIMIT = 120.0  # seconds after which a test has failed, and not the whole run

GUARANTEES = {
    "G1": "Demand: received and unsettled is never more than the window",
    "G2": "At least once: acked only after its work, or when a retry or dead letter is durably accepted",
    "G3": "Settled once, on every path; a settle that is sent again is harmless",
    "G4": "Isolation: a failure is its own message's",
    "G5": "Drain: loses nothing, repeats nothing that finished",
    "G6": "Crash: SIGKILL loses nothing; what is repeated was in the window",
    "G7": "Poison is contained, innocents are not blamed",
    "G8": "Retries are durable, hold no slot, and go to the group that failed",
    "G9": "Order by key, one at a time, also across retries",
    "G10": "Leases: renewed from a thread; a lost one fences the settle",
    "G11": "Reconnect by itself, and go on where it was",
    "G12": "Bounded memory: a backlog costs the window",
    "G13": "Bad input never wedges",
    "publish": "Publish: durable and in order when it returns, or PublishError says what is not there",
    "groups": "Groups: each gets every message once, its members share them",
    "topics": "Topics: patterns, several topics, many topics",
    "at rest": "Messages at rest: browse, remove, backlog, and `sluiceway dlq` over them",
    "versions": "Two versions at once: what an older or newer program sends passes through",
}


def guarantee(
    *names: str, needs: str | Sequence[str] = (), hooks: str | Sequence[str] = (), lacks: str = "", slow: bool = False
) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    """Make `async def test_…(kit, …)` a test of the suite, which shows these guarantees on the broker of a run.

    It becomes a plain function that takes the fixture `broker` in place of `kit`, and runs in a loop of its own, so no
    async plugin is needed; in virtual time where the broker is `virtual`. `needs`: features without which it does not
    apply, like `order=group` where one value is meant; `lacks`: a feature with which it does not; `hooks`: optional
    methods of Broker that it calls. `slow`: it takes more than a few seconds.
    """
    assert set(names) <= GUARANTEES.keys(), f"unknown guarantees: {names}"
    features, methods = _words(needs), _words(hooks)

    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(broker: Broker, **arguments: Any) -> None:
            async def main() -> None:
                async with asyncio.timeout(None if broker.virtual else LIMIT), Kit(broker) as kit:
                    _check_applies(kit, features, methods, lacks)
                    await test(kit, **arguments)

            with asyncio.Runner(loop_factory=VirtualClockLoop if broker.virtual else None) as runner:
                runner.run(main())

        first, *others = inspect.signature(test).parameters.values()
        assert first.name == "kit", f"{test.__name__} must take kit first"
        asked = inspect.Parameter("broker", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Broker)
        run.__signature__ = inspect.Signature([asked, *others])  # type: ignore[attr-defined]
        marked: Callable[..., None] = pytest.mark.guarantee(*names, slow=slow)(run)
        return marked

    return decorate


def _words(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _check_applies(kit: Kit, needs: Sequence[str], hooks: Sequence[str], lacks: str) -> None:
    """Skip the test where it does not apply. The words after `n/a: ` go into the report."""
    for one in needs:
        name, _, wanted = one.partition("=")
        found = getattr(kit.features, name)
        if found in (False, "none") or (wanted and found != wanted):
            pytest.skip(f"n/a: features.{name} is {found!r}")
    if lacks and getattr(kit.features, lacks) not in (False, "none"):
        pytest.skip(f"n/a: features.{lacks} is {getattr(kit.features, lacks)!r}")
    for name in hooks:
        if getattr(type(kit.broker), name) is getattr(Broker, name):
            pytest.skip(f"the broker has no {name}()" if kit.broker.remote else "n/a: there is no server")
