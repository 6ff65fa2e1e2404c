"""compose.yaml starts the brokers that the docs speak of: on loopback, with their data kept, and pinned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from sluiceway.app import open_transport

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())["services"]
SCHEMES = {"redis": "redis", "nats": "nats", "rabbitmq": "amqp"}
URL = re.compile(r"\b(?:redis|nats|amqp)://[^\s`'\"<>)[]+")  # not the templates, such as redis://[user@]host
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def published(name: str) -> tuple[str, int]:
    """Scheme and port of a service."""
    (port,) = SERVICES[name]["ports"]
    return SCHEMES[name], int(port.split(":")[1])


def test_there_is_a_service_for_each_broker_that_has_a_server() -> None:
    assert set(SERVICES) == set(SCHEMES)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_service_is_pinned_to_its_major_version_kept_checked_and_on_loopback(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(rf"{name}:\d+-alpine", service["image"])
    (port,) = service["ports"]
    assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)
    (volume,) = service["volumes"]
    assert volume.partition(":")[0] in yaml.safe_load(FILE.read_text())["volumes"]
    assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_the_url_in_the_file_is_that_of_its_service_and_names_a_transport(name: str) -> None:
    scheme, port = published(name)
    (url,) = [one for one in URL.findall(FILE.read_text()) if one.startswith(scheme)]
    assert urlsplit(url).netloc.rpartition("@")[2] == f"127.0.0.1:{port}"
    assert open_transport(url)


def test_urls_on_this_machine_in_readme_and_docs_are_those_of_the_services() -> None:
    known = dict(map(published, SERVICES))
    for page in PAGES:
        for url in URL.findall(page.read_text()):
            parts = urlsplit(url)
            if parts.hostname in ("localhost", "127.0.0.1"):
                assert parts.port in (None, known[parts.scheme]), f"{page.relative_to(ROOT)}: {url}"
