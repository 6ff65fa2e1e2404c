"""What the command says of itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from sluiceway import __version__
from tests.cli.kit import environment

Command = Callable[..., tuple[int, str, str]]

EVERY = (
    [], ["run"], ["publish"], ["inspect"], ["backlog"], ["dlq"],
    ["dlq", "list"], ["dlq", "show"], ["dlq", "replay"], ["dlq", "purge"],
)  # fmt: skip


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_every_help_has_an_example(sluiceway: Command, command: list[str]) -> None:
    code, out, _ = sluiceway(*command, "--help")
    assert code == 0
    assert "Example" in out
    assert f"  sluiceway {' '.join(command)}" in out


def test_the_exit_codes_of_run_are_in_its_help(sluiceway: Command) -> None:
    _, out, _ = sluiceway("run", "--help")
    for code in ("0 ", "1 ", "2 ", "3 ", "130", "141"):
        assert f"\n    {code}" in out


def test_a_misspelt_command_is_answered_with_the_nearest(sluiceway: Command) -> None:
    code, _, errors = sluiceway("publsh")
    assert code == 2
    assert "there is no command 'publsh'; did you mean 'publish'?" in errors


def test_the_version_is_said(sluiceway: Command) -> None:
    assert sluiceway("--version") == (0, f"sluiceway {__version__}\n", "")


def test_help_is_quick_because_it_loads_neither_rich_nor_a_broker() -> None:
    program = "import sys, sluiceway.cli.main; print([m for m in ('rich', 'apsw', 'uvloop') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
