"""Logging, as only the command line sets it up: a library leaves it to the program."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from .lifeline import Lifeline

if TYPE_CHECKING:
    from rich.console import Console

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str, *, console: Console | None = None, worker: Lifeline | None = None) -> None:
    """Log to standard error: through `console` on a terminal, else as plain lines with times.

    When the app's module has set logging up itself, that stays as it is, but for the level.
    """
    root = logging.getLogger()
    root.setLevel(level.upper())
    if level != "debug":
        logging.getLogger("pika").setLevel(logging.WARNING)  # it tells of each step of each connection
    if root.handlers:
        return
    root.addHandler(_plain(worker) if console is None else _rich(console))


def _plain(worker: Lifeline | None) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    who = f" worker {worker.number}:" if worker is not None and not worker.echoed else ""
    times = "%X" if worker is not None and worker.echoed else None
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{who} %(name)s: %(message)s", times))
    return handler


def _rich(console: Console) -> logging.Handler:
    from rich.logging import RichHandler

    return RichHandler(console=console, show_path=False, markup=False, log_time_format="%X")
