"""Where the servers are and how to talk to them: options, URLs, TLS."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import unquote

from msgspec import Struct
from msgspec.structs import fields

from ...address import TLS, Convert, check_servers, check_settings, servers_of, split_url, url_options, without_secrets
from ...errors import OptionError

_SECRET = ("password", "token")


class Settings(Struct, frozen=True, kw_only=True):
    """The options of NATSTransport; its docstring says what they mean. Picklable. Its repr shows no secret."""

    servers: tuple[str, ...] = ("127.0.0.1:4222",)
    tls: bool = False
    user: str | None = None
    password: str | None = None
    token: str | None = None
    credentials: str | None = None
    nkey: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    stream: str = "sluiceway"
    replicas: int = 1
    max_age: float = 0.0
    lease: float = 30.0
    max_delayed: int = 100_000

    def __post_init__(self) -> None:
        check_servers("NATSTransport", self.servers)
        checks = (
            ("servers", bool(self.servers) and all(self.servers), "one host or more"),
            ("stream", self.stream and not set(self.stream) & set(">*. /\\\t\r\n"), "a name without any of '>*. /\\'"),
            ("replicas", 1 <= self.replicas <= 5, "1 to 5"),
            ("max_age", 0 <= self.max_age < math.inf, "0 (for ever) or more seconds"),
            ("lease", 0.1 <= self.lease <= 86_400, "0.1 to 86400 seconds"),
            ("max_delayed", self.max_delayed >= 1, "1 or more messages"),
            ("key_file", self.key_file is None or self.cert_file is not None, "given together with cert_file"),
        )
        check_settings("NATSTransport", self, checks)

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in ("servers", "tls", "user", "stream"))
        return f"Settings({', '.join(shown)}, …)"

    @property
    def encrypted(self) -> bool:
        """Whether a server without TLS is refused."""
        return self.tls or bool(self.ca_file or self.cert_file)

    def where(self) -> str:
        return ", ".join(self.servers)

    def connect_options(self) -> dict[str, Any]:
        """What nats-py's `connect` takes. Raises ConnectError for files that cannot be read."""
        options: dict[str, Any] = {
            "servers": [f"{'tls' if self.encrypted else 'nats'}://{server}" for server in self.servers],
            "user": self.user,
            "password": self.password,
            "token": self.token,
            "user_credentials": self.credentials,
            "nkeys_seed": self.nkey,
            "tls_hostname": self.server_name,
            "allow_reconnect": False,
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": 0,
            "connect_timeout": 5,
            "ping_interval": 5,  # a connection that is dead without a word is noticed in 15 s
        }
        if self.encrypted:
            files = TLS(self.ca_file, self.cert_file, self.key_file, self.server_name)
            options["tls"] = files.context(self.where())
        return options


_NUMBERS: dict[str, Convert] = {"replicas": int, "max_age": float, "lease": float, "max_delayed": int}
_URL_OPTIONS: dict[str, Convert] = {
    field.name: _NUMBERS.get(field.name, str)
    for field in fields(Settings)
    if field.name not in ("servers", "tls", "user", *_SECRET)
}


def from_url(url: str) -> dict[str, Any]:
    """The options that a URL says. Raises OptionError, without the URL's secrets, for what is wrong with it."""
    parts = split_url(url)
    secret, _, hosts = parts.netloc.rpartition("@")
    if parts.scheme not in ("nats", "tls") or not hosts or parts.path.strip("/") or parts.fragment:
        raise OptionError(
            f"a NATS URL is nats://host:4222,other:4222?option=value (or tls://…); got {without_secrets(url)!r}"
        )
    options: dict[str, Any] = {"tls": parts.scheme == "tls", "servers": servers_of("NATS", hosts, 4222)}
    if secret:
        user, colon, password = secret.partition(":")
        if colon:
            options.update(user=unquote(user), password=unquote(password))
        else:
            options["token"] = unquote(user)
    return options | url_options("a nats URL", parts.query, _URL_OPTIONS)
