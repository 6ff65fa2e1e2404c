"""What Kafka's tests rest on: the servers do what their options say, keep what they confirmed, and stand for faults."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from sluiceway._decisions.commit_metadata import LIMIT
from tests.servers.certificates import Certificates
from tests.servers.kafka import Kafka, KafkaCluster, committed
from tests.servers.proxy import Proxy

pytestmark = pytest.mark.xdist_group("kafka-servers")


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    with Kafka(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture
def topic(kafka: Kafka) -> str:
    name = f"orders-{uuid.uuid4().hex[:8]}"
    kafka.create(name)
    return name


def produce(config: dict[str, Any], topic: str, bodies: Sequence[bytes], seconds: float = 10) -> list[KafkaError]:
    """Publish them, and return how those were refused that were."""
    refused: list[KafkaError] = []
    producer = Producer({**QUIET, **config, "acks": "all", "delivery.timeout.ms": int(seconds * 1000)})
    for body in bodies:
        producer.produce(topic, body, on_delivery=lambda error, _: refused.append(error) if error else None)
    assert producer.flush(seconds + 5) == 0
    return refused


def consumer(config: dict[str, Any], group: str = "billing", **settings: Any) -> Consumer:
    named = {name.replace("_", "."): value for name, value in settings.items()}
    return Consumer({
        **QUIET, **config, "group.id": group, "auto.offset.reset": "earliest", "enable.auto.commit": False, **named
    })  # fmt: skip


def read(reader: Consumer, count: int, seconds: float = 20) -> list[bytes]:
    bodies: list[bytes] = []
    deadline = time.monotonic() + seconds
    while len(bodies) < count and time.monotonic() < deadline:
        for record in reader.consume(count - len(bodies), 0.2):
            error = record.error()
            if error is not None:
                raise KafkaException(error)
            bodies.append(record.value() or b"")
    return bodies


def fails(config: dict[str, Any]) -> str:
    """What a client logs when it cannot connect."""
    told: list[str] = []
    client = Producer({**config, "error_cb": lambda error: told.append(error.str()), "log_level": 2})
    until("it tells of an error", lambda: client.poll(0.1) is not None and bool(told))
    return told[0]


def until(what: str, condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


QUIET = {"log_level": 2}  # a server that goes away is the subject, not news


def test_what_was_confirmed_and_committed_is_there_after_a_kill_and_a_start_on_the_same_port(tmp_path: Path) -> None:
    with Kafka(tmp_path) as server:
        server.create("orders", 2)
        assert produce(server.client(), "orders", [b"%d" % number for number in range(100)]) == []
        reader = consumer(server.client())
        reader.subscribe(["orders"])
        assert len(read(reader, 100)) == 100
        reader.commit(offsets=[TopicPartition("orders", 0, 7, metadata="mine")], asynchronous=False)
        port = server.port

        server.kill()
        server.start()

        assert server.port == port
        assert committed(server.admin(), "billing", "orders") == (7, "mine")
        assert committed(server.admin(), "billing", "orders", 1) is None
        other = consumer(server.client(), "audit")
        other.subscribe(["orders"])
        assert sorted(read(other, 100), key=int) == [b"%d" % number for number in range(100)]
        other.close()
        reader.close()


def test_a_server_that_stands_still_confirms_nothing_until_it_goes_on(kafka: Kafka, topic: str) -> None:
    kafka.pause()
    try:
        (error,) = produce(kafka.client(), topic, [b"late"], 1)
    finally:
        kafka.resume()
    assert error.code() == KafkaError._MSG_TIMED_OUT
    assert produce(kafka.client(), topic, [b"now"]) == []


def test_topics_are_not_made_by_whoever_writes_to_them(kafka: Kafka) -> None:
    (error,) = produce(kafka.client(), "no-such-topic", [b"x"], 2)
    assert error.code() in {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._MSG_TIMED_OUT}
    assert "no-such-topic" not in kafka.admin().list_topics(timeout=10).topics


def test_a_deleted_topic_is_gone_and_can_be_made_anew_empty(kafka: Kafka, topic: str) -> None:
    assert produce(kafka.client(), topic, [b"old"]) == []
    kafka.delete(topic)
    until("it is gone", lambda: topic not in kafka.admin().list_topics(timeout=10).topics)
    kafka.create(topic, 3)
    assert produce(kafka.client(), topic, [b"new"]) == []
    reader = consumer(kafka.client())
    reader.subscribe([topic])
    assert read(reader, 1) == [b"new"]
    assert len(reader.list_topics(topic).topics[topic].partitions) == 3
    reader.close()


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_both_group_protocols_hand_over_from_a_member_that_leaves(kafka: Kafka, topic: str, protocol: str) -> None:
    assert produce(kafka.client(), topic, [b"one", b"two"]) == []
    first, second = (consumer(kafka.client(), topic, group_protocol=protocol) for _ in range(2))
    first.subscribe([topic])
    assert read(first, 2) == [b"one", b"two"]
    first.commit(offsets=[TopicPartition(topic, 0, 1)], asynchronous=False)
    second.subscribe([topic])
    first.close()
    assert read(second, 1) == [b"two"]
    second.close()


def test_what_a_transaction_writes_and_commits_shows_all_at_once(kafka: Kafka, topic: str) -> None:
    source = consumer(kafka.client(), topic)
    source.subscribe([topic])
    assert produce(kafka.client(), topic, [b"in"]) == []
    assert read(source, 1) == [b"in"]
    kafka.create(f"{topic}-out")
    producer = Producer({**kafka.client(), "transactional.id": topic})
    producer.init_transactions(20)
    reader = consumer(kafka.client(), "other")
    reader.subscribe([f"{topic}-out"])
    for end in (producer.abort_transaction, producer.commit_transaction):
        producer.begin_transaction()
        producer.produce(f"{topic}-out", end.__name__.encode())
        producer.send_offsets_to_transaction([TopicPartition(topic, 0, 1)], source.consumer_group_metadata(), 20)
        producer.flush(10)
        assert committed(kafka.admin(), topic, topic) is None
        end(20)
    assert read(reader, 1) == [b"commit_transaction"]
    assert committed(kafka.admin(), topic, topic) == (1, "")
    source.close()
    reader.close()


def test_metadata_of_a_commit_may_have_so_many_bytes(kafka: Kafka, topic: str) -> None:
    reader = consumer(kafka.client(), topic)
    reader.commit(offsets=[TopicPartition(topic, 0, 1, metadata="m" * LIMIT)], asynchronous=False)
    assert committed(kafka.admin(), topic, topic) == (1, "m" * LIMIT)
    with pytest.raises(KafkaException, match="OFFSET_METADATA_TOO_LARGE"):
        reader.commit(offsets=[TopicPartition(topic, 0, 1, metadata="m" * (LIMIT + 1))], asynchronous=False)
    reader.close()


def test_clients_go_where_it_is_advertised(tmp_path: Path) -> None:
    server = Kafka(tmp_path)
    with Proxy(server.port) as proxy:
        server.advertised = proxy.port
        with server:
            server.create("orders")
            taken = proxy.taken
            assert produce(server.client(), "orders", [b"x"]) == []
            assert proxy.taken > taken


def test_it_speaks_tls_with_those_who_trust_it_and_show_who_they_are(
    tmp_path: Path, certificates: Certificates
) -> None:
    files = {"cert": certificates.server, "key": certificates.server_key, "ca": certificates.authority}
    with Kafka(tmp_path, tls=files, ask_client=True) as server:
        shown = {
            "ssl.certificate.location": str(certificates.client), "ssl.key.location": str(certificates.client_key)
        }  # fmt: skip
        assert "orders" not in Producer({**QUIET, **server.client(), **shown}).list_topics(timeout=10).topics
        stranger = {**server.client(), **shown, "ssl.ca.location": str(certificates.stranger)}
        assert "certificate verify failed" in fails(stranger)
        assert "certificate" in fails(server.client())  # none is shown


USERS = {"admin": "all", "app": "little"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    with Kafka(tmp_path_factory.mktemp("guarded"), users=USERS, authorizer=True) as server:
        server.create("orders")
        yield server


def test_it_wants_the_passwords_of_its_users(guarded: Kafka) -> None:
    assert produce(guarded.client(), "orders", [b"x"]) == []
    assert "Authentication failed" in fails({**guarded.client(), "sasl.password": "guessed"})


def test_it_takes_a_scram_password_that_was_set_later(guarded: Kafka) -> None:
    set_ = UserScramCredentialUpsertion("admin", ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096), b"salty")
    admin = guarded.admin()
    admin.alter_user_scram_credentials([set_])["admin"].result(10)
    salty = {**guarded.client(), "sasl.mechanism": "SCRAM-SHA-256", "sasl.password": "salty"}
    assert produce(salty, "orders", [b"x"]) == []
    assert "Authentication failed" in fails({**salty, "sasl.password": "sweet"})


def test_others_than_the_first_user_may_do_what_access_lists_allow(guarded: Kafka) -> None:
    app = guarded.client("app")
    (error,) = produce(app, "orders", [b"x"])
    assert error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    allowed = AclBinding(
        ResourceType.TOPIC, "orders", ResourcePatternType.LITERAL, "User:app", "*",
        AclOperation.WRITE, AclPermissionType.ALLOW,
    )  # fmt: skip
    admin = guarded.admin()
    admin.create_acls([allowed])[allowed].result(10)
    assert produce(app, "orders", [b"x"]) == []
    reader = consumer(app)
    reader.subscribe(["orders"])
    with pytest.raises(KafkaException, match="AUTHORIZATION_FAILED"):
        read(reader, 1)
    reader.close()


@pytest.mark.slow
def test_of_three_brokers_one_may_die_and_what_it_led_and_coordinated_moves(tmp_path: Path) -> None:
    with KafkaCluster(tmp_path) as cluster:
        cluster.create("orders", 3)
        assert produce(cluster.client(), "orders", [b"before"] * 10) == []
        reader = consumer(cluster.client(), session_timeout_ms=6000)
        reader.subscribe(["orders"])
        assert len(read(reader, 10)) == 10
        reader.commit(asynchronous=False)

        dying = cluster.coordinator("billing")
        (led,) = [one for one in range(3) if cluster.leader("orders", one) is dying]
        dying.kill()
        until("another one leads", lambda: cluster.leader("orders", led) is not dying)
        until("another one coordinates", lambda: cluster.coordinator("billing") is not dying)
        assert produce(cluster.client(), "orders", [b"after"] * 10, 30) == []
        assert read(reader, 10) == [b"after"] * 10
        reader.commit(asynchronous=False)
        reader.close()

        dying.start()
        until("it has come back", lambda: len(cluster.admin().list_topics(timeout=10).brokers) == 3)
        admin = cluster.admin()

        def committed_in_all() -> int:
            ends = [committed(admin, "billing", "orders", one) for one in range(3)]
            return sum(end[0] for end in ends if end is not None)

        until("all is committed, for whoever coordinates now", lambda: committed_in_all() == 20)
