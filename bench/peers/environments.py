"""A virtual environment for each library, with what `table.PINS` names; made once, and again when the pins change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ..child import ROOT, MeasureFailed
from .table import PINS

FOLDER = ROOT / "bench" / "results" / "peers"


def python_of(library: str, folder: Path = FOLDER) -> str:
    """The Python of a library's environment, which is made when it is not there. Raises MeasureFailed."""
    if library not in PINS:
        return sys.executable
    place = folder / library
    python, mark = place / "bin" / "python", place / "pins"
    wanted = "\n".join([sys.version, *PINS[library]])
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(place, ignore_errors=True)
        try:
            _run(sys.executable, "-m", "venv", str(place))
            _run(str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *PINS[library])
        except subprocess.SubprocessError as error:
            said = getattr(error, "stderr", None) or str(error)
            raise MeasureFailed(f"cannot make {library}'s environment in {place}: {said.strip()}") from error
        mark.write_text(wanted, encoding="utf-8")
    return str(python)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
