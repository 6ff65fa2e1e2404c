"""Progress of long work on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from .words import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 0.5  # seconds of work before a bar shows


class Bar:
    """A bar on a terminal, once the work has taken a while. `size` is all there is to do; None: it is not known."""

    def __init__(self, size: int | None, unit: str = "messages") -> None:
        self._size = size
        self._unit = unit
        self._began = time.monotonic()
        self._wanted = is_terminal(sys.stderr)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._done = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, size: int, count: int) -> None:
        """`size` more is done, `count` in all."""
        self._done += size
        if self._progress is None and self._wanted and time.monotonic() - self._began > PATIENCE:
            self._start()
        if self._progress is not None and self._task is not None:
            rate = count / (time.monotonic() - self._began)
            self._progress.update(self._task, completed=self._done, note=f"{count:,} {self._unit}, {rate:,.0f}/s")

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=self._size, note="")
        self._progress.start()
