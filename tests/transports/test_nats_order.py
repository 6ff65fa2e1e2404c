"""NATS: `order_by` within one process, over retries, drains, crashes, and with others who take part."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sluiceway import App, Message, Retry
from sluiceway.message import Settlement
from sluiceway.source import Source
from sluiceway.transports.nats import order
from tests.servers.nats import NATSServer
from tests.servers.proxy import Proxy
from tests.transports.nats_kit import NATSBroker, bodies, connected, get, manager, numbered, publish, subscribe, until


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NATSServer]:
    with NATSServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
async def server(process: NATSServer) -> NATSServer:
    await process.empty()
    return process


async def one(source: Source) -> Message[Any]:
    (message,) = await get(source, 1)
    return message


async def test_keys_stay_in_order_though_many_fail_and_one_key_is_most_of_the_topic(server: NATSServer) -> None:
    """A small window: the hot key is parked again and again, and the others pass it."""
    app, done = App(f"{server.url()}?lease=5", group="g"), dict[str | None, list[int]]()

    @app.consumer("t", order_by="key", concurrency=4, max_demand=8, retry=Retry(attempts=20, base_delay=0.02))
    async def handle(message: Message[bytes]) -> None:
        number = int(message.body)
        if number % 11 == 5 and message.attempt < 3:
            raise ValueError("not yet")
        done.setdefault(message.key, []).append(number)

    async with connected(server) as transport:
        for number in range(300):
            await publish(transport, "t", b"%d" % number, key=f"key {number % 6}" if number % 3 == 0 else "hot")
        async with app.running():
            await until(lambda: sum(map(len, done.values())) == 300, "all are handled")
    assert all(numbers == sorted(numbers) for numbers in done.values())


async def test_what_waits_for_its_retry_is_remembered_by_the_next_process(server: NATSServer) -> None:
    async with connected(server) as transport:
        source = await subscribe(transport, "t", order_by="key")
        await publish(transport, "t", *numbered(4), key="k\udce9")
        failed, second = await get(source, 2)
        began = time.monotonic()
        await source.settle([], [Settlement(failed, "retry", delay=2.0), Settlement(second, "park")])
        await get_nothing(source)
    async with connected(server) as transport:
        source = await subscribe(transport, "t", order_by="key")
        await publish(transport, "t", b"other", key="other")
        assert bodies(await get(source, 1)) == [b"other"]
        again = await get(source, 4)
        assert time.monotonic() - began >= 1.9
        assert bodies(again) == numbered(4)
        assert [message.attempt for message in again] == [2, 1, 1, 1]
        assert not any(message.suspect for message in again)


async def test_a_key_keeps_its_order_over_several_topics_of_a_stream(server: NATSServer) -> None:
    async with connected(server) as transport:
        source = await subscribe(transport, "a", "b", order_by="key")
        await publish(transport, "a", b"0", key="k")
        began = time.monotonic()
        await source.settle([], [Settlement(await one(source), "retry", delay=1.0)])
        await publish(transport, "b", b"1", key="k")
        assert bodies(await get(source, 2)) == [b"0", b"1"]
        assert time.monotonic() - began >= 0.9


async def get_nothing(source: Source) -> None:
    call = asyncio.create_task(source.receive(10))
    await asyncio.sleep(0.3)
    source.resize(0)
    assert not await call
    source.resize(1000)


async def test_what_a_killed_process_had_in_hand_comes_before_what_nobody_had(server: NATSServer) -> None:
    with Proxy(server.port) as proxy:
        async with connected(server, lease=1.0) as transport:
            await publish(transport, "t", *numbered(6), key="k")
            broker = NATSBroker(server, proxy)
            broker.url = lambda: f"{server.url()}?lease=1"  # type: ignore[method-assign]
            await broker.die_holding("t", "g", 2)
            source = await subscribe(transport, "t", order_by="key")
            messages = await get(source, 6)
            assert bodies(messages) == numbered(6)
            assert [message.suspect for message in messages] == [True, True, False, False, False, False]


async def test_what_another_process_takes_and_settles_holds_nobody_up(server: NATSServer) -> None:
    async with connected(server) as transport, connected(server) as elsewhere:
        source = await subscribe(transport, "t", order_by="key")
        await publish(transport, "t", *numbered(3), key="k")
        first = await one(source)
        other = await subscribe(elsewhere, "t")
        await source.settle([], [Settlement(first, "retry")])
        taken = await one(other)
        await get_nothing(source)  # the others came, and are parked
        assert taken.body == b"0"
        assert not await other.settle([taken], [])
        assert bodies(await get(source, 2)) == [b"1", b"2"]


async def test_what_was_acked_though_we_took_it_for_lost_holds_nobody_up(server: NATSServer) -> None:
    """As when an ack is under way for longer than the lease: it was tried before, so a note of it stays."""
    async with connected(server) as transport, manager(server) as js:
        source = await subscribe(transport, "t", order_by="key")
        await publish(transport, "t", b"0", key="k")
        await source.settle([], [Settlement(await one(source), "retry")])
        again = await one(source)
        await js._nc.request(again.token[0].decode(), b"+ACK")
        source._hand.lose(again.token)
        await publish(transport, "t", *numbered(3)[1:], key="k")
        assert bodies(await get(source, 2)) == [b"1", b"2"]


async def test_what_another_process_takes_and_keeps_is_not_waited_for_longer_than_said(
    server: NATSServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "PARKED", 2.0)
    async with connected(server, lease=1.0) as transport, connected(server, lease=60.0) as elsewhere:
        source = await subscribe(transport, "t", order_by="key")
        await publish(transport, "t", *numbered(2), key="k")
        await source.settle([], [Settlement(await one(source), "retry")])
        other = await subscribe(elsewhere, "t")
        taken = await one(other)
        assert other.renewer is not None
        renewer = await asyncio.to_thread(other.renewer)
        call = asyncio.create_task(get(source, 1))
        while not call.done():
            await asyncio.to_thread(renewer.renew, [taken.token])
            await asyncio.wait([call], timeout=0.3)
        await asyncio.to_thread(renewer.close)
        assert bodies(await call) == [b"1"]


async def test_a_consumer_made_anew_hands_out_its_keys_in_order(server: NATSServer) -> None:
    async with connected(server) as transport, manager(server) as js:
        source = await subscribe(transport, "t", order_by="key")
        await publish(transport, "t", *numbered(5), key="k")
        failed, _ = await get(source, 2)
        await source.settle([], [Settlement(failed, "retry", delay=2.0)])
        (info,) = await js.consumers_info("sluiceway")
        await js.delete_consumer("sluiceway", info.name)
        assert bodies(await get(source, 5)) == numbered(5)


async def test_when_very_many_are_parked_the_one_they_wait_for_is_still_received(
    server: NATSServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "MOST", 20)
    async with connected(server) as transport:
        source = await subscribe(transport, "t", order_by="key")
        await publish(transport, "t", *numbered(100), key="k")
        failed = await one(source)
        await source.settle([], [Settlement(failed, "retry", delay=1.0)])
        call = asyncio.create_task(source.receive(10))
        await until(lambda: source._order is not None and source._order._away.parked >= 20, "they are parked")
        await asyncio.sleep(0.3)
        assert source._order is not None
        assert source._order._away.parked < 40
        messages = [*await call]
        while len(messages) < 100:
            assert not await source.settle(messages[-1:], [])
            messages += await source.receive(10)
        assert bodies(messages) == numbered(100)


async def test_connections_that_break_while_messages_fail_keep_the_order_in_which_keys_are_first_handled(
    server: NATSServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "PARKED", 5.0)  # what is called as the connection breaks comes by itself then
    done: dict[str | None, list[int]] = {}
    with Proxy(server.port) as proxy:
        app = App(f"nats://127.0.0.1:{proxy.port}?lease=1", group="g")

        @app.consumer("t", order_by="key", concurrency=4, retry=Retry(attempts=100, base_delay=0.05))
        async def handle(message: Message[bytes]) -> None:
            await asyncio.sleep(0.01)
            if int(message.body) % 7 == 3 and message.attempt < 3:
                raise ValueError("not yet")
            done.setdefault(message.key, []).append(int(message.body))

        async with connected(server) as transport:
            for number in range(200):
                await publish(transport, "t", b"%d" % number, key=f"key {number % 4}")
        async with app.running():
            for _ in range(4):
                await asyncio.sleep(0.3)
                await asyncio.to_thread(proxy.cut)
            await until(lambda: sum(len(set(numbers)) for numbers in done.values()) == 200, "all are handled")
    firsts = {key: list(dict.fromkeys(numbers)) for key, numbers in done.items()}
    assert firsts == {f"key {key}": list(range(key, 200, 4)) for key in range(4)}
