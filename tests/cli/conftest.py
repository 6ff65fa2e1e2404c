"""A folder of its own for each test of the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sluiceway.cli.main import call
from tests.cli.kit import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """Commands as processes."""
    shell = Shell(tmp_path)
    yield shell
    shell.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process, in a folder of its own, with modules that the test imports forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("SLUICEWAY_APP", raising=False)
    monkeypatch.delenv("SLUICEWAY_URL", raising=False)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


Said = tuple[int, str, str]


@pytest.fixture
def sluiceway(here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """A command in this process: its exit code, output and errors."""

    def command(*arguments: str) -> Said:
        code = call(arguments)
        out, errors = capfd.readouterr()
        return code, out, errors

    return command
