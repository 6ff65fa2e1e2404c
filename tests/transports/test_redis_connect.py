"""How Redis is reached: URLs, passwords, TLS, servers that will not do, and settings that endanger messages."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from sluiceway.app import open_transport
from sluiceway.errors import ConnectError, OptionError, Unsupported
from sluiceway.message import Outgoing
from sluiceway.source import Subscription
from sluiceway.transports.redis import RedisTransport
from tests.servers.certificates import Certificates
from tests.servers.redis import RedisServer
from tests.servers.server import free_port
from tests.transports.redis_kit import bodies, connected, get, publish, redis_server, subscribe

__all__ = ["redis_server"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://h?laese=3", "did you mean 'lease'"),
        ("redis://h?lease=soon", "'lease' of a redis URL must be a number, got 'soon'"),
        ("redis://h?lease=0", "lease must be 0.1 or more seconds"),
        ("redis://h/one", "names no Redis server"),
        ("redis://h:port", "names no Redis server"),
        ("redis://h?ca_file=x", "need TLS: write rediss://"),
        ("rediss://h?key_file=x", "together with cert_file"),
        ("redis://h?prefix={a}", "prefix must be text without {"),
        ("redis://h?max_payload=0", "max_payload must be 1 to"),
    ],
)
def test_a_url_that_cannot_be_says_what_is_wrong(url: str, says: str) -> None:
    with pytest.raises(OptionError, match=says.replace("{", r"\{")):
        open_transport(url)


def test_no_secret_is_shown() -> None:
    transport = open_transport("redis://ada:hunter2@h:1/3?lease=5")
    assert "hunter2" not in repr(transport) + repr(vars(transport))
    with pytest.raises(OptionError) as caught:
        open_transport("redis://ada:hunter2@h:port")
    assert "hunter2" not in str(caught.value)


async def test_a_server_that_is_not_there_says_so() -> None:
    with pytest.raises(ConnectError, match="cannot reach redis://127"):
        await RedisTransport(f"redis://127.0.0.1:{free_port()}").connect()


async def test_a_password_is_needed_and_must_be_right(tmp_path: Path) -> None:
    with RedisServer(tmp_path, {"requirepass": "s3cret"}) as server:
        with pytest.raises(ConnectError, match="give user and password in the URL"):
            await RedisTransport(server.url()).connect()
        wrong = server.url().replace("//", "//:wr0ng@")
        with pytest.raises(ConnectError, match="refuses the user name or password") as caught:
            await RedisTransport(wrong).connect()
        assert "wr0ng" not in str(caught.value)
        server.ask("ACL", "SETUSER", "ada", "on", ">love/lace", "~*", "+@all")
        for url in (server.url().replace("//", "//:s3cret@"), server.url().replace("//", "//ada:love%2Flace@")):
            transport = RedisTransport(url)
            await transport.connect()
            source = await transport.subscribe(Subscription(topics=("t",), group="g", window=10))
            await transport.publish([Outgoing("t", b"a")])
            messages = await source.receive(10)
            assert source.renewer is not None
            assert "cret" not in repr(source.renewer)
            renewer = pickle.loads(pickle.dumps(source.renewer))()
            renewer.close()
            await source.settle(messages, [])
            await transport.aclose()


async def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    made = Certificates(tmp_path / "certificates")
    files = {"cert": made.server, "key": made.server_key, "ca": made.authority}
    with RedisServer(tmp_path / "server", tls=files, ask_client=True) as server:
        good = f"{server.url()}?ca_file={made.authority}&cert_file={made.client}&key_file={made.client_key}"
        transport = RedisTransport.from_url(good)
        await transport.connect()
        source = await transport.subscribe(Subscription(topics=("t",), group="g", window=10))
        await transport.publish([Outgoing("t", b"x" * 300_000)])
        assert len((await source.receive(1))[0].body) == 300_000
        await transport.aclose()
        for url, says in (
            (f"{server.url()}?ca_file={made.stranger}", "is not trusted.*ca_file"),
            (good + "&server_name=elsewhere.invalid", "is not trusted.*server_name"),
            (f"{server.url()}?ca_file={made.authority}", "lets nobody in|closed the connection|broke"),
            (f"{server.url()}?ca_file=/nowhere", "cannot use the TLS files ./nowhere"),
            (server.url().replace("rediss", "redis"), "if it wants TLS its URL is rediss://"),
        ):
            with pytest.raises(ConnectError, match=says):
                await RedisTransport.from_url(url).connect()


async def test_tls_to_a_server_without_it_says_so(redis_server: RedisServer) -> None:
    with pytest.raises(ConnectError, match="without TLS its URL is redis://"):
        await RedisTransport(redis_server.url().replace("redis", "rediss")).connect()


async def test_a_replica_and_a_cluster_are_refused(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "replica") as server:
        server.ask("REPLICAOF", "127.0.0.1", str(free_port()))
        with pytest.raises(ConnectError, match="is a replica"):
            await RedisTransport(server.url()).connect()
    cluster = RedisServer(tmp_path / "cluster", {"cluster-enabled": "yes", "cluster-port": str(free_port())})
    with cluster as server, pytest.raises(ConnectError, match="cluster"):
        await RedisTransport(server.url()).connect()


async def test_settings_that_lose_messages_are_found(tmp_path: Path, redis_server: RedisServer) -> None:
    subscription = Subscription(topics=("t",), group="g", window=10)
    settings = {"appendonly": "no", "maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}
    with RedisServer(tmp_path, settings) as server:
        transport = RedisTransport(server.url())
        found = await transport.ensure([subscription], create=True)
        assert [(one.level, one.text.rpartition("set ")[2]) for one in found] == [
            ("warning", "`appendonly yes`"),
            ("error", "`maxmemory-policy noeviction`"),
            ("info", found[2].text),
        ]
        await transport.aclose()
    async with connected(redis_server) as transport:
        redis_server.ask("FLUSHALL")
        assert [one.level for one in await transport.ensure([subscription], create=False)] == ["error"]
        assert [one.level for one in await transport.ensure([subscription], create=True)] == ["info"]
        assert not await transport.ensure([subscription], create=False)


async def test_a_pattern_is_refused_by_name(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        with pytest.raises(Unsupported, match=r"'t\.\*' is a pattern"):
            await subscribe(transport, "t.*")


async def test_scripts_that_the_server_forgot_are_loaded_again(redis_server: RedisServer) -> None:
    async with connected(redis_server) as transport:
        redis_server.ask("FLUSHALL")
        source = await subscribe(transport, "t")
        redis_server.ask("SCRIPT", "FLUSH")
        await publish(transport, "t", b"a")
        assert bodies(await get(source, 1)) == [b"a"]
