"""Where the brokers are and how to talk to them: options, URLs, what the client is told."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from msgspec import Struct
from msgspec.structs import fields

from ...address import (
    Convert,
    check_servers,
    check_settings,
    servers_of,
    split_url,
    url_options,
    without_secrets,
    yes_or_no,
)
from ...errors import OptionError

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
RESERVE = 16 * 1024  # bytes of the largest record that are kept for headers

_PREFIX = re.compile(r"[A-Za-z0-9._\-]{0,100}")


class Settings(Struct, frozen=True, kw_only=True):
    """The options of KafkaTransport; its docstring says what they mean. Picklable. Its repr shows no secret."""

    servers: tuple[str, ...] = ("127.0.0.1:9092",)
    tls: bool = False
    user: str | None = None
    password: str | None = None
    mechanism: str = "PLAIN"
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    instance: str | None = None
    session_timeout: float = 45.0
    prefix: str = ""
    create: bool = True
    partitions: int = 1
    replicas: int = -1
    max_record: int = 1_000_000

    def __post_init__(self) -> None:
        check_servers("KafkaTransport", self.servers)
        checks = (
            ("servers", bool(self.servers) and all(self.servers), "one host or more"),
            ("user", self.user is None or self.password is not None, "given together with password"),
            ("mechanism", self.mechanism in MECHANISMS, f"one of {', '.join(MECHANISMS)}"),
            ("key_file", self.key_file is None or self.cert_file is not None, "given together with cert_file"),
            ("session_timeout", 0.5 <= self.session_timeout <= 1800, "0.5 to 1800 seconds"),
            ("prefix", _PREFIX.fullmatch(self.prefix), "at most 100 letters, digits, '.', '_' and '-'"),
            ("partitions", 1 <= self.partitions <= 10_000, "1 to 10000"),
            ("replicas", self.replicas == -1 or self.replicas >= 1, "1 or more, or -1: what the server says"),
            ("max_record", 2 * RESERVE <= self.max_record <= 1_000_000_000, f"{2 * RESERVE} bytes to 1 GB"),
        )
        check_settings("KafkaTransport", self, checks)

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in ("servers", "tls", "user", "prefix"))
        return f"Settings({', '.join(shown)}, …)"

    @property
    def max_payload(self) -> int:
        return self.max_record - RESERVE

    def where(self) -> str:
        return ", ".join(self.servers)

    def client(self) -> dict[str, Any]:
        """What every client is told."""
        encrypted = self.tls or bool(self.ca_file or self.cert_file)
        found: dict[str, Any] = {
            "bootstrap.servers": ",".join(self.servers),
            "security.protocol": ("SASL_" if self.user is not None else "") + ("SSL" if encrypted else "PLAINTEXT"),
            "socket.timeout.ms": 10_000,
            "socket.keepalive.enable": True,
            "socket.nagle.disable": True,
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 2_000,
            "log_level": 2,
        }
        if self.user is not None:
            found |= {"sasl.mechanism": self.mechanism, "sasl.username": self.user, "sasl.password": self.password}
        files = {"ssl.ca.location": self.ca_file, "ssl.certificate.location": self.cert_file,
                 "ssl.key.location": self.key_file}  # fmt: skip
        return found | {name: value for name, value in files.items() if value is not None}

    def producer(self) -> dict[str, Any]:
        """What a producer is told: the client's own retries double nothing, and its memory is bounded."""
        return {
            **self.client(),
            "acks": "all",
            "enable.idempotence": True,
            "partitioner": "murmur2_random",  # as Java's clients do it
            "message.max.bytes": self.max_record,
            "linger.ms": 1,
            "delivery.timeout.ms": 30_000,
            "queue.buffering.max.messages": 100_000,
            "queue.buffering.max.kbytes": max(65_536, 4 * self.max_record // 1024),
        }

    def consumer(self, group: str) -> dict[str, Any]:
        """What a member of a group is told. What it fetches ahead is bounded too."""
        milliseconds = int(self.session_timeout * 1000)
        found = {
            **self.client(),
            "group.id": self.prefix + group,
            "session.timeout.ms": milliseconds,
            "heartbeat.interval.ms": max(100, min(3000, milliseconds // 5)),
            "partition.assignment.strategy": "cooperative-sticky",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "queued.min.messages": 2_000,
            "queued.max.messages.kbytes": 8 * 1024,
            "fetch.queue.backoff.ms": 10,
            "fetch.wait.max.ms": 100,
        }
        return found if self.instance is None else {**found, "group.instance.id": self.instance}


_CONVERT: dict[str, Convert] = {
    "session_timeout": float, "create": yes_or_no, "partitions": int, "replicas": int, "max_record": int
}  # fmt: skip
_URL_OPTIONS: dict[str, Convert] = {
    field.name: _CONVERT.get(field.name, str)
    for field in fields(Settings)
    if field.name not in ("servers", "tls", "user", "password")
}


def from_url(url: str) -> dict[str, Any]:
    """The options that a URL says. Raises OptionError, without the URL's secrets, for what is wrong with it."""
    parts = split_url(url)
    secret, _, hosts = parts.netloc.rpartition("@")
    if parts.scheme not in ("kafka", "kafkas") or not hosts or parts.path.strip("/") or parts.fragment:
        raise OptionError(
            f"a Kafka URL is kafka://host:9092,other:9092?option=value (or kafkas://…); got {without_secrets(url)!r}"
        )
    options: dict[str, Any] = {"tls": parts.scheme == "kafkas", "servers": servers_of("Kafka", hosts, 9092)}
    if secret:
        user, _, password = secret.partition(":")
        options.update(user=unquote(user), password=unquote(password))
    return options | url_options("a kafka URL", parts.query, _URL_OPTIONS)
