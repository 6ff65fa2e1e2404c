"""Apache Kafka of the tests' own: one server that is broker and controller (KRaft), or several that are one cluster."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from cryptography.hazmat.primitives import serialization

from tests.servers.kafka_files import STARTED, command, format_data, require, write
from tests.servers.server import Server, free_port

PATIENCE = 20.0  # seconds that an administrative call may take


# What keeps it small and quick; the limits let tests have groups whose members time out soon.
SMALL = {
    "auto.create.topics.enable": "false",
    "background.threads": "2",
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
    "group.consumer.min.heartbeat.interval.ms": "100",
    "group.consumer.min.session.timeout.ms": "500",
    "group.coordinator.threads": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    "log.cleaner.dedupe.buffer.size": "4194304",  # 128 MiB by default, taken at once
    "num.io.threads": "2",
    "num.network.threads": "1",
    "offsets.topic.num.partitions": "1",
    "offsets.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
}


class Kafka(Server):
    """`settings` are lines of its configuration, such as `{"log.cleaner.backoff.ms": "100"}`, `java` arguments for its
    virtual machine.

    Clients have a listener of their own, on `port`. With `tls` (the files `cert`, `key` and `ca`) it speaks TLS, and
    then wants a certificate of its clients too if it is told so. With `users` (name to password) it wants SASL: PLAIN,
    or SCRAM-SHA-256 for those who are given such a password later. With `authorizer` the first user may do all, and the
    others what access lists allow.

    `advertised`, set before a start, is the port that clients are told to come to: that of a proxy.
    """

    ready_in = 60.0

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str] | None = None,
        *,
        node: int = 1,
        users: Mapping[str, str] | None = None,
        authorizer: bool = False,
        tls: Mapping[str, Path] | None = None,
        ask_client: bool = False,
        java: Sequence[str] = (),
    ) -> None:
        require()
        super().__init__(folder)
        self.node = node
        self.advertised = self.port
        self.internal_port, self.controller_port = free_port(), free_port()
        self.voters = f"{node}@127.0.0.1:{self.controller_port}"
        self.users = dict(users or {})
        self.tls = tls
        self._java = tuple(java)
        self._settings = {**SMALL, **self._security(ask_client, authorizer), **(settings or {})}
        self._began = 0

    def _security(self, ask_client: bool, authorizer: bool) -> dict[str, str]:
        lines: dict[str, str] = {}
        if self.users:
            known = " ".join(f'user_{name}="{password}"' for name, password in self.users.items())
            listener, modules = "listener.name.client", "org.apache.kafka.common.security"
            lines["sasl.enabled.mechanisms"] = "PLAIN,SCRAM-SHA-256"
            lines[f"{listener}.plain.sasl.jaas.config"] = f"{modules}.plain.PlainLoginModule required {known};"
            lines[f"{listener}.scram-sha-256.sasl.jaas.config"] = f"{modules}.scram.ScramLoginModule required;"
        if authorizer:
            lines["authorizer.class.name"] = "org.apache.kafka.metadata.authorizer.StandardAuthorizer"
            # Servers are anonymous to each other; clients cannot be, since the authorizer is for those with users.
            lines["super.users"] = f"User:ANONYMOUS;User:{next(iter(self.users))}"
        if self.tls is not None:
            key = serialization.load_pem_private_key(self.tls["key"].read_bytes(), None)
            pem = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            store = self.folder / "server.pem"  # Kafka wants both in one file
            store.write_bytes(pem + self.tls["cert"].read_bytes())
            lines |= {
                "ssl.keystore.type": "PEM", "ssl.keystore.location": str(store),
                "ssl.truststore.type": "PEM", "ssl.truststore.location": str(self.tls["ca"]),
                "ssl.client.auth": "required" if ask_client else "none",
            }  # fmt: skip
        return lines

    @property
    def protocol(self) -> str:
        """How clients speak to it, as they name it in their configuration."""
        return ("SASL_" if self.users else "") + ("PLAINTEXT" if self.tls is None else "SSL")

    def command(self) -> Sequence[str]:
        return command("kafka.Kafka", "server.properties", java=self._java)

    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        """Whether it serves clients: it has joined its cluster, and loaded what it has."""
        return STARTED in self.log()[self._began :]

    def start(self) -> Self:
        data = self.folder / "data"
        if not data.exists():
            format_data(data, self.node, _identity())
        addresses = {"CLIENT": self.port, "INTERNAL": self.internal_port, "CONTROLLER": self.controller_port}
        lines = {
            "process.roles": "broker,controller",
            "node.id": str(self.node),
            "log.dirs": str(data),
            "controller.quorum.voters": self.voters,
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in addresses.items()),
            "advertised.listeners": f"CLIENT://127.0.0.1:{self.advertised},INTERNAL://127.0.0.1:{self.internal_port}",
            "listener.security.protocol.map": f"CLIENT:{self.protocol},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "INTERNAL",
            "controller.listener.names": "CONTROLLER",
            **self._settings,
        }
        write(self.folder / "server.properties", lines)
        path = self.folder / "server.log"
        self._began = len(path.read_text(errors="replace")) if path.exists() else 0
        return super().start()

    def client(self, user: str | None = None) -> dict[str, Any]:
        """What any client's configuration needs to reach it: as `user`, or as the first one of its users."""
        found: dict[str, Any] = {"bootstrap.servers": f"127.0.0.1:{self.port}", "security.protocol": self.protocol}
        if self.tls is not None:
            found["ssl.ca.location"] = str(self.tls["ca"])
        if self.users:
            name = next(iter(self.users)) if user is None else user
            found |= {"sasl.mechanism": "PLAIN", "sasl.username": name, "sasl.password": self.users[name]}
        return found

    def admin(self) -> AdminClient:
        """A client for what an administrator does, as the first of its users."""
        return _admin(self.client())

    def create(self, topic: str, partitions: int = 1, **config: str) -> None:
        """Make a topic; `config` has underscores for dots. It has leaders when this returns."""
        _create(self.admin(), topic, partitions, config)

    def delete(self, topic: str) -> None:
        """Delete a topic. Its brokers know of that when this returns, or very soon."""
        admin = self.admin()  # kept: with its client a call that goes on would end
        _result(admin.delete_topics([topic]))


