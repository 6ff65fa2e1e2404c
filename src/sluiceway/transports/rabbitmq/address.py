"""The URL and the options of the transport."""

from __future__ import annotations

import math
from typing import Any, Literal
from urllib.parse import unquote

import pika
from msgspec import Struct

from ...address import TLS, TLS_OPTIONS, Convert, split_url, url_options, yes_or_no
from ...errors import OptionError


class Options(Struct, frozen=True, kw_only=True):
    """What may stand in the URL behind `?`, by name; `RabbitMQTransport` says what each means."""

    exchange: str = "sluiceway"
    queue_type: Literal["quorum", "classic"] = "quorum"
    declare: bool = True
    heartbeat: int = 30
    timeout: float = 10.0
    max_payload: int = 16 * 1024 * 1024
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        for name, allowed, what in (
            ("exchange", bool(self.exchange) and "|" not in self.exchange and len(self.exchange) < 100, "a short name"),
            ("queue_type", self.queue_type in ("quorum", "classic"), "'quorum' or 'classic'"),
            ("heartbeat", 0 <= self.heartbeat <= 65_535, "0 to 65535 seconds"),
            ("timeout", 0 < self.timeout < math.inf, "more than 0 seconds"),
            ("max_payload", 1 <= self.max_payload <= 536_870_912, "1 to 536870912 bytes"),
            ("key_file", self.key_file is None or self.cert_file is not None, "given together with cert_file"),
        ):
            if not allowed:
                raise OptionError(f"RabbitMQTransport: {name} must be {what}, got {getattr(self, name)!r}")


_URL_OPTIONS: dict[str, Convert] = {
    "exchange": str, "queue_type": str, "declare": yes_or_no, "heartbeat": int, "timeout": float, "max_payload": int,
    **TLS_OPTIONS,
}  # fmt: skip


def options_of(url: str) -> dict[str, Any]:
    """The options in a URL. Raises OptionError that says what is wrong with one."""
    return url_options("an amqp URL", split_url(url).query, _URL_OPTIONS)


class Address(Struct, frozen=True):
    """Where the broker is. Nothing that is shown of it has the password."""

    place: str
    parameters: pika.ConnectionParameters

    def __repr__(self) -> str:
        return f"Address({self.place!r})"


def address_of(url: str, options: Options) -> Address:
    """Read `amqp://user:password@host:port/vhost`. Raises OptionError, and ConnectError for unreadable TLS files."""
    parts = split_url(url)
    try:
        port, tls = parts.port, parts.scheme == "amqps"
    except ValueError:
        port, tls = -1, False
    if (
        parts.scheme not in ("amqp", "amqps")
        or not parts.hostname
        or port == -1
        or "/" in parts.path[1:]
        or parts.fragment
    ):
        raise OptionError(
            "an amqp URL is amqp://user:password@host:port/vhost (a / in the vhost is %2F); amqps:// has TLS"
        )
    if not tls and (options.ca_file or options.cert_file or options.server_name):
        raise OptionError(
            "ca_file, cert_file, key_file and server_name are for TLS: write amqps:// in front of the URL"
        )
    port = port or (5671 if tls else 5672)
    vhost = unquote(parts.path[1:]) or "/"
    parameters = pika.ConnectionParameters(
        host=parts.hostname,
        port=port,
        virtual_host=vhost,
        credentials=pika.PlainCredentials(unquote(parts.username or "guest"), unquote(parts.password or "guest")),
        heartbeat=options.heartbeat,
        socket_timeout=options.timeout,
        stack_timeout=options.timeout,
        ssl_options=_tls(parts.hostname, options) if tls else None,
        client_properties={"connection_name": "sluiceway"},
    )
    return Address(f"{parts.hostname}:{port}, virtual host {vhost!r}", parameters)


def _tls(host: str, options: Options) -> pika.SSLOptions:
    files = TLS(options.ca_file, options.cert_file, options.key_file, options.server_name)
    return pika.SSLOptions(files.context(host), options.server_name or host)
