"""What the demo shows while it runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Board:
    """Progress on the way, and a line for everything that happens."""

    def __init__(self, console: Console, rows: int) -> None:
        self._console = console
        self._rows = rows
        self._started = time.monotonic()
        self._said_at = self._started
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("  {task.description:<10}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._progress = Progress(*columns, console=console, transient=True)
            self._published = self._progress.add_task("published", total=rows, note="")
            self._handled = self._progress.add_task("handled", total=rows, note="")

    def say(self, text: str) -> None:
        """Something happened."""
        self._console.print(
            f"[dim]{time.monotonic() - self._started:5.1f} s[/]  {text}", highlight=False, soft_wrap=True
        )

    def show(self, published: int, handled: int, batches: int, dead: int, rate: float) -> None:
        """Where things stand; on a terminal at once, else a line every two seconds."""
        note = f"{rate:,.0f}/s, {batches:,} batches, {dead:,} dead letters, {max(0, published - handled):,} waiting"
        if self._progress is not None:
            self._progress.update(self._published, completed=published)
            self._progress.update(self._handled, completed=min(handled, self._rows), note=note)
        elif time.monotonic() - self._said_at >= 2.0:
            self._said_at = time.monotonic()
            self.say(f"published {published:,}, handled {handled:,} at {note}")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
