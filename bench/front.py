"""What the commands that measure have in common: how they are stopped, and what they show meanwhile."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .child import pin

WIDTH = 130  # of a table in a file


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command on the first core, since what it measures has the last one. SIGTERM stops it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    pin(0)
    sys.exit(main())


def show(table: RenderableType) -> None:
    """Print a table; where nobody looks its lines are not broken."""
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table)


def progress() -> Progress:
    """A bar on standard error, with room for what is measured now."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
