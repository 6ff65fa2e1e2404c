"""Write the tables of docs/reference/events.md anew, from the classes in sluiceway.telemetry.

python -m scripts.events
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from sluiceway import telemetry
from sluiceway.telemetry import Event

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "events.md"
BEGIN, END = "<!-- begin: written by scripts/events.py -->", "<!-- end -->"
HEADING = re.compile(r"# -- (.+?) -+")
CLASS = re.compile(r"class (\w+)\(Event\b")


def tables() -> str:
    """A table for each part of the telemetry module, with the events in their order there."""
    lines: list[str] = []
    for line in inspect.getsource(telemetry).splitlines():
        if heading := HEADING.fullmatch(line):
            title = heading[1][0].upper() + heading[1][1:]
            lines += [
                "",
                f"## {title}",
                "",
                "| event | when, and what the fields say | fields |",
                "| --- | --- | --- |",
            ]
        elif found := CLASS.match(line):
            lines.append(_row(getattr(telemetry, found[1])))
    return "\n".join(lines).strip()


def _row(kind: type[Event]) -> str:
    text = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
    fields = "<br>".join(f"`{name}: {_escaped(hint)}`" for name, hint in inspect.get_annotations(kind).items())
    return f"| `{kind.__name__}` | {_escaped(text)} | {fields} |"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def page(text: str) -> str:
    """The page with its tables written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
