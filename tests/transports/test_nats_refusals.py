"""NATS: what the server refuses says what is full or in the way, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nats.js.api import RetentionPolicy, StreamConfig

from sluiceway.errors import PublishError, TransportError
from sluiceway.message import Settlement
from tests.servers.nats import NATSServer
from tests.transports.nats_kit import connected, get, manager, publish, subscribe


async def test_a_full_store_is_named_and_what_waits_in_it_is_received_and_acked(tmp_path: Path) -> None:
    jetstream = {"store_dir": str(tmp_path / "data"), "max_file": 300_000, "max_mem": 100_000}
    with NATSServer(tmp_path, {"jetstream": jetstream}, jetstream=False) as server:
        async with connected(server) as transport:
            with pytest.raises(PublishError, match=r"'sluiceway' refused it: .*jetstream\.max_file_store") as caught:
                await publish(transport, "t", *[b"x" * 50_000] * 10)
            stored = 10 - len(caught.value.failed)
            assert 0 < stored < 10
            source = await subscribe(transport, "t")
            messages = await get(source, stored)
            assert not await source.settle(messages[:-1], [])
            with pytest.raises(TransportError, match=r"cannot write notes .*jetstream\.max_file_store"):
                await source.settle([], [Settlement(messages[-1], "retry")])
            async with manager(server) as js:
                await js.purge_stream("sluiceway", seq=stored)
            assert not await source.settle([], [Settlement(messages[-1], "retry")])
            (again,) = await get(source, 1)
            assert again.attempt == 2


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_bytes": 1000, "discard": "new"}, "the stream is full: raise its limits .*max_bytes"),
        ({"max_msgs": 3, "discard": "new"}, "maximum messages exceeded .*the stream is full"),
        ({"max_msg_size": 99}, "raise max_msg_size of the stream"),
    ],
)
async def test_a_full_stream_is_named_with_the_limit_to_raise(
    tmp_path: Path, limits: dict[str, Any], says: str
) -> None:
    with NATSServer(tmp_path) as server:
        async with manager(server) as js:
            await js.add_stream(StreamConfig(name="ORDERS", subjects=["t"], **limits))
        async with connected(server) as transport:
            with pytest.raises(PublishError, match=f"stream 'ORDERS' refused it: .*{says}"):
                await publish(transport, "t", *[b"x" * 100] * 20)


async def test_a_full_account_says_that_its_limits_are_to_be_raised(tmp_path: Path) -> None:
    users = [{"user": "ada", "password": "secret"}]
    accounts = {"A": {"jetstream": {"max_file": 100_000, "max_streams": 1}, "users": users}}
    with NATSServer(tmp_path, {"accounts": accounts}) as server:
        async with connected(server, user="ada", password="secret") as transport:
            with pytest.raises(PublishError, match="the storage of the account is full: raise the limits"):
                await publish(transport, "t", *[b"x" * 50_000] * 4)
            with pytest.raises(TransportError, match="two of our own: raise the limits of JetStream"):
                await subscribe(transport, "t")


async def test_a_second_group_on_a_work_queue_is_told_what_to_change(tmp_path: Path) -> None:
    with NATSServer(tmp_path) as server:
        async with manager(server) as js:
            await js.add_stream(StreamConfig(name="WORK", subjects=["w.>"], retention=RetentionPolicy.WORK_QUEUE))
        async with connected(server) as transport:
            source = await subscribe(transport, "w.a", group="one")
            await publish(transport, "w.a", b"x")
            for topic, group in (("w.a", "two"), ("w.*", "one")):
                with pytest.raises(TransportError, match=f"{topic!r}.* on stream 'WORK'.*retention=workqueue has one"):
                    await subscribe(transport, topic, group=group)
            assert not await source.settle(await get(source, 1), [])
            async with manager(server) as js:
                assert (await js.stream_info("WORK")).state.messages == 0
            await publish(transport, "w.b", b"y")
            with pytest.raises(TransportError, match='start="earliest"'):
                await subscribe(transport, "w.b", group="one", start="latest")


async def test_a_stream_that_takes_no_more_consumers_says_so(tmp_path: Path) -> None:
    with NATSServer(tmp_path) as server:
        async with manager(server) as js:
            await js.add_stream(StreamConfig(name="ORDERS", subjects=["t"], max_consumers=1))
        async with connected(server) as transport:
            await subscribe(transport, "t", group="one")
            with pytest.raises(TransportError, match="raise max_consumers"):
                await subscribe(transport, "t", group="two")
