"""What URLs of brokers have in common: options behind `?`, TLS files, and that nothing which is shown has a secret."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from msgspec import Struct

from .errors import ConnectError, OptionError

Convert = Callable[[str], Any]


def yes_or_no(text: str) -> bool:
    """For options that are on or off."""
    if text not in ("yes", "no"):
        raise ValueError(text)
    return text == "yes"


_WHAT: dict[Convert, str] = {int: "a whole number", float: "a number", yes_or_no: "yes or no"}


def url_options(kind: str, query: str, known: Mapping[str, Convert]) -> dict[str, Any]:
    """The options in a URL's query, converted. `kind` names it in errors, such as "a redis URL".

    Raises OptionError for one that is not known, with the nearest name, and for a value that cannot be converted.
    """
    found: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        convert = known.get(name)
        if convert is None:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise OptionError(f"{kind} has no option {name!r}; {hint}")
        try:
            found[name] = convert(value)
        except ValueError:
            what = _WHAT.get(convert, "something else")
            raise OptionError(f"the option {name!r} of {kind} must be {what}, got {value!r}") from None
    return found


def without_secrets(url: str) -> str:
    """The URL as it may be shown: the user stays, a password or token does not."""
    head, at, tail = url.rpartition("@")
    if not at:
        return url
    scheme, found, user = head.partition("://")
    if not found:  # no URL at all: what stands where is not known
        return f"***@{tail}"
    name, colon, _ = user.partition(":")
    return f"{scheme}://{name if colon else '***'}{':***' if colon else ''}@{tail}"


def split_url(url: str) -> SplitResult:
    """The parts of a server's URL. Raises OptionError for what is none, and for an @ behind the host.

    A password with a plain / ? or # in it ends the host there, and its rest looks like a port, a path or an option:
    whoever went on would show it.
    """
    rest = url.partition("://")[2]
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in rest[len(host) :]:
        raise OptionError(
            f"the URL {without_secrets(url)!r} has an @ behind its host; "
            "write / as %2F, ? as %3F, # as %23 and @ as %40 in its user, its password and its options"
        )
    try:
        return urlsplit(url)
    except ValueError:  # its text may have the password
        raise OptionError(
            f"the URL {without_secrets(url)!r} has a host that cannot be read; "
            "write [ as %5B and ] as %5D in its user and its password, and an IPv6 address as [::1]"
        ) from None


def servers_of(kind: str, hosts: str, port: int) -> tuple[str, ...]:
    """The servers that a URL names with commas between, each as host:port; `port` is for those that name none. Raises
    OptionError for a port that is no number."""
    return tuple(_server(kind, host, port) for host in hosts.split(","))


def _server(kind: str, host: str, default: int) -> str:
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        return f"{host}:{default}"
    if not name or not port.isascii() or not port.isdigit():
        raise OptionError(f"a {kind} URL names hosts as host or host:port; got {host!r}")
    return host


def check_settings(transport: str, settings: Any, checks: Iterable[tuple[str, object, str]]) -> None:
    """Raise OptionError for the first option that is not as it must be. A check is the option's name, whether it is
    right, and what it must be."""
    for name, right, what in checks:
        if not right:
            raise OptionError(f"{transport}: {name} must be {what}; got {getattr(settings, name)!r}")


def check_servers(transport: str, servers: Iterable[str]) -> None:
    """Raise OptionError, without showing it, where a URL stands in the place of host:port: it may have a password."""
    if any("@" in server or "://" in server for server in servers):
        raise OptionError(f"{transport}: servers are host:port; for a URL write {transport}.from_url(...)")


class TLS(Struct, frozen=True):
    """The files of an encrypted connection.

    `ca_file`: who must have signed the server's certificate; None: who the system trusts. `cert_file` and `key_file`:
    our own certificate, where the server wants one. `server_name`: the name in the server's certificate, where that is
    not its host.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None

    def check(self, who: str) -> None:
        """Raise OptionError for a key without its certificate."""
        if self.key_file is not None and self.cert_file is None:
            raise OptionError(f"{who}: key_file must be given together with cert_file; got {self.key_file!r} alone")

    def __bool__(self) -> bool:
        return any((self.ca_file, self.cert_file, self.key_file, self.server_name))

    def context(self, place: str) -> ssl.SSLContext:
        """What a connection to `place` needs. Raises ConnectError for a file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(name for name in (self.ca_file, self.cert_file, self.key_file) if name)
            raise ConnectError(f"cannot use the TLS files ({files}) for {place}: {error}") from error
        return context


TLS_OPTIONS: dict[str, Convert] = dict.fromkeys(TLS.__struct_fields__, str)
"""They may stand in the URL."""
