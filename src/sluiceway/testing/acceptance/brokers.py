"""`Broker`: what the acceptance suite needs of a broker. A transport passes the suite when this is written for it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from typing import ClassVar

from ...source import Source
from ...transport import Transport

NO_RAW_HEADERS: Mapping[str, bytes] = {}


class Broker:
    """One broker, empty at the start of each test. Derive from it, and give the tests one by a fixture named `broker`.

    `client` must be written. `url`, `expire` and `die_holding` have defaults that do for most brokers. Other methods
    are optional: where one is not written, the tests that need it are skipped, and the report says so. A fixture that
    shares one server between tests gives each its own names (a prefix, a virtual host, a folder).

    Hints, as class attributes or set in `__init__`:

    - `name`: what the report calls the transport.
    - `virtual`: it lives in this process and in virtual time. No other process reaches it.
    - `remote`: a server of its own: connections can be cut, and programs without Sluiceway can publish. Then a test
      that needs a method that is not written counts as skipped; else as one that does not apply.
    - `moment`: seconds in which nothing that should not come has come. Most tests that wait, wait for this long.
    - `step`: seconds; the shortest delay that the tests use, the others being small multiples of it.
    - `early`, `late`: seconds that a delayed message may come before and after its time. A ladder is late by a rung.
    - `soon`: seconds after which what should come is said to be lost.
    - `topics`: how many topics the test of many topics uses.
    - `tells_age`: `backlog` says how long the oldest message has waited; else its `seconds` are None while one waits.
    - `tells_delayed`: `backlog` counts what waits for its delay.
    - `pushes_ahead`: with `order_by` a process has in hand what its source was not asked for, and is suspected with it.
    """

    name: str = ""
    virtual: ClassVar[bool] = False
    remote: ClassVar[bool] = True
    moment: float = 0.1
    step: float = 0.1
    early: float = 0.01
    late: float = 20.0
    soon: float = 20.0
    topics: int = 10_000
    tells_age: bool = True
    tells_delayed: bool = True
    pushes_ahead: bool = False

    def client(self) -> Transport:
        """A transport of its own to this broker, not connected yet."""
        raise NotImplementedError(f"{type(self).__name__}.client: return a transport that is not connected yet")

    async def open(self) -> None:
        """Called before the first `client`, in the loop of the test."""

    async def aclose(self) -> None:
        """Called when all clients of the test are closed."""

    def url(self) -> str | None:
        """The URL by which other processes reach this broker; None: they cannot."""
        return None

    async def expire(self, source: Source) -> None:
        """Return when the leases of all that the source holds have ended. Nobody renews them in the tests."""
        assert source.lease is not None
        await asyncio.sleep(source.lease * 1.2)

    async def die_holding(self, topic: str, group: str, count: int) -> None:
        """Let a process receive so many messages and be killed with them in hand. Unless overridden it needs `url`."""
        url = self.url()
        assert url is not None, f"{type(self).__name__}: write url() or die_holding()"
        command = [sys.executable, "-m", "sluiceway.testing._actor", "hold", url, topic, group, str(count)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert done.returncode == -9, f"the process that was to die holding {count} messages said: {done.stderr}"

    # -- optional ------------------------------------------------------------------------------------------------

    async def publish_raw(self, topic: str, body: bytes, headers: Mapping[str, bytes] = NO_RAW_HEADERS) -> None:
        """Publish as a program without Sluiceway would: these headers and no other, their values any bytes."""
        raise NotImplementedError

    async def interrupt(self) -> None:
        """Cut every connection to the broker once; new ones are taken."""
        raise NotImplementedError

    async def restart(self) -> None:
        """Kill the broker's server and start it again, with its data, on the same address. Return when it is ready."""
        raise NotImplementedError

    async def held(self, topic: str, group: str) -> int:
        """How many messages of the topic the broker counts as handed to the group and not settled."""
        raise NotImplementedError
