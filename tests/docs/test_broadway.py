"""The page for those who know Broadway names tests: all of them are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ACCEPTANCE = TESTS.parent / "src" / "sluiceway" / "testing"
PAGE = TESTS.parent / "docs" / "explanation" / "broadway.md"


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(\w+/\w+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 100
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^(?:(?:async )?def {name}\(|{name} = )", text_of(file), re.MULTILINE)
    ]
    assert missing == []


def text_of(file: str) -> str:
    return ((ACCEPTANCE if file.startswith("acceptance/") else TESTS) / file).read_text(encoding="utf-8")


def test_every_row_names_a_test_but_those_of_the_words() -> None:
    tables = PAGE.read_text(encoding="utf-8").split("\n## ")
    rows = [
        line for part in tables if not part.startswith("The words") for line in part.splitlines() if line[:2] == "| "
    ]
    assert [
        row
        for row in rows
        if "::test_" not in row and "::Test" not in row and "---" not in row and "| test |" not in row
    ] == []
