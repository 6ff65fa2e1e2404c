"""Kafka's options and URLs, and what is said when it cannot be reached, trusted or used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from sluiceway.errors import ConnectError, OptionError, PayloadTooLarge, PublishError, TransportError, Unsupported
from sluiceway.message import Outgoing
from sluiceway.source import Subscription
from sluiceway.transports.kafka import KafkaTransport
from tests.servers.certificates import Certificates
from tests.servers.kafka import Kafka
from tests.servers.server import free_port

pytestmark = pytest.mark.xdist_group("kafka-connecting")

USERS = {"admin": "all-secret"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    with Kafka(tmp_path_factory.mktemp("guarded"), users=USERS) as server:
        yield server


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("kafka://", "a Kafka URL is kafka://host:9092"),
        ("kafka://host/topic", "a Kafka URL is"),
        ("kafka://host:port", "host or host:port"),
        ("kafka://host?session_timeot=3", "did you mean 'session_timeout'"),
        ("kafka://host?session_timeout=soon", "must be a number"),
        ("kafka://host?session_timeout=0", "0.5 to 1800 seconds"),
        ("kafka://host?partitions=0", "1 to 10000"),
        ("kafka://user:secret@host?mechanism=MD5", "one of PLAIN"),
        ("kafka://host?prefix=a b", "letters, digits"),
        ("kafka://user:se/cret@host", "%2F"),
    ],
)
def test_what_is_wrong_with_a_url_is_said_without_its_secrets(url: str, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        KafkaTransport.from_url(url)
    assert text in str(caught.value)
    assert "cret" not in str(caught.value)


def test_nothing_that_is_shown_has_the_password() -> None:
    transport = KafkaTransport.from_url("kafkas://user:secret@one:1,two?prefix=p.")
    assert repr(transport) == "KafkaTransport(one:1, two:9092)"
    assert "secret" not in repr(transport._settings)
    assert transport._settings.client()["security.protocol"] == "SASL_SSL"


async def test_a_server_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(ConnectError, match=f"127.0.0.1:{port}.*check host and port"):
        await KafkaTransport(f"127.0.0.1:{port}").connect()


async def test_a_wrong_password_is_told_and_not_shown(guarded: Kafka) -> None:
    transport = KafkaTransport(f"127.0.0.1:{guarded.port}", user="admin", password="guessed")
    with pytest.raises(ConnectError, match="check user, password and mechanism") as caught:
        await transport.connect()
    assert "guessed" not in str(caught.value)


async def test_the_right_password_gets_in(guarded: Kafka) -> None:
    transport = KafkaTransport.from_url(f"kafka://admin:all-secret@127.0.0.1:{guarded.port}")
    await transport.connect()
    await transport.publish([Outgoing("t", b"x")])
    await transport.aclose()


async def test_tls_is_spoken_with_those_that_are_trusted(tmp_path: Path, certificates: Certificates) -> None:
    files = {"cert": certificates.server, "key": certificates.server_key, "ca": certificates.authority}
    with Kafka(tmp_path, tls=files) as server:
        url = f"kafkas://127.0.0.1:{server.port}?ca_file="
        trusted = KafkaTransport.from_url(url + str(certificates.authority))
        await trusted.connect()
        await trusted.publish([Outgoing("t", b"x")])
        await trusted.aclose()
        with pytest.raises(ConnectError, match="check ca_file"):
            await KafkaTransport.from_url(url + str(certificates.stranger)).connect()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    with Kafka(tmp_path_factory.mktemp("kafka")) as server:
        yield server


async def test_a_topic_that_may_not_be_made_is_named_everywhere(server: Kafka) -> None:
    transport = KafkaTransport(f"127.0.0.1:{server.port}", create=False)
    await transport.connect()
    subscription = Subscription(topics=("absent",), group="g", window=1)
    with pytest.raises(TransportError, match="there is no topic 'absent'"):
        await transport.subscribe(subscription)
    with pytest.raises(PublishError, match=r"there is no topic 'absent'.*create=no"):
        await transport.publish([Outgoing("absent", b"x")])
    findings = await transport.ensure([subscription], create=False)
    assert [one.level for one in findings] == ["error", "error"]
    await transport.aclose()


async def test_what_kafka_cannot_do_is_refused_before_anything_is_sent(server: Kafka) -> None:
    transport = KafkaTransport(f"127.0.0.1:{server.port}")
    await transport.connect()
    with pytest.raises(OptionError, match="Kafka's are at most 249"):
        await transport.publish([Outgoing("a/b", b"x")])
    with pytest.raises(PayloadTooLarge):
        await transport.publish([Outgoing("t", b"x", headers={"h": "x" * 1_000_000})])
    with pytest.raises(Unsupported, match="is a pattern"):
        await transport.subscribe(Subscription(topics=("a.*",), group="g", window=1))
    await transport.aclose()


async def test_a_key_goes_to_the_partition_that_javas_clients_would_choose(server: Kafka) -> None:
    """By murmur2; what that is for these keys is known from Kafka's own tests of its hash."""
    hashes = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536}
    transport = KafkaTransport(f"127.0.0.1:{server.port}", partitions=7)
    await transport.connect()
    await transport.publish([Outgoing("keyed", key.encode(), key) for key in hashes])
    await transport.aclose()
    reader = Consumer({**server.client(), "group.id": "x", "log_level": 2})
    reader.assign([TopicPartition("keyed", number, 0) for number in range(7)])
    found: dict[str, int | None] = {}
    while len(found) < len(hashes):
        record = reader.poll(10)
        assert record is not None
        found[(record.value() or b"").decode()] = record.partition()
    reader.close()
    assert found == {key: (hashed & 0x7FFFFFFF) % 7 for key, hashed in hashes.items()}
