"""The reference of the events is written from their classes, and says of each field what it is."""

from __future__ import annotations

import pytest

from scripts import events
from sluiceway.telemetry import Event

KINDS = Event.__subclasses__()


def test_the_page_of_events_is_what_the_classes_say() -> None:
    text = events.PAGE.read_text(encoding="utf-8")
    assert text == events.page(text), "docs/reference/events.md is stale: run `python -m scripts.events`"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_event_is_on_the_page_with_its_fields(kind: type[Event]) -> None:
    (row,) = [line for line in events.tables().splitlines() if line.startswith(f"| `{kind.__name__}` |")]
    assert all(f"`{name}: " in row for name in kind.__annotations__)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_spans_have_one_shape(kind: type[Event]) -> None:
    other = {one.__name__: one for one in KINDS}
    name = kind.__name__
    if name.endswith("Finished"):
        started = other[name.replace("Finished", "Started")]
        assert {**started.__annotations__, "seconds": "float", "error": "BaseException | None"}.items() <= (
            kind.__annotations__.items()
        )
    elif name.endswith("Started") and kind.__name__ != "PipelineStarted":
        assert name.replace("Started", "Finished") in other
