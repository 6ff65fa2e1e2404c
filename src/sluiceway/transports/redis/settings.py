"""Where the server is and how it is reached: the URL and its options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from msgspec import Struct

from ...address import TLS, TLS_OPTIONS, Convert, split_url, url_options
from ...errors import OptionError


class Settings(Struct, frozen=True, kw_only=True):
    """How one server is reached. Its repr shows no password."""

    host: str
    port: int = 6379
    user: str | None = None
    password: str | None = None
    db: int = 0
    tls: TLS | None = None

    def __repr__(self) -> str:
        return f"Settings({self.name})"

    @property
    def name(self) -> str:
        """The server as it may be shown."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'redis' if self.tls is None else 'rediss'}://{host}:{self.port}/{self.db}"


OPTIONS: dict[str, Convert] = {"lease": float, "max_payload": int, "retention": float, "prefix": str, **TLS_OPTIONS}


def parse(url: str) -> tuple[Settings, dict[str, Any]]:
    """The settings of a URL, and the transport's options in it. Raises OptionError that says what is wrong with it."""
    parts = split_url(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    what = f"{shown!r} names no Redis server; write redis://[user:password@]host[:port][/db]"
    try:
        port, db = parts.port or 6379, int(parts.path.strip("/") or 0)
    except ValueError as error:
        raise OptionError(f"{what} ({error})") from None
    if parts.scheme not in ("redis", "rediss") or parts.fragment or db < 0:
        raise OptionError(what)
    options = url_options("a redis URL", parts.query, OPTIONS)
    tls = TLS(**{name: options.pop(name) for name in TLS_OPTIONS if name in options})
    if tls and parts.scheme == "redis":
        raise OptionError("ca_file, cert_file, key_file and server_name of a redis URL need TLS: write rediss://")
    tls.check("a redis URL")
    user, password = (unquote(one) if one else None for one in (parts.username, parts.password))
    host = parts.hostname or "localhost"
    encrypted = tls if parts.scheme == "rediss" else None
    return Settings(host=host, port=port, user=user, password=password, db=db, tls=encrypted), options


def check(options: dict[str, Any]) -> None:
    """Raises OptionError for a value that is not allowed."""
    rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("lease", lambda value: 0.1 <= value < 86_400, "0.1 or more seconds, below a day"),
        ("max_payload", lambda value: 1 <= value <= 256 * 1024 * 1024, "1 to 268435456 bytes"),
        ("retention", lambda value: 0 <= value <= math.inf, "0 or more seconds; inf keeps everything"),
        ("prefix", lambda value: bool(value) and "{" not in value and value.isprintable(), "text without {"),
    )
    for name, allowed, what in rules:
        if not allowed(options[name]):
            raise OptionError(f"RedisTransport: {name} must be {what}, got {options[name]!r}")
