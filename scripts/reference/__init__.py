"""Write the pages anew that are made from the code: options, names, commands, the envelope, brokers.

python -m scripts.reference
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import api, brokers, cli, envelope, options

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"

PAGES: dict[str, Callable[[], str]] = {
    "options.md": options.page,
    "api.md": api.page,
    "cli.md": cli.page,
    "envelope.md": envelope.page,
    "../brokers/index.md": brokers.page,
}
"""What each page is made by."""


def write() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
