"""RabbitMQ: URLs and options, what `connect` says when it cannot, TLS, and a broker that is not as it must be."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from pathlib import Path

import pika
import pytest

from sluiceway.errors import ConnectError, OptionError, PublishError, TransportError
from sluiceway.message import Outgoing
from sluiceway.source import Subscription
from sluiceway.transports.rabbitmq import RabbitMQTransport
from sluiceway.transports.rabbitmq.topology import STEP, rung_for
from tests.servers.certificates import Certificates
from tests.servers.rabbitmq import RabbitMQServer
from tests.servers.server import free_port
from tests.transports.rabbitmq_kit import RabbitMQBroker, shared_server, until


@pytest.fixture
def broker() -> RabbitMQBroker:
    return RabbitMQBroker(shared_server())


async def refused(url: str) -> str:
    """What `connect` says."""
    transport = RabbitMQTransport(url)
    with pytest.raises(ConnectError) as caught:
        await transport.connect()
    await transport.aclose()
    return str(caught.value)


# -- URLs and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("amqp://h/?heartbeet=5", "did you mean 'heartbeat'"),
        ("amqp://h/?heartbeat=often", "must be a whole number, got 'often'"),
        ("amqp://h/?declare=maybe", "must be yes or no, got 'maybe'"),
        ("amqp://h/?timeout=0", "more than 0 seconds"),
        ("amqp://h/?queue_type=mirrored", "'quorum' or 'classic'"),
        ("amqp://h/?max_payload=0", "1 to 536870912 bytes"),
        ("amqp://h/?ca_file=/ca.pem", "amqps://"),
        ("amqp:///vhost", "amqp://user:password@host:port/vhost"),
        ("amqp://h:port/", "amqp://user:password@host:port/vhost"),
        ("amqp://h/a/b", "%2F"),
    ],
)
def test_a_url_that_cannot_be_is_refused_with_what_is_allowed(url: str, said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        RabbitMQTransport.from_url(url)


def test_an_option_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match="prefetch"):
        RabbitMQTransport("amqp://h/", prefetch=10)


def test_nothing_that_is_shown_has_the_password() -> None:
    transport = RabbitMQTransport("amqp://ada:s3cret@h/")
    assert "s3cret" not in repr(transport)
    assert "s3cret" not in repr(vars(transport))


async def test_a_name_that_is_longer_than_amqp_allows_is_refused_and_the_error_says_what_to_shorten(
    broker: RabbitMQBroker,
) -> None:
    transport = RabbitMQTransport(broker.url())
    await transport.connect()
    try:
        long = Subscription(topics=("t",), group="g" * 240, window=1)
        for refusing in (transport.ensure([long], create=True), transport.subscribe(long)):
            with pytest.raises(
                OptionError, match=r"255 at most; shorten the topic 't', the group 'ggg.*' or the option"
            ):
                await refusing
        with pytest.raises(OptionError, match="shorten the topic"):
            await transport.publish([Outgoing("t" * 243 + ".g.dead", b"")])
        await transport.ensure([Subscription(topics=("t" * 200,), group="g", window=1)], create=True)
        await transport.publish([Outgoing("t" * 200, b"")])
    finally:
        await transport.aclose()


async def publish_on(transport: RabbitMQTransport) -> None:
    while True:
        await transport.publish([Outgoing("t", b"")])


@pytest.mark.slow
async def test_a_broker_under_alarm_keeps_no_publish_waiting_for_longer_than_said(broker: RabbitMQBroker) -> None:
    transport = RabbitMQTransport(broker.url() + "&timeout=1")
    await transport.connect()
    await transport.ensure([Subscription(topics=("t",), group="g", window=1)], create=True)
    await asyncio.to_thread(broker.server.control, "set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        with pytest.raises(PublishError):
            await publish_on(transport)  # the server looks at its memory now and then
        for message in (Outgoing("t", b""), Outgoing("t", b"", delay=3.0), Outgoing("t.g.dead", b"")):
            async with asyncio.timeout(3):
                with pytest.raises(PublishError, match="within 1 s: the broker takes no messages"):
                    await transport.publish([message])
    finally:
        await asyncio.to_thread(broker.server.control, "set_vm_memory_high_watermark", "0.6")
        await transport.aclose()


# -- connecting --------------------------------------------------------------------------------------------------


async def test_a_host_where_nobody_listens_is_said() -> None:
    port = free_port()
    said = await refused(f"amqp://guest:s3cret@127.0.0.1:{port}/")
    assert f"127.0.0.1:{port}" in said
    assert "server runs" in said
    assert "s3cret" not in said


async def test_a_wrong_password_is_said_without_it(broker: RabbitMQBroker) -> None:
    said = await refused(f"amqp://guest:s3cret@127.0.0.1:{broker.server.port}/")
    assert "password" in said
    assert "s3cret" not in said


async def test_a_virtual_host_that_is_not_there_is_said(broker: RabbitMQBroker) -> None:
    said = await refused(f"amqp://guest:guest@127.0.0.1:{broker.server.port}/nowhere")
    assert "virtual host" in said
    assert "add_vhost" in said


async def test_a_server_that_speaks_something_else_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(8)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        answering = asyncio.create_task(asyncio.to_thread(answer))
        said = await refused(f"amqp://127.0.0.1:{port}/?timeout=2")
        await answering
    assert "AMQP" in said


async def test_a_server_that_says_nothing_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = await refused(f"amqp://127.0.0.1:{listener.getsockname()[1]}/?timeout=0.5")
    assert "AMQP" in said


async def test_what_is_not_connected_says_so() -> None:
    transport = RabbitMQTransport("amqp://h/")
    with pytest.raises(TransportError, match="connect"):
        await transport.publish([Outgoing("t", b"a")])


# -- TLS ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_tls_with_a_ca_and_a_client_certificate_and_what_is_said_without(tmp_path: Path) -> None:
    made = Certificates(tmp_path / "certificates")
    server = RabbitMQServer(
        tmp_path / "rabbitmq", certificate=made.server, key=made.server_key, ca=made.authority,
        ask_client=True,
    )  # fmt: skip
    await asyncio.to_thread(server.start)
    try:
        place = f"amqps://guest:guest@localhost:{server.tls_port}/%2F?timeout=5"
        trusted = f"{place}&ca_file={made.authority}"
        transport = RabbitMQTransport(f"{trusted}&cert_file={made.client}&key_file={made.client_key}")
        await transport.connect()
        await transport.publish([Outgoing("t.dead", b"a")])
        await transport.aclose()
        assert "TLS" in await refused(f"{place}&ca_file={made.stranger}")
        assert "TLS" in await refused(f"{trusted}&server_name=elsewhere.test.invalid")
        await refused(trusted)  # without a client's certificate
        assert "AMQP" in await refused(f"amqp://guest:guest@localhost:{server.tls_port}/?timeout=2")
        with pytest.raises(ConnectError, match="TLS files"):
            RabbitMQTransport(f"{place}&ca_file={tmp_path / 'missing.pem'}")
    finally:
        server.kill()


# -- what stands at the broker -----------------------------------------------------------------------------------


async def test_a_queue_with_other_properties_is_an_error_that_names_it_and_what_to_do(broker: RabbitMQBroker) -> None:
    connection = await asyncio.to_thread(pika.BlockingConnection, pika.URLParameters(broker.server.url()))
    queue = f"{broker.exchange}|g|t"
    connection.channel().queue_declare(queue, durable=True)
    connection.close()
    transport = broker.client()
    await transport.connect()
    (finding,) = await transport.ensure([Subscription(topics=("t",), group="g", window=1)], create=True)
    assert finding.level == "error"
    assert queue in finding.text
    assert "declare=no" in finding.text
    await transport.aclose()


async def test_with_declare_no_nothing_is_made_and_what_is_missing_is_said(broker: RabbitMQBroker) -> None:
    said = await refused(f"{broker.url()}&declare=no")
    assert broker.exchange in said
    assert "declare=yes" in said
    maker = broker.client()
    await maker.connect()
    reader = RabbitMQTransport(f"{broker.url()}&declare=no")
    await reader.connect()
    subscription = Subscription(topics=("t",), group="g", window=1)
    findings = await reader.ensure([subscription], create=True)
    assert any(f"{broker.exchange}|g|t" in finding.text and finding.level == "error" for finding in findings)
    await maker.ensure([subscription], create=True)
    assert not await reader.ensure([subscription], create=True)
    await reader.publish([Outgoing("t", b"a")])
    for one in (maker, reader):
        await one.aclose()


async def test_classic_queues_are_taken_with_a_warning(broker: RabbitMQBroker) -> None:
    url = f"{broker.url()}&queue_type=classic"
    transport = RabbitMQTransport(url)
    await transport.connect()
    subscription = Subscription(topics=("t",), group="g", window=10)
    (finding,) = await transport.ensure([subscription], create=True)
    assert finding.level == "warning"
    source = await transport.subscribe(subscription)
    await transport.publish([Outgoing("t", b"a")])
    assert [one.attempt for one in await source.receive(1)] == [1]
    await source.aclose()
    await transport.aclose()


# -- publishing --------------------------------------------------------------------------------------------------


async def test_what_no_group_wants_is_refused_and_the_rest_is_published(broker: RabbitMQBroker) -> None:
    transport = broker.client()
    await transport.connect()
    source = await transport.subscribe(Subscription(topics=("t",), group="g", window=10))
    messages = [Outgoing("t", b"1"), Outgoing("nobody", b"2"), Outgoing("t", b"3"), Outgoing("nobody", b"4")]
    said = "^2 of 4 messages are not confirmed as published: .*: no group has its topic"
    with pytest.raises(PublishError, match=said) as caught:
        await transport.publish(messages)
    assert caught.value.failed == (messages[1], messages[3])
    assert [one.body for one in await source.receive(10)] == [b"1", b"3"]
    await source.aclose()
    await transport.aclose()


async def test_a_blocked_broker_is_told_and_bounds_the_wait(tmp_path: Path) -> None:
    server = RabbitMQServer(tmp_path / "rabbitmq")
    await asyncio.to_thread(server.start)
    try:
        transport = RabbitMQTransport(f"{server.url()}?timeout=2")
        await transport.connect()
        source = await transport.subscribe(Subscription(topics=("t",), group="g", window=10))
        await transport.publish([Outgoing("t", b"a"), Outgoing("t", b"b")])
        first, *_ = await source.receive(1)
        await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "absolute", "1MB")
        with contextlib.suppress(PublishError):  # the broker says that it is blocked to those who publish
            await transport.publish([Outgoing("t", b"c")])
        await until(lambda: source.status().state == "blocked")
        with pytest.raises(PublishError, match="memory"):
            await transport.publish([Outgoing("t", b"c")])
        assert source.status().state == "blocked"
        assert not await source.settle([first], [])  # acks go on
        assert (await asyncio.wait_for(source.receive(1), 10))[0].body == b"b"
        publisher = RabbitMQTransport(f"{server.url()}?timeout=2")
        await publisher.connect()
        with pytest.raises(PublishError, match="memory"):
            await publisher.publish([Outgoing("t", b"c")])
        await asyncio.wait_for(publisher.aclose(), 15)  # though the server does not read that it is closed
        await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.4")
        await until(lambda: source.status().state != "blocked")
        await transport.publish([Outgoing("t", b"d")])
        await source.aclose()
        await transport.aclose()
    finally:
        server.kill()


@pytest.mark.parametrize("delay", [0.01, 0.1, 0.35, 1.0, 59.9, 86_400.0, 1e7])
def test_a_delay_climbs_down_the_ladder_and_is_late_by_a_rung_at_most(delay: float) -> None:
    waited = 0.0
    hops = 0
    while delay - waited > 0.001:
        rung = rung_for(delay - waited)
        assert rung <= delay - waited + 1e-6 or rung == STEP
        waited += rung
        hops += 1
    assert delay - 0.001 <= waited <= delay + STEP
    assert hops < 40
