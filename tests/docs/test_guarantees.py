"""The page of guarantees is written from what the acceptance suite showed."""

from __future__ import annotations

from scripts import guarantees


def test_the_page_of_guarantees_is_what_the_suite_showed() -> None:
    text = guarantees.PAGE.read_text(encoding="utf-8")
    stale = "docs/reference/guarantees.md is stale: run `python -m scripts.guarantees`"
    assert text == guarantees.page(guarantees.results()), stale