class KafkaCluster:
    """Several servers that are one cluster; with three, one can be away. `brokers` has them, by number from 1.

    Topics have a replica on each, and a write needs all but one of them (`min.insync.replicas`).
    """

    def __init__(self, folder: Path, count: int = 3, settings: Mapping[str, str] | None = None) -> None:
        replicas = {
            "default.replication.factor": str(count),
            "min.insync.replicas": str(max(1, count - 1)),
            "offsets.topic.replication.factor": str(count),
            "transaction.state.log.replication.factor": str(count),
            "transaction.state.log.min.isr": str(max(1, count - 1)),
            **(settings or {}),
        }
        self.brokers = {node: Kafka(folder / str(node), replicas, node=node) for node in range(1, count + 1)}
        voters = ",".join(one.voters for one in self.brokers.values())
        for one in self.brokers.values():
            one.voters = voters

    def start(self) -> Self:
        """Start all at once: the first one is ready only when most are there."""
        with ThreadPoolExecutor(len(self.brokers)) as threads:
            started = [threads.submit(one.start) for one in self.brokers.values()]
        try:
            for one in started:
                one.result()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """End all in good order; their data stays. At once, since the last ones have nobody to hand over to."""
        with ThreadPoolExecutor(len(self.brokers)) as threads:
            list(threads.map(Kafka.stop, self.brokers.values()))

    def kill(self) -> None:
        """SIGKILL all; their data stays."""
        for one in self.brokers.values():
            one.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def url(self) -> str:
        return "kafka://" + self.client()["bootstrap.servers"]

    def client(self) -> dict[str, Any]:
        """What any client's configuration needs to reach it."""
        return {"bootstrap.servers": ",".join(f"127.0.0.1:{one.port}" for one in self.brokers.values())}

    def admin(self) -> AdminClient:
        return _admin(self.client())

    def create(self, topic: str, partitions: int = 1, **config: str) -> None:
        """Make a topic; `config` has underscores for dots. It has leaders when this returns."""
        _create(self.admin(), topic, partitions, config)

    def leader(self, topic: str, partition: int = 0) -> Kafka:
        """The broker that leads a partition now."""
        found = self.admin().list_topics(topic, PATIENCE).topics[topic].partitions[partition].leader
        return self.brokers[found]

    def coordinator(self, group: str) -> Kafka:
        """The broker that coordinates a group, once there is one. The group need not be there."""
        admin = self.admin()
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                described = _result(admin.describe_consumer_groups([group], request_timeout=PATIENCE))
            except KafkaException as error:  # it moves
                if time.monotonic() > deadline or "COORDINATOR" not in str(error):
                    raise
            else:
                return self.brokers[described.coordinator.id]


def committed(admin: AdminClient, group: str, topic: str, partition: int = 0) -> tuple[int, str] | None:
    """Offset and metadata that a group has committed; None for none."""
    asked = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, partition)])
    (found,) = _result(admin.list_consumer_group_offsets([asked])).topic_partitions
    return None if found.offset < 0 else (found.offset, found.metadata or "")


def _admin(config: Mapping[str, Any]) -> AdminClient:
    return AdminClient({**config, "log_level": 2})  # that a server is away is what tests are about: nothing to print


def _create(admin: AdminClient, topic: str, partitions: int, config: Mapping[str, str]) -> None:
    made = NewTopic(topic, partitions, -1, config={name.replace("_", "."): value for name, value in config.items()})
    _result(admin.create_topics([made], operation_timeout=PATIENCE))
    deadline = time.monotonic() + PATIENCE
    while not (found := _leaders(admin, topic)) or min(found) < 0:
        assert time.monotonic() < deadline, f"{topic} has no leaders: {found}"
        time.sleep(0.01)


def _leaders(admin: AdminClient, topic: str) -> list[int]:
    return [one.leader for one in admin.list_topics(topic, PATIENCE).topics[topic].partitions.values()]


def _result(futures: Mapping[Any, Any]) -> Any:
    (future,) = futures.values()
    return future.result(PATIENCE)


def _identity() -> str:
    """A new identity as Kafka writes them: a UUID in base64 of URLs. It may not begin with a dash."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode().replace("-", "_")
