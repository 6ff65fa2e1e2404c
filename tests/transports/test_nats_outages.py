"""NATS: what becomes of messages when servers, connections, streams and consumers go."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sluiceway.errors import PublishError, TransportError
from sluiceway.message import Message, Outgoing, Settlement
from sluiceway.source import Subscription
from sluiceway.transports.nats import NATSSource, NATSTransport
from sluiceway.transports.nats.headers import read_delivery
from sluiceway.transports.nats.notes import sweep
from tests.servers.nats import NATSServer
from tests.servers.proxy import Proxy
from tests.transports.nats_kit import (
    NATSBroker,
    bodies,
    connected,
    get,
    manager,
    numbered,
    publish,
    subscribe,
    until,
)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NATSServer]:
    with NATSServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
async def server(process: NATSServer) -> NATSServer:
    await process.empty()
    return process


async def test_a_kill_of_the_server_under_a_source_loses_nothing(server: NATSServer) -> None:
    async with connected(server, lease=2.0) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(50))
        first = await get(source, 20)
        assert not await source.settle(first[:10], [])
        seen: set[bytes] = set()

        async def receive() -> None:
            while not seen >= set(numbered(50)[10:]):
                seen.update(bodies(await source.receive(50)))

        waiting = asyncio.create_task(receive())
        await asyncio.to_thread(server.kill)
        await until(lambda: source.status().state == "connecting", "it notices")
        assert source.status().error
        await asyncio.to_thread(server.start)
        await asyncio.wait_for(waiting, 20)  # also of the first 10: the server keeps the last acks in memory
        assert source.status().state == "running"


async def test_a_settle_while_the_server_is_away_raises_and_is_done_when_it_is_back(server: NATSServer) -> None:
    async with connected(server) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(4))
        acked, retried, dead, released = await get(source, 4)
        letter = Outgoing("t.g.dead", dead.body, id=dead.id)
        others = [
            Settlement(retried, "retry"),
            Settlement(dead, "dead_letter", outputs=(letter,)),
            Settlement(released, "release"),
        ]
        await asyncio.to_thread(server.kill)
        with pytest.raises(TransportError):
            await source.settle([acked], others)
        await asyncio.to_thread(server.start)
        await until(lambda: source.status().state == "running", "it is back")
        for _ in range(2):
            await source.settle([acked], others)
        again = await get(source, 2)
        assert sorted((one.body, one.attempt, one.suspect) for one in again) == [(b"1", 2, False), (b"3", 1, False)]
        assert [stored.body async for stored in transport.browse("t.g.dead")] == [b"2"]


@pytest.mark.parametrize("seconds", [0.5, 8.0])
async def test_a_server_that_stands_still_for_a_while_is_heard_again(server: NATSServer, seconds: float) -> None:
    """8 s: longer than anything that waits for an answer to a ping."""
    async with connected(server) as transport:
        source = await subscribe(transport, "t")
        source._pulls.beat = 0.3
        call = asyncio.create_task(get(source, 3))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.pause)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(server.resume)
        await publish(transport, "t", *numbered(3))
        assert bodies(await call) == numbered(3)


async def test_a_server_that_comes_back_without_jetstream_is_tried_again_until_it_has_it(server: NATSServer) -> None:
    async with connected(server) as transport:
        source = await subscribe(transport, "t")
        waiting = asyncio.create_task(get(source, 1))
        config = server._config.read_text()
        await asyncio.to_thread(server.kill)
        server._config.write_text(f'{{"listen": "127.0.0.1:{server.port}"}}')
        await asyncio.to_thread(server.start)
        await until(lambda: "has no JetStream" in str(source.status().error), "it sees that there is none")
        assert source.status().state == "connecting"
        await asyncio.to_thread(server.kill)
        server._config.write_text(config)
        await asyncio.to_thread(server.start)
        await until(lambda: source.status().state == "running", "it is back")
        await publish(transport, "t", b"a")
        assert bodies(await waiting) == [b"a"]


async def test_a_connection_that_nobody_reads_any_more_is_made_anew(
    server: NATSServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(server) as transport:
        source = await subscribe(transport, "t")
        reading: Any = transport._open._client._reading_task  # type: ignore[union-attr]
        reading.cancel()
        await until(lambda: "connected to NATS again" in caplog.text, "it notices")
        await publish(transport, "t", b"a")
        assert bodies(await get(source, 1)) == [b"a"]


async def test_acks_that_a_server_about_to_stop_does_not_take_are_sent_again(server: NATSServer) -> None:
    """Its JetStream goes before its connections, and then nobody takes an ack. No consumer was deleted."""
    async with connected(server) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(4))
        first, *others = await get(source, 4)
        connection = source._hand._connection
        connection.ask, ask = without_acks(connection.ask), connection.ask  # type: ignore[method-assign]
        with pytest.raises(TransportError, match="just now"):
            await source.settle([first], [])
        connection.ask = ask  # type: ignore[method-assign]
        assert not await source.settle([first, *others], [])


def without_acks(ask: Any) -> Any:
    async def asking(requests: Any, **options: Any) -> Any:
        subjects = [subject.replace("$JS.ACK", "nobody") for subject, _, _ in requests]
        return await ask([(subject, *rest) for subject, (_, *rest) in zip(subjects, requests, strict=True)], **options)

    return asking


async def test_a_publish_whose_confirm_nobody_heard_says_which_messages(server: NATSServer) -> None:
    with Proxy(server.port) as proxy:
        broker = NATSBroker(server, proxy)
        transport = broker.client()
        await transport.connect()
        await publish(transport, "t", b"before")
        messages = [Outgoing("t", body) for body in numbered(5)]
        await asyncio.to_thread(proxy.stall, "replies")
        call = asyncio.create_task(transport.publish(messages))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(proxy.cut)
        said = f"^{len(messages)} of {len(messages)} messages are not confirmed as published: "
        with pytest.raises(PublishError, match=said) as caught:
            await call
        assert list(caught.value.failed) == messages
        await asyncio.to_thread(proxy.heal)
        await transport.aclose()


async def test_a_deleted_consumer_is_made_anew_and_goes_on_where_all_was_settled(
    server: NATSServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(server) as transport, manager(server) as js:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(20))
        assert not await source.settle(await get(source, 10), [])
        await source._look()
        waiting = None
        with caplog.at_level(logging.WARNING, "sluiceway.nats"):
            (info,) = await js.consumers_info("sluiceway")
            held = await get(source, 5)
            await js.delete_consumer("sluiceway", info.name)
            refused = await source.settle(held[:2], [])
            assert [one.kind for one in refused] == ["lost", "lost"]
            waiting = await get(source, 10)
        assert bodies(waiting) == numbered(20)[10:]
        assert "making it anew" in caplog.text


async def test_a_consumer_deleted_under_a_receive_that_waits_is_made_anew(server: NATSServer) -> None:
    async with connected(server) as transport, manager(server) as js:
        source = await subscribe(transport, "t")
        call = asyncio.create_task(get(source, 1))
        await asyncio.sleep(0.2)
        (info,) = await js.consumers_info("sluiceway")
        await js.delete_consumer("sluiceway", info.name)
        await publish(transport, "t", b"a")
        assert bodies(await call) == [b"a"]


async def test_a_deleted_stream_is_made_anew_by_source_and_publisher(server: NATSServer) -> None:
    async with connected(server) as transport, manager(server) as js:
        source = await subscribe(transport, "t")
        call = asyncio.create_task(get(source, 1))
        await publish(transport, "other", b"x")
        await js.delete_stream("sluiceway")
        await publish(transport, "t", b"a")
        assert bodies(await call) == [b"a"]


async def test_a_stream_deleted_after_much_was_settled_is_received_from_its_new_beginning(server: NATSServer) -> None:
    async with connected(server) as transport, manager(server) as js:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(20))
        assert not await source.settle(await get(source, 20), [])
        await source._look()
        await source.settle([], [Settlement(one, "retry") for one in await retried(transport, source)])
        await js.delete_stream("sluiceway")
        await publish(transport, "t", b"a", b"b")
        messages = await get(source, 2)
        assert bodies(messages) == [b"a", b"b"]
        await source.settle([], [Settlement(one, "release") for one in messages])
        assert [message.attempt for message in await get(source, 2)] == [1, 1]  # the notes were of other messages


async def retried(transport: NATSTransport, source: NATSSource) -> list[Message[Any]]:
    await publish(transport, "t", b"x", b"y")
    return await get(source, 2)


async def test_failures_outlive_the_server_and_the_process(server: NATSServer) -> None:
    async with connected(server, lease=1.0) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", b"a")
        for _ in range(3):
            await source.settle([], [Settlement((await get(source, 1))[0], "retry")])
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    async with connected(server, lease=1.0) as transport:
        source = await subscribe(transport, "t")
        (message,) = await get(source, 1)
        assert (message.attempt, message.suspect) == (4, False)
        assert not await source.settle([message], [])


async def test_a_delay_is_kept_over_a_restart_of_the_server_and_the_waiting_counts_nothing(server: NATSServer) -> None:
    loop = asyncio.get_running_loop()
    async with connected(server, lease=0.5) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", b"a", b"b")
        one, _ = await get(source, 2)
        began = loop.time()
        await source.settle([], [Settlement(one, "retry", delay=3.0)])
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        while True:
            (message,) = await get(source, 1)
            if message.body == b"a":
                break
        assert 2.9 <= loop.time() - began < 15
        assert (message.failures, message.suspect) == (1, False)


async def test_a_note_goes_with_its_message(server: NATSServer) -> None:
    async with connected(server) as transport, manager(server) as js:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(3))
        await source.settle([], [Settlement(one, "retry") for one in await get(source, 3)])
        assert (await js.stream_info("sluiceway-notes")).state.messages == 3
        assert not await source.settle(await get(source, 3), [])
        assert (await js.stream_info("sluiceway-notes")).state.messages == 0


async def test_notes_that_nobody_could_delete_are_swept_away_and_no_others(server: NATSServer) -> None:
    async with connected(server) as transport, manager(server) as js:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(4))
        await source.settle([], [Settlement(one, "retry") for one in await get(source, 4)])
        *messages, waits = await get(source, 4)
        source._hand.noted.clear()  # as if the connection had broken between ack and deletion
        assert not await source.settle(messages, [])
        await source.settle([], [Settlement(waits, "retry", delay=60)])
        assert (await js.stream_info("sluiceway-notes")).state.messages == 4
        for consumer in await source._look():
            await sweep(source._connection, consumer.path, consumer.floor)
        assert (await js.stream_info("sluiceway-notes")).state.messages == 1


async def test_what_came_before_it_is_due_waits_though_there_are_more_than_max_delayed(server: NATSServer) -> None:
    async with connected(server, max_delayed=1) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(3), delay=1.0)
        messages = await get(source, 3)
        assert [(one.attempt, one.deliveries, one.suspect) for one in messages] == [(1, 1, False)] * 3
        assert not await source.settle([], [Settlement(one, "release", delay=60) for one in messages])


async def test_more_delayed_messages_than_max_delayed_are_refused_until_there_is_room(server: NATSServer) -> None:
    async with connected(server, max_delayed=2) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(3))
        messages = await get(source, 3)
        refused = await source.settle([], [Settlement(one, "retry", delay=60) for one in messages])
        assert [(one.message.body, one.kind) for one in refused] == [(b"2", "rejected")]
        assert "max_delayed" in refused[0].detail


async def test_a_consumer_that_somebody_changed_is_put_right_and_said(server: NATSServer) -> None:
    subscription = Subscription(topics=("t",), group="g", window=10)
    async with connected(server, lease=5.0) as transport, manager(server) as js:
        await transport.ensure([subscription], create=True)
        assert not [one for one in await transport.ensure([subscription], create=True) if one.level == "warning"]
        (info,) = await js.consumers_info("sluiceway")
        info.config.max_deliver = 3
        await js.add_consumer("sluiceway", info.config)
        findings = await transport.ensure([subscription], create=True)
        assert any("max_deliver" in one.text for one in findings if one.level == "warning")
        (info,) = await js.consumers_info("sluiceway")
        assert info.config.max_deliver in (-1, None)


async def test_settings_of_streams_that_endanger_messages_are_found(server: NATSServer) -> None:
    from nats.js.api import DiscardPolicy, StorageType

    async with connected(server) as transport, manager(server) as js:
        config: dict[str, Any] = {"storage": StorageType.MEMORY, "max_msgs": 10, "discard": DiscardPolicy.OLD}
        await js.add_stream(name="shop", subjects=["shop.*"], **config)
        findings = await transport.ensure([Subscription(topics=("shop.a",), group="g", window=10)], create=True)
        texts = [one.text for one in findings if one.level == "warning"]
        assert any("memory" in text for text in texts)
        assert any("discard=new" in text for text in texts)


async def test_a_pattern_spans_the_streams_of_others_and_ours(server: NATSServer) -> None:
    async with connected(server) as transport, manager(server) as js:
        await js.add_stream(name="shop", subjects=["a.b", "shop.>"])
        await js.publish("a.b", b"theirs")
        source = await subscribe(transport, "a.*")
        await publish(transport, "a.c", b"ours")
        await publish(transport, "shop.x", b"no")
        messages = await get(source, 2)
        assert sorted(bodies(messages)) == [b"ours", b"theirs"]
        assert not await source.settle(messages, [])


async def test_an_exact_topic_begins_where_the_pattern_of_its_group_was(server: NATSServer) -> None:
    async with connected(server) as transport:
        pattern = await subscribe(transport, "a.*")
        await publish(transport, "a.b", *numbered(4))
        assert not await pattern.settle(await get(pattern, 4), [])
        exact = await subscribe(transport, "a.b")
        await publish(transport, "a.b", b"new")
        assert bodies(await get(exact, 1)) == [b"new"]


async def test_what_came_while_the_loop_stood_still_for_longer_than_the_lease_is_not_taken_for_ours(
    server: NATSServer,
) -> None:
    async with connected(server, lease=1.0) as transport:
        source = await subscribe(transport, "t")
        call = asyncio.create_task(get(source, 1))
        await asyncio.sleep(0.3)
        thread = threading.Thread(target=asyncio.run, args=(publish_elsewhere(server),))
        thread.start()
        time.sleep(2.0)  # noqa: ASYNC251  # as a handler that blocks the loop does
        thread.join()
        (message,) = await call
        assert read_delivery(message.token[0]).count > 1
        assert not await source.settle([message], [])


async def publish_elsewhere(server: NATSServer) -> None:
    async with connected(server) as transport:
        await publish(transport, "t", b"a")


@pytest.mark.parametrize("count", [1, 30])
async def test_what_was_released_while_another_process_died_with_a_pull_comes_again_and_once_is_enough(
    server: NATSServer, count: int
) -> None:
    """A pull of a dead process stays at the server for a while, and makes 2.9 redeliver out of turn."""
    async with connected(server, lease=1.0) as transport:
        source = await subscribe(transport, "t")
        await publish(transport, "t", *numbered(count))
        messages = await get(source, count)
        dead = await subscribe(transport, "t")
        call = asyncio.create_task(dead.receive(10))
        await asyncio.sleep(0.2)
        dead._connection.write(b"UNSUB %b\r\n" % dead._pulls._sid)
        await source.settle([], [Settlement(one, "release") for one in messages])
        seen: set[bytes] = set()
        async with asyncio.timeout(20):
            while seen != set(numbered(count)):
                got = await source.receive(count)
                seen |= set(bodies(got))
                await source.settle(got, [])
        dead.stop()
        await call
