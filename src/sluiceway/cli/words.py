"""How the command line says things: counts, times, and text from strangers."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Iterable
from typing import TextIO

import click


def many(count: int, one: str, more: str | None = None) -> str:
    """`1 message`, `12,345 messages`."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`, `4 d 1 h`."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def clean(text: str) -> str:
    """`text` without what could play tricks on a terminal: control characters are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody looks at `stream` on a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def heading(text: str) -> str:
    """A word that stands out on a terminal; click takes the style away elsewhere."""
    return click.style(text, bold=True)


def hint(what: str, name: str, known: Iterable[str]) -> None:
    """Say on standard error that `name` looks like a misspelt one of `known`; nothing when it does not."""
    near = nearest(name, known)
    if near is not None:
        click.echo(f"{what}; did you mean {near!r}?", err=True)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` looks like a misspelling of; None when there is none."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)), None)


def ask(question: str, *, yes: bool) -> bool:
    """Whether the user agrees. Raises UsageError when there is nobody to ask."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on; say --yes to go ahead without being asked")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's would wait until it is answered
    try:
        return click.confirm(question, err=True)
    finally:
        signal.signal(signal.SIGINT, before)
