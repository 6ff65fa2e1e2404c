"""NATS: what `connect` takes, what it refuses, and that no secret shows."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluiceway.errors import ConnectError, OptionError
from sluiceway.transports.nats import NATSTransport
from tests.servers.certificates import Certificates
from tests.servers.nats import NATSServer
from tests.servers.server import free_port
from tests.transports.nats_kit import connected, get, publish, subscribe


async def refused(url: str) -> str:
    transport = NATSTransport.from_url(url)
    with pytest.raises(ConnectError) as caught:
        await asyncio.wait_for(transport.connect(), 15)
    await transport.aclose()
    return str(caught.value)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[NATSServer]:
    tls = {
        "cert_file": str(certificates.server),
        "key_file": str(certificates.server_key),
        "ca_file": str(certificates.authority),
        "verify": True,
    }
    with NATSServer(tmp_path_factory.mktemp("nats"), {"tls": tls, "authorization": {"token": "s3cret"}}) as server:
        yield server


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NATSServer]:
    users = {"authorization": {"user": "ada", "password": "p/w:1"}}
    with NATSServer(tmp_path_factory.mktemp("nats"), users) as server:
        yield server


async def test_an_unreachable_server_is_named(tmp_path: Path) -> None:
    port = free_port()
    assert f"127.0.0.1:{port}" in await refused(f"nats://127.0.0.1:{port}")


async def test_a_wrong_password_is_said_and_not_shown(locked_server: NATSServer) -> None:
    text = await refused(f"nats://ada:wr0ng@127.0.0.1:{locked_server.port}")
    assert "credentials" in text
    assert "wr0ng" not in text


async def test_user_and_password_come_through_the_url_and_serve_the_renewer_too(locked_server: NATSServer) -> None:
    transport = NATSTransport.from_url(f"nats://ada:p%2Fw%3A1@127.0.0.1:{locked_server.port}?lease=5")
    assert "p/w" not in repr(transport)
    assert "p/w" not in repr(transport._settings)
    await transport.connect()
    source = await subscribe(transport, "t")
    await publish(transport, "t", b"a")
    (message,) = await get(source, 1)
    assert source.renewer is not None
    renewer = pickle.loads(pickle.dumps(source.renewer))
    made = await asyncio.to_thread(renewer)
    assert not await asyncio.to_thread(made.renew, [message.token])
    await asyncio.to_thread(made.close)
    await transport.aclose()


async def test_one_of_several_servers_is_enough(locked_server: NATSServer) -> None:
    servers = f"127.0.0.1:{free_port()},127.0.0.1:{locked_server.port}"
    transport = NATSTransport.from_url(f"nats://ada:p%2Fw%3A1@{servers}")
    await transport.connect()
    await transport.aclose()


async def test_tls_with_a_client_certificate_and_a_token(tls_server: NATSServer, certificates: Certificates) -> None:
    files = f"ca_file={certificates.authority}&cert_file={certificates.client}&key_file={certificates.client_key}"
    transport = NATSTransport.from_url(f"tls://s3cret@localhost:{tls_server.port}?{files}")
    await transport.connect()
    source = await subscribe(transport, "t")
    await publish(transport, "t", b"a")
    messages = await get(source, 1)
    assert source.renewer is not None
    renewer = await asyncio.to_thread(source.renewer)
    assert not await asyncio.to_thread(renewer.renew, [messages[0].token])
    await asyncio.to_thread(renewer.close)
    assert not await source.settle(messages, [])
    await transport.aclose()


async def test_a_server_that_another_authority_signed_is_refused(
    tls_server: NATSServer, certificates: Certificates
) -> None:
    assert "TLS" in await refused(f"tls://s3cret@localhost:{tls_server.port}?ca_file={certificates.stranger}")


async def test_a_server_without_tls_is_refused_before_it_hears_the_password(certificates: Certificates) -> None:
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","headers":true,"auth_required":true}\r\n')
        heard.extend(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert "no TLS" in await refused(f"tls://ada:pa55word@127.0.0.1:{port}?ca_file={certificates.authority}")
    server.close()
    await server.wait_closed()
    assert b"pa55word" not in heard


async def test_a_server_without_jetstream_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with NATSServer(tmp_path, jetstream=False) as server:
        assert "JetStream" in await refused(server.url())


async def test_files_that_cannot_be_read_are_named() -> None:
    assert "/no/such/ca.pem" in await refused("nats://127.0.0.1:1?ca_file=/no/such/ca.pem")


async def test_a_missing_package_for_key_files_is_named(locked_server: NATSServer, tmp_path: Path) -> None:
    if importlib.util.find_spec("nkeys") is not None:
        pytest.skip("nkeys is installed")
    seed = tmp_path / "seed"
    seed.write_text("SU…")
    assert "pip install nkeys" in await refused(f"{locked_server.url()}?nkey={seed}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nats://h?leese=3", "did you mean 'lease'"),
        ("nats://h?lease=soon", "must be a number"),
        ("nats://h?lease=0", "0.1 to 86400"),
        ("nats://h?stream=a.b", "stream"),
        ("nats://h?password=x", "no option 'password'"),
        ("nats://h?key_file=k.pem", "together with cert_file"),
        ("nats://h/path", "nats://host"),
        ("nats://", "nats://host"),
        ("nats://h:port", "host:port"),
    ],
)
def test_an_option_that_cannot_be_says_what_can(url: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        NATSTransport.from_url(url)
    assert said in str(caught.value)


def test_a_url_that_is_wrong_does_not_show_its_password() -> None:
    with pytest.raises(OptionError) as caught:
        NATSTransport.from_url("nats://ada:pa55@h/path")
    assert "pa55" not in str(caught.value)


async def test_connect_and_close_leave_nothing_behind(locked_server: NATSServer) -> None:
    before = asyncio.all_tasks()
    async with connected(locked_server, user="ada", password="p/w:1"):
        pass
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == before
