"""The reference pages are written from the code, and leave nothing out."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import sluiceway
from scripts import reference
from scripts.reference import api, cli, envelope
from sluiceway import Retry
from sluiceway import envelope as wire
from sluiceway._decisions.policy import DEAD_PREFIX, FailureRules, dead_letter, reason_of
from sluiceway.message import Message
from sluiceway.options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]


def page(name: str) -> str:
    return (reference.FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    stale = f"docs/reference/{name} is stale: run `python -m scripts.reference`"
    assert page(name) == reference.PAGES[name](), stale


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_says_nothing_of_where_in_memory_things_are(name: str) -> None:
    assert not re.search(r"\b0x[0-9a-f]{6,}|<lambda>|<locals>", page(name))


def test_every_option_has_a_row_with_what_is_allowed() -> None:
    text = page("options.md")
    for name, option in OPTIONS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |") and option.meaning in line]
        assert (option.check(object()) or "anything") in row


def test_the_guarantees_that_options_bear_on_are_those_of_the_design() -> None:
    design = (ROOT / "docs" / "explanation" / "design.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| (G\d+) \|", design, re.MULTILINE))
    named = {one for option in OPTIONS.values() for one in option.guarantees}
    assert named <= known
    assert len(named) > 5


def test_every_public_name_is_on_the_page_of_names() -> None:
    headings = set(re.findall(r"^### (\w+)$", page("api.md"), re.MULTILINE))
    assert set(sluiceway.__all__) <= headings
    for name in api.MODULES:
        module = importlib.import_module(name)
        assert set(api.names_of(module)) <= headings
        assert api.names_of(module), f"{name} has no names of its own"


def test_every_command_is_on_the_page_of_commands_with_an_example() -> None:
    parts = dict(cli.helps())
    assert {"sluiceway", "sluiceway run", "sluiceway backlog", "sluiceway dlq replay"} <= set(parts)
    assert all(f"  {path} " in text for path, text in parts.items())


def test_every_header_is_on_the_page_of_the_envelope() -> None:
    text = page("envelope.md")
    assert all(f"| `{header}` |" in text for header in wire.OWN)
    message: Message[object] = Message("t", b"1", "id-1")
    made = dead_letter(message, reason_of(ValueError()), FailureRules(consumer="c", group="g", retry=Retry()), now=1.0)
    assert {f"{DEAD_PREFIX}{name}" for name in envelope.DEAD} == set(made.headers)


PAGES = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "carrying-on.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_readme_leads_to_every_page(path: Path) -> None:
    assert f"({path.relative_to(ROOT)})" in (ROOT / "README.md").read_text(encoding="utf-8")


LINK = re.compile(r"\[[^\]]+\]\(([^)#:]+)(#[\w-]+)?\)")


@pytest.mark.parametrize("path", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], ids=lambda path: path.name)
def test_a_link_leads_to_a_file_that_is_there(path: Path) -> None:
    for target, _ in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"
