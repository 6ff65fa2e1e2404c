"""Where the server is and how it is reached: the URL and its options."""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from msgspec import Struct

from ...errors import ConnectError, OptionError


class Settings(Struct, frozen=True, kw_only=True):
    """How one server is reached. Its repr shows no password."""

    host: str
    port: int = 6379
    user: str | None = None
    password: str | None = None
    db: int = 0
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None

    def __repr__(self) -> str:
        return f"Settings({self.name})"

    @property
    def name(self) -> str:
        """The server as it may be shown."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"

    def tls_context(self) -> ssl.SSLContext | None:
        """None without TLS. Raises ConnectError for a file that cannot be read."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (self.ca_file, self.cert_file, self.key_file)))
            raise ConnectError(f"cannot use the TLS files {files} for {self.name}: {error}") from error
        return context


OPTIONS: dict[str, Callable[[str], Any]] = {
    "lease": float, "max_payload": int, "retention": float, "prefix": str, "replicas": int,
    "ca_file": str, "cert_file": str, "key_file": str, "server_name": str,
}  # fmt: skip


def parse(url: str) -> tuple[Settings, dict[str, Any]]:
    """The settings of a URL, and the transport's options in it. Raises OptionError that says what is wrong with it."""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    what = f"{shown!r} names no Redis server; write redis://[user:password@]host[:port][/db]"
    try:
        port, db = parts.port or 6379, int(parts.path.strip("/") or 0)
    except ValueError as error:
        raise OptionError(f"{what} ({error})") from None
    if parts.scheme not in ("redis", "rediss") or parts.fragment or db < 0:
        raise OptionError(what)
    options: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        options[name] = _option(name, value)
    names = ("ca_file", "cert_file", "key_file", "server_name")
    tls = {name: options.pop(name) for name in names if name in options}
    if tls and parts.scheme == "redis":
        raise OptionError(f"the option {next(iter(tls))!r} of a redis URL needs TLS: write rediss://")
    if "key_file" in tls and "cert_file" not in tls:
        raise OptionError("the option 'key_file' of a redis URL needs 'cert_file' too")
    user, password = (unquote(one) if one else None for one in (parts.username, parts.password))
    host = parts.hostname or "localhost"
    made = Settings(host=host, port=port, user=user, password=password, db=db, tls=parts.scheme == "rediss", **tls)
    return made, options


def _option(name: str, value: str) -> Any:
    convert = OPTIONS.get(name)
    if convert is None:
        near = get_close_matches(name, OPTIONS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(OPTIONS)}"
        raise OptionError(f"a redis URL has no option {name!r}; {hint}")
    try:
        return convert(value)
    except ValueError:
        raise OptionError(f"the option {name!r} of a redis URL must be a number, got {value!r}") from None


def check(options: dict[str, Any]) -> None:
    """Raises OptionError for a value that is not allowed."""
    rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("lease", lambda value: 0.1 <= value < 86_400, "0.1 or more seconds, below a day"),
        ("max_payload", lambda value: 1 <= value <= 256 * 1024 * 1024, "1 to 268435456 bytes"),
        ("retention", lambda value: 0 <= value <= math.inf, "0 or more seconds; inf keeps everything"),
        ("prefix", lambda value: bool(value) and "{" not in value and value.isprintable(), "text without {"),
        ("replicas", lambda value: 0 <= value < 100, "how many replicas, 0 or more"),
    )
    for name, allowed, what in rules:
        if not allowed(options[name]):
            raise OptionError(f"RedisTransport: {name} must be {what}, got {options[name]!r}")
