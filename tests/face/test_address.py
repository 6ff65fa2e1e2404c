"""What URLs of brokers have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sluiceway import App, ConnectError, OptionError
from sluiceway.address import TLS, url_options, without_secrets, yes_or_no
from sluiceway.middleware.idempotency.redis import RedisStore
from sluiceway.transports.nats import NATSTransport
from sluiceway.transports.rabbitmq import RabbitMQTransport
from sluiceway.transports.redis import RedisTransport

TRANSPORTS = {
    RedisTransport: ("redis", "rediss"),
    NATSTransport: ("nats", "tls"),
    RabbitMQTransport: ("amqp", "amqps"),
}
MAKERS = [
    pytest.param(scheme, make, id=f"{scheme}-{make.__qualname__}")
    for transport, schemes in TRANSPORTS.items()
    for scheme in schemes
    for make in (App, transport, transport.from_url)
    if make is not NATSTransport  # it takes servers, and secrets apart from them
] + [pytest.param("redis", RedisStore, id="RedisStore")]
KNOWN = {"lease": float, "window": int, "declare": yes_or_no, "prefix": str}


def test_options_of_a_url_are_converted() -> None:
    found = url_options("a URL", "lease=0.5&window=7&declare=no&prefix=a%2Fb", KNOWN)
    assert found == {"lease": 0.5, "window": 7, "declare": False, "prefix": "a/b"}


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("leese=1", "a URL has no option 'leese'; did you mean 'lease'?"),
        ("zzz=1", "a URL has no option 'zzz'; there are lease, window, declare, prefix"),
        ("lease=soon", "the option 'lease' of a URL must be a number, got 'soon'"),
        ("window=1.5", "the option 'window' of a URL must be a whole number, got '1.5'"),
        ("declare=maybe", "the option 'declare' of a URL must be yes or no, got 'maybe'"),
    ],
)
def test_a_wrong_option_is_an_error_that_says_what_is_right(query: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        url_options("a URL", query, KNOWN)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host/1", "redis://host/1"),
        ("redis://ada:s3cret@host/1", "redis://ada:***@host/1"),
        ("redis://:s3cret@host", "redis://:***@host"),
        ("nats://s3cret@host", "nats://***@host"),
        ("amqp://ada:s3@cret@host", "amqp://ada:***@host"),
        ("amqp://ada:s3/c?r#et@host", "amqp://ada:***@host"),
        ("ada:s3cret@host:6379", "***@host:6379"),
        ("redis:/ada:s3cret@host", "***@host"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.parametrize("mark", ["/", "?", "#", "/x@y", "?x=1&y="])
@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_a_password_that_is_not_escaped_is_an_error_that_does_not_show_it(
    scheme: str, make: Callable[[str], object], mark: str
) -> None:
    with pytest.raises(OptionError, match=r"has an @ behind its host; write / as %2F") as caught:
        make(f"{scheme}://ada:s3cr{mark}et12@host:1234/x")
    assert "s3cr" not in str(caught.value)
    assert "et12" not in str(caught.value)


@pytest.mark.parametrize("mark", ["[", "]", "\u2100"])
@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_a_password_that_makes_the_host_unreadable_is_not_shown_either(
    scheme: str, make: Callable[[str], object], mark: str
) -> None:
    with pytest.raises(OptionError, match="has a host that cannot be read") as caught:
        make(f"{scheme}://ada:s3cr{mark}et12@host:1234/x")
    assert "s3cr" not in str(caught.value)
    assert "et12" not in str(caught.value)
    assert caught.value.__suppress_context__  # a traceback would show what urllib says


def test_a_url_in_place_of_a_server_is_an_error_that_does_not_show_its_password() -> None:
    for servers in ("nats://ada:s3cret@host", ("host:4222", "ada:s3cret@host")):
        with pytest.raises(OptionError, match=r"write NATSTransport\.from_url") as caught:
            NATSTransport(servers)
        assert "s3cret" not in str(caught.value)


def test_a_path_of_sqlite_may_have_an_at(tmp_path: Path) -> None:
    assert App(f"sqlite:///{tmp_path}/a@b.db").broker.endswith("b.db")


def test_a_key_needs_its_certificate() -> None:
    with pytest.raises(OptionError, match="key_file must be given together with cert_file"):
        TLS(key_file="key.pem").check("a URL")


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    for name in ("missing.pem", "ca.pem"):
        with pytest.raises(ConnectError, match=rf"cannot use the TLS files \(.*{name}\) for redis://h: "):
            TLS(ca_file=str(tmp_path / name)).context("redis://h")
