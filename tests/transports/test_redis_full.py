"""A server whose memory is full: consumers make room, and publishing says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluiceway.errors import PublishError
from sluiceway.message import Outgoing, Settlement
from tests.servers.redis import RedisServer
from tests.transports.redis_kit import bodies, connected, get, subscribe


async def test_what_waits_on_a_full_server_is_received_and_settled_and_then_there_is_room(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "server") as server:
        async with connected(server) as transport:
            source = await subscribe(transport, "t")
            await transport.publish([Outgoing("t", b"%d" % number + b"x" * 10_000) for number in range(300)])
            used = int(server.ask("INFO", "memory").partition(b"used_memory:")[2].split()[0])
            server.ask("CONFIG", "SET", "maxmemory", str(used - 500_000))
            with pytest.raises(PublishError, match="memory"):
                await transport.publish([Outgoing("t", b"one more")])
            failed, *rest = await get(source, 300)
            assert len(bodies(rest)) == 299
            assert not await source.settle(rest[:100], [Settlement(failed, "retry")])
            assert not await source.settle(rest[100:], [])
            (again,) = await get(source, 1)
            assert (again.id, again.attempt) == (failed.id, 2)
            assert not await source.settle([again], [])
