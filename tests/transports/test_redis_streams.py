"""What lies in Redis: strangers' entries, what is trimmed and what is not, groups and streams that were deleted."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sluiceway.errors import OptionError, PublishError
from sluiceway.message import Outgoing, Settlement
from sluiceway.source import Subscription
from tests.servers.redis import RedisServer
from tests.transports.redis_kit import (
    LEASE,
    SOON,
    bodies,
    connected,
    get,
    numbered,
    publish,
    redis_server,
    subscribe,
)

__all__ = ["redis_server"]


@pytest.fixture(autouse=True)
def empty(redis_server: RedisServer) -> None:
    redis_server.ask("FLUSHALL")


def length(server: RedisServer, topic: str) -> int:
    return int(server.ask("XLEN", topic))


# -- strangers ---------------------------------------------------------------------------------------------------------


async def test_an_entry_without_a_body_is_the_json_of_its_fields(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        one = redis_server.ask("XADD", "t", "1700000000123-5", "name", "Ada", "age", "36", "odd", b"\xff")
        (message,) = await get(source, 1)
        assert message.body == '{"name":"Ada","age":"36","odd":"�"}'.encode()
        assert (message.id, message.timestamp, dict(message.headers)) == (one.decode(), 1700000000.123, {})
        await source.settle([], [Settlement(message, "retry")])
        (again,) = await get(source, 1)
        assert (again.body, again.id, again.timestamp, again.attempt) == (
            message.body,
            message.id,
            message.timestamp,
            2,
        )


async def test_a_second_field_named_body_is_a_header(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", b"a", headers={"body": "header", "k": "v"})
        (message,) = await get(source, 1)
        assert (message.body, dict(message.headers)) == (b"a", {"body": "header", "k": "v"})


async def test_an_entry_for_another_group_is_not_ours(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        redis_server.ask("XADD", "t", "*", "body", "theirs", "sluiceway-group", "other")
        redis_server.ask("XADD", "t", "*", "body", "ours", "sluiceway-group", "g")
        assert bodies(await get(source, 1)) == [b"ours"]
        assert redis_server.ask("XPENDING", "t", "g")[0] == 1


async def test_a_plain_reader_of_the_stream_finds_the_body_and_the_headers(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        await publish(transport, "t", b"\x00a", key="k", headers={"h": "v"})
        ((_, fields),) = redis_server.ask("XRANGE", "t", "-", "+")
        found: dict[bytes, Any] = dict(zip(fields[::2], fields[1::2], strict=True))
        assert (found[b"body"], found[b"h"], found[b"sluiceway-key"]) == (b"\x00a", b"v", b"k")


async def test_publishing_to_a_key_that_is_no_stream_is_refused_for_that_message_on(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        redis_server.ask("SET", "taken", "1")
        messages = [Outgoing("t", b"a"), Outgoing("taken", b"b")]
        with pytest.raises(PublishError, match=r"^1 of 2 messages is not confirmed .*WRONGTYPE") as caught:
            await transport.publish(messages)
        assert caught.value.failed == (messages[1],)
        source = await subscribe(transport, "t")
        (message,) = await get(source, 1)
        outputs = (Outgoing("out", b"x"), Outgoing("taken", b"y"))
        for _ in range(2):
            (refused,) = await source.settle([], [Settlement(message, "ack", outputs=outputs)])
            assert (refused.kind, length(redis_server, "out")) == ("rejected", 0)


async def test_a_position_that_is_none_is_refused(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        with pytest.raises(OptionError, match="'x-1' is no position"):
            _ = [one async for one in transport.browse("t", after="x-1")]


# -- trimming ----------------------------------------------------------------------------------------------------------


async def finish(source: Any, count: int) -> None:
    await source.settle(await get(source, count), [])


async def trimmed(source: Any, seconds: float = 1.5) -> None:
    """Let the source look after its stream."""
    call = asyncio.create_task(source.receive(1))
    await asyncio.sleep(seconds)
    source.resize(0)
    assert await call == []
    source.resize(1000)


async def test_what_all_groups_have_finished_is_deleted_and_nothing_else(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        one, other = await subscribe(transport, "t", group="one"), await subscribe(transport, "t", group="other")
        await publish(transport, "t", *numbered(1000))
        await finish(one, 1000)
        await trimmed(one)
        assert length(redis_server, "t") == 1000
        messages = await get(other, 1000)
        await other.settle([*messages[:350], *messages[351:]], [])
        await trimmed(one)
        left = [entry[1][1] for entry in redis_server.ask("XRANGE", "t", "-", "+")]
        assert len(left) < 1000
        assert left[left.index(b"350") :] == numbered(1000)[350:]  # whole nodes go, so a few before it may stay
        assert not await other.settle([messages[350]], [])


async def test_what_waits_for_its_retry_holds_up_no_trimming_and_is_kept(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(500))
        messages = await get(source, 500)
        await source.settle(messages[1:], [Settlement(messages[0], "retry", delay=2.5)])
        await trimmed(source)
        assert length(redis_server, "t") < 200
        (again,) = await get(source, 1)
        assert (again.body, again.attempt) == (b"0", 2)


async def test_retention_keeps_what_is_finished(redis_server: RedisServer) -> None:
    async with connected(redis_server, retention=3600) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(500))
        await finish(source, 500)
        await trimmed(source)
        assert length(redis_server, "t") == 500


async def test_entries_that_another_program_deleted_are_told_and_wedge_nothing(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(3))
        messages = await get(source, 3)
        await source.settle([], [Settlement(message, "release") for message in messages])
        redis_server.ask("XDEL", "t", messages[1].token[1])
        assert bodies(await get(source, 2)) == [b"0", b"2"]
        assert "1 messages of 't' were deleted from the stream before group 'g' had handled them" in caplog.text


# -- groups that were deleted ------------------------------------------------------------------------------------------


async def test_a_deleted_group_goes_on_behind_what_it_had_finished(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(redis_server, retention=3600) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(20))
        messages = await get(source, 12)
        await source.settle(messages[:9], [])
        await asyncio.sleep(1.0)  # it notes where it is
        await source.settle([], [Settlement(await one(source), "release")])
        await source.settle([], [Settlement(await one(source), "release")])
        redis_server.ask("XGROUP", "DESTROY", "t", "g")
        again = await get(source, 11)
        assert bodies(again) == numbered(20)[9:]
        assert {message.attempt for message in again} == {1}
        assert "group 'g' on ['t'] was not there any more; made anew" in caplog.text
        lost = await source.settle([], [Settlement(messages[10], "retry")])
        assert [refused.kind for refused in lost] == ["lost"]
        assert not await source.settle(again, [])


async def one(source: Any) -> Any:
    return (await get(source, 1))[0]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("what", [("FLUSHALL",), ("DEL", "t"), ("XGROUP", "DESTROY", "t", "g")])
async def test_a_source_goes_on_when_its_keys_are_gone(
    redis_server: RedisServer, what: tuple[str, ...], waits: bool
) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        call = asyncio.create_task(source.receive(10))
        await asyncio.sleep(0.1)
        if not waits:
            source.resize(0)
            await call
            source.resize(10)
        redis_server.ask(*what)
        if not waits:
            call = asyncio.create_task(source.receive(10))
        await asyncio.sleep(0.2)
        await publish(transport, "t", b"a")
        messages = await asyncio.wait_for(call, 10)
        assert bodies(messages) == [b"a"]
        assert not await source.settle(messages, [])


async def test_settling_when_the_keys_are_gone_ends(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(2))
        messages = await get(source, 2)
        redis_server.ask("FLUSHALL")
        refused = await source.settle(messages[:1], [Settlement(messages[1], "retry")])
        assert [(each.message.body, each.kind) for each in refused] == [(b"1", "lost")]


# -- demand ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("demand", [1, 2, 3])
async def test_a_small_demand_is_never_exceeded_though_many_streams_have_messages(
    redis_server: RedisServer, demand: int
) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "a", "b", "c")
        for topic in ("a", "b", "c"):
            await publish(transport, topic, b"1", b"2")
            await publish(transport, topic, b"3", group="g")
        for held in range(0, 9 - demand, demand):
            call = asyncio.create_task(source.receive(demand))
            got = await asyncio.wait_for(call, 5)
            assert 1 <= len(got) <= demand
            pending = sum(
                each["pending"]
                for topic in ("a", "b", "c")
                for stream in (topic, f"sluiceway:retry:{{{topic}}}:g")
                for each in redis_server.client().xinfo_consumers(stream, "g")
                if not each["name"].startswith(b"sluiceway:")
            )
            assert pending <= held + demand
            await source.settle([], [])
            if len(got) < demand:
                break


async def test_a_burst_for_the_topic_and_for_the_group_stays_within_a_waiting_demand(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        call = asyncio.create_task(source.receive(1))
        await asyncio.sleep(0.1)
        await transport.publish([Outgoing("t", b"a"), Outgoing("t", b"b", group="g")])
        assert len(await asyncio.wait_for(call, 5)) == 1
        pending = (
            redis_server.ask("XPENDING", "t", "g")[0] + redis_server.ask("XPENDING", "sluiceway:retry:{t}:g", "g")[0]
        )
        assert pending == 1


async def test_retries_come_while_the_topic_never_runs_dry(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        source, other = await subscribe(transport, "t"), await subscribe(transport, "t")
        await publish(transport, "t", *numbered(3000))
        first = await one(other)
        await other.settle([], [Settlement(first, "retry")])
        began, seen = time.monotonic(), 0
        while True:
            messages = await source.receive(10)
            await source.settle(messages, [])
            seen += len(messages)
            if first.id in {message.id for message in messages}:
                break
            assert time.monotonic() - began < 5
        assert seen < 2999


async def test_a_group_for_a_start_in_the_future_of_a_known_one_is_left_alone(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        await publish(transport, "t", *numbered(2))
        subscription = Subscription(topics=("t",), group="g", window=10)
        await transport.ensure([subscription], create=True)
        source = await subscribe(transport, "t", start="latest")
        assert bodies(await get(source, 2)) == numbered(2)
        assert source.lease == LEASE


async def test_a_source_tells_its_trouble_and_its_recovery(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sluiceway")
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "t")
        call = asyncio.create_task(source.receive(10))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(redis_server.kill)
        deadline = time.monotonic() + 5
        while source.status().state != "connecting":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert source.status().error
        await asyncio.to_thread(redis_server.start)
        await publish(transport, "t", b"a")
        assert bodies(await asyncio.wait_for(call, 10)) == [b"a"]
        assert source.status().state == "running"
        assert "receiving from ['t']: " in caplog.text
        assert "trying again in" in caplog.text
        assert "receiving from ['t'] again, after" in caplog.text


async def test_a_group_from_the_latest_whose_keys_are_gone_gets_all_that_was_published_since(
    redis_server: RedisServer,
) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "latest", start="latest")
        await publish(transport, "latest", b"before")
        assert not await source.settle(await get(source, 1), [])
        waiting = asyncio.create_task(source.receive(10))
        await asyncio.sleep(LEASE / 3)
        await asyncio.to_thread(redis_server.ask, "FLUSHALL")
        await publish(transport, "latest", b"1", b"2")
        async with asyncio.timeout(SOON):
            found = list(await waiting)
            while len(found) < 2:
                found += await source.receive(10)
        assert bodies(found) == [b"1", b"2"]


async def test_a_stream_that_was_deleted_is_received_from_its_beginning_though_its_ids_are_lower(
    redis_server: RedisServer,
) -> None:
    async with connected(redis_server) as transport:
        far = f"{int(time.time() * 1000) + 86_400_000}-0"  # a clock that was a day ahead; or another program's ids
        await asyncio.to_thread(redis_server.ask, "XADD", "lower", far, "body", "old")
        source = await subscribe(transport, "lower")
        assert not await source.settle(await get(source, 1), [])
        waiting = asyncio.create_task(source.receive(10))
        async with asyncio.timeout(SOON):
            while await asyncio.to_thread(redis_server.ask, "GET", "sluiceway:floor:{lower}:g") != far.encode():  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # the server tells nobody
            await asyncio.to_thread(redis_server.ask, "DEL", "lower")
            await publish(transport, "lower", b"new")
            found = list(await waiting)
            while not found:
                found = list(await source.receive(10))
        assert bodies(found) == [b"new"]


async def test_a_group_that_began_at_a_time_and_has_read_nothing_yet_has_its_topic_trimmed_all_the_same(
    redis_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with connected(redis_server) as transport:
        source = await subscribe(transport, "timed", start=datetime.now(UTC) - timedelta(hours=1))
        waiting = asyncio.create_task(source.receive(10))
        await asyncio.sleep(LEASE)
        assert source.status().state == "running"
        assert [record.getMessage() for record in caplog.records] == []
        source.stop()
        await waiting
