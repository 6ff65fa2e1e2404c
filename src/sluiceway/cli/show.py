"""How dead letters look: a table, a page, or JSON."""

from __future__ import annotations

import base64
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from .._decisions.policy import without_dead_headers
from .dead import Letter
from .words import clean, duration, heading, many

if TYPE_CHECKING:
    from rich.text import Text

COLUMNS = ("id", "age", "from", "attempts", "error", "message")
WIDE = 10_000  # columns where nobody looks: lines are never broken
MOST_HEX = 1024  # bytes of a binary body that are shown


class Detail(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A dead letter as JSON. What its headers do not say is empty; `attempts` is None then. Times are seconds since
    1970. The body is a JSON value, else text, else base64."""

    id: str
    dead_letter_topic: str
    topic: str
    group: str
    consumer: str
    attempts: int | None
    type: str
    error: str
    failed_at: float
    published_at: float
    key: str | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    traceback: str = ""
    body: Any = msgspec.UNSET
    body_text: str | msgspec.UnsetType = msgspec.UNSET
    body_base64: str | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, letter: Letter, topic: str, *, body: bool) -> Detail:
        """With `body` also body, headers and traceback."""
        stored, why = letter.stored, letter.why
        more: dict[str, Any] = {}
        if body:
            more = {
                "headers": _plain(without_dead_headers(stored.headers)),
                "traceback": _utf8(why("traceback")),
                **_body(stored.body),
            }
        return cls(
            id=_utf8(stored.id),
            dead_letter_topic=topic,
            topic=_utf8(why("topic")),
            group=_utf8(why("group")),
            consumer=_utf8(why("consumer")),
            attempts=letter.attempts,
            type=_utf8(why("type")),
            error=_utf8(why("error")),
            failed_at=letter.failed_at,
            published_at=letter.published_at,
            key=None if stored.key is None else _utf8(stored.key),
            **more,
        )


def _body(body: bytes) -> dict[str, Any]:
    try:
        return {"body": msgspec.json.decode(body)}
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return {"body_text": body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode()}


def _utf8(text: str) -> str:
    """`text` as it can be written as JSON: what is no UTF-8 (`surrogateescape`) becomes an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(headers: Mapping[str, str]) -> dict[str, str]:
    return {_utf8(name): _utf8(value) for name, value in headers.items()}


def table_of(letters: Sequence[Letter]) -> str:
    """Dead letters, a line each; on a terminal cut to its width: what is long gives way, never the id."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [
        (
            letter.stored.id,
            duration(letter.age()),
            letter.why("topic") or "?",
            "?" if letter.attempts is None else str(letter.attempts),
            letter.why("type").rpartition(".")[2] or "?",
            _first_line(letter.why("error")),
        )
        for letter in letters
    ]
    cells = [[Text(clean(_utf8(one))) for one in row] for row in rows]
    on_terminal = sys.stdout.isatty()
    if on_terminal:
        _cut(cells, shutil.get_terminal_size().columns)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    for row in cells:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=WIDE, force_terminal=on_terminal, highlight=False).print(table)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _cut(cells: Sequence[Sequence[Text]], width: int) -> None:
    """Shorten the longest texts of a table until its rows fit `width`, as far as may be."""
    widths = [max(len(name), *(row[number].cell_len for row in cells)) for number, name in enumerate(COLUMNS)]
    over = sum(widths) + 2 * (len(widths) - 1) - width
    for name, least in (("message", 24), ("from", 16), ("error", 16)):
        number = COLUMNS.index(name)
        less = max(0, min(over, widths[number] - least))
        over -= less
        for row in cells:
            row[number].truncate(widths[number] - less, overflow="ellipsis")


def letter_text(letter: Letter, topic: str) -> str:
    """A dead letter on a page."""
    stored, why = letter.stored, letter.why
    when = datetime.fromtimestamp(letter.failed_at).astimezone().isoformat(sep=" ", timespec="seconds")
    facts = {
        "in": topic,
        "from": f"{why('topic') or '?'}, group {why('group') or '?'}, consumer {why('consumer') or '?'}",
        "failed": f"{when}, {duration(letter.age())} ago, at attempt {letter.attempts or '?'}",
        "error": f"{why('type') or '?'}: {why('error')}",
        "key": stored.key if stored.key is not None else "none",
    }
    lines = [heading(stored.id), *(f"  {name:<7} {text}" for name, text in facts.items())]
    own = without_dead_headers(stored.headers)
    if own:
        lines += [heading("headers"), *(f"  {name}: {value}" for name, value in own.items())]
    lines += [heading(f"body, {many(len(stored.body), 'byte')}"), *_indented(_body_text(stored.body))]
    if why("traceback"):
        lines += [heading("traceback"), *_indented(why("traceback").rstrip("\n"))]
    return "\n".join(_safe(line) for line in lines) + "\n"


def _safe(line: str) -> str:
    """A line without a stranger's control characters; our own bold stays."""
    bold, reset = "\x1b[1m", "\x1b[0m"
    if line.startswith(bold) and line.endswith(reset):
        return bold + clean(_utf8(line[len(bold) : -len(reset)])) + reset
    return clean(_utf8(line))


def _body_text(body: bytes) -> str:
    try:
        return msgspec.json.format(msgspec.json.encode(msgspec.json.decode(body)), indent=2).decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return body.decode()
    except UnicodeDecodeError:
        return _hex(body)


def _hex(body: bytes) -> str:
    rows = [body[start : start + 16] for start in range(0, min(len(body), MOST_HEX), 16)]
    lines = [
        f"{16 * number:08x}  {row.hex(' '):<47}  {''.join(chr(one) if 32 <= one < 127 else '.' for one in row)}"
        for number, row in enumerate(rows)
    ]
    if len(body) > MOST_HEX:
        lines.append(f"and {len(body) - MOST_HEX:,} bytes more; --json has all of them as base64")
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
