"""What the faults of other tests rest on: the proxy does to connections what it says, and the certificates are good."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest

from tests.servers.certificates import Certificates
from tests.servers.proxy import HOST, Proxy
from tests.servers.server import free_port

MEGABYTE = b"m" * 1_000_000


class Echo:
    """A server that sends back what comes, and keeps it. It half-closes when its client does."""

    def __init__(self) -> None:
        self.got = b""
        self.ends: list[str] = []  # how its connections ended
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(one,), daemon=True).start()

    def _serve(self, one: socket.socket) -> None:
        with one:
            try:
                while data := one.recv(65_536):
                    self.got += data
                    one.sendall(data)
            except OSError:
                self.ends.append("reset")
            else:
                self.ends.append("end")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as made:
        yield made


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connect(proxy) as made:
        say(made, b"hello")
        yield made


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), 5)


def say(client: socket.socket, data: bytes) -> None:
    """Send it and have it back."""
    client.sendall(data)
    assert read(client, len(data)) == data


def read(client: socket.socket, count: int) -> bytes:
    client.settimeout(5)
    got = b""
    while len(got) < count and (more := client.recv(count - len(got))):
        got += more
    return got


def is_silent(client: socket.socket, seconds: float = 0.2) -> bool:
    """Whether nothing arrives in so many seconds."""
    client.settimeout(seconds)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    return False


def until(what: str, condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_it_passes_on_both_ways_and_counts(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as client:
        sending = threading.Thread(target=client.sendall, args=(MEGABYTE,))
        sending.start()
        assert read(client, len(MEGABYTE)) == MEGABYTE
        sending.join()
        assert (proxy.taken, proxy.open) == (1, 1)
    until("it hears of the end", lambda: proxy.open == 0)
    assert proxy.passed("requests") == proxy.passed("replies") == len(MEGABYTE)
    until("so does the server", lambda: echo.ends == ["end"])


def test_an_end_is_passed_on_as_an_end_and_what_still_flows_back_arrives(client: socket.socket) -> None:
    client.sendall(b"last")
    client.shutdown(socket.SHUT_WR)
    assert read(client, 100) == b"last"


def test_a_cut_resets_both_sides_and_the_next_connection_is_taken(
    proxy: Proxy, echo: Echo, client: socket.socket
) -> None:
    assert proxy.cut() == 1
    assert proxy.open == 0
    with pytest.raises(ConnectionResetError):
        read(client, 1)
    until("the server hears of it", lambda: echo.ends == ["reset"])
    with connect(proxy) as again:
        say(again, b"again")


def test_a_cut_without_reset_ends_both_sides_in_good_order(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    assert proxy.cut(reset=False) == 1
    assert read(client, 1) == b""
    until("the server hears of it", lambda: echo.ends == ["end"])


def test_stalled_it_takes_connections_and_passes_on_nothing_until_it_is_healed(
    proxy: Proxy, echo: Echo, client: socket.socket
) -> None:
    proxy.stall()
    client.sendall(b"one")
    with connect(proxy) as other:
        other.sendall(b"two")
        assert is_silent(client)
        assert is_silent(other)
        assert echo.got == b"hello"
        proxy.heal()
        assert read(client, 3) == b"one"
        assert read(other, 3) == b"two"


def test_with_replies_stalled_and_then_cut_a_request_was_carried_out_and_nobody_hears_of_it(
    proxy: Proxy, echo: Echo, client: socket.socket
) -> None:
    proxy.stall("replies")
    client.sendall(b"pay")
    until("the server has it", lambda: echo.got == b"hellopay")
    assert is_silent(client)
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        read(client, 3)
    proxy.heal()
    with connect(proxy) as again:
        say(again, b"again")


def test_with_requests_stalled_the_server_gets_nothing_and_can_still_speak(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as client:
        proxy.slow(0.2, way="replies")
        client.sendall(b"x")
        until("the server has it", lambda: echo.got == b"x")
        proxy.stall("requests")
        assert read(client, 1) == b"x"
        client.sendall(b"y")
        assert is_silent(client, 0.4)
        assert echo.got == b"x"


def test_slowed_each_read_takes_its_latency_that_way_alone(proxy: Proxy, client: socket.socket) -> None:
    proxy.slow(0.15, way="replies")
    began = time.monotonic()
    say(client, b"x")
    assert 0.15 <= time.monotonic() - began < 1
    proxy.heal()
    began = time.monotonic()
    say(client, b"x")
    assert time.monotonic() - began < 0.1


def test_slowed_no_more_than_its_rate_passes(proxy: Proxy, client: socket.socket) -> None:
    proxy.slow(rate=100_000, way="requests")
    began = time.monotonic()
    client.sendall(b"x" * 50_000)
    assert read(client, 50_000)
    assert 0.4 < time.monotonic() - began < 3


def test_refusing_it_takes_no_connections_and_open_ones_go_on(proxy: Proxy, client: socket.socket) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    say(client, b"still here")
    proxy.heal()
    with connect(proxy) as other:
        say(other, b"again")


@pytest.mark.parametrize("count", [1, 999])
def test_it_cuts_after_so_many_bytes_in_the_midst_of_what_flows(
    proxy: Proxy, client: socket.socket, count: int
) -> None:
    proxy.cut_after(count)
    client.sendall(b"x" * 1_000)
    got = b""
    try:
        while more := client.recv(1_000):
            got += more
    except ConnectionResetError:
        pass
    assert len(got) <= count  # an RST may overtake what it follows
    assert proxy.passed("replies") == len(b"hello") + count
    with connect(proxy) as again:
        say(again, b"once only")


def test_without_its_server_a_connection_is_reset(echo: Echo) -> None:
    with Proxy(free_port()) as proxy, connect(proxy) as client, pytest.raises(ConnectionResetError):
        read(client, 1)


def test_the_port_stays_the_same_over_stop_and_start(proxy: Proxy, client: socket.socket) -> None:
    port = proxy.port
    proxy.stop()
    proxy.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    with pytest.raises(RuntimeError, match="not started"):
        proxy.cut()
    proxy.start()
    with connect(proxy) as again:
        say(again, b"again")
    assert proxy.port == port


async def test_it_goes_on_while_the_loop_of_the_test_is_blocked(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection(HOST, proxy.port)
    writer.write(b"hello")
    time.sleep(0.3)  # noqa: ASYNC251 - the test's loop stands still
    assert proxy.passed("replies") == 5
    assert await reader.readexactly(5) == b"hello"
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()


@pytest.mark.parametrize(
    ("certificate", "trusts", "error"),
    [
        ("server", "authority", None),
        ("server", "stranger", "CERTIFICATE_VERIFY_FAILED"),
        ("elsewhere", "authority", "is not valid for '127.0.0.1'"),
    ],
)
async def test_the_certificates_are_accepted_where_they_should_be(
    certificates: Certificates, certificate: str, trusts: str, error: str | None
) -> None:
    context = certificates.server_context()
    context.load_cert_chain(getattr(certificates, certificate), getattr(certificates, f"{certificate}_key"))
    server = await asyncio.start_server(lambda _, writer: writer.close(), HOST, 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        ours = ssl.create_default_context(cafile=str(getattr(certificates, trusts)))
        if error is None:
            _, writer = await asyncio.open_connection(HOST, port, ssl=ours)
            writer.close()
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match=error):
                await asyncio.open_connection(HOST, port, ssl=ours)


@pytest.mark.parametrize("shown", [True, False])
async def test_a_server_that_asks_for_a_client_certificate_takes_ours_alone(
    certificates: Certificates, shown: bool
) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"welcome")
        writer.close()

    server = await asyncio.start_server(greet, HOST, 0, ssl=certificates.server_context(ask_client=True))
    async with server:
        ours = ssl.create_default_context(cafile=str(certificates.authority))
        if shown:
            ours.load_cert_chain(certificates.client, certificates.client_key)
        reader, writer = await asyncio.open_connection(HOST, server.sockets[0].getsockname()[1], ssl=ours)
        try:
            got = await reader.read()
        except (ssl.SSLError, ConnectionError):
            got = b""
        assert got == (b"welcome" if shown else b"")
        writer.close()
