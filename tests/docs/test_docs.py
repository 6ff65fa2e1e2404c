"""Every code block of the README and the docs runs, in the order of its page, and prints what the page says.

A `python` block that opens with a comment naming a file is written to that file; any other runs as a script. In a
`console` block each line with `$ ` runs in the page's folder; the lines below it must be found in its output, in any
order, since consumers run at once. `...` stands for anything.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/]+\.py)\n")
ELSEWHERE = ("make ", "pip install", "git clone", "kill ")  # what CI, the wheel test and the demo's test run
NOT_RUN = {"text", "toml", "yaml", "json", "sql"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page: Path, tmp_path: Path) -> None:
    for kind, text in blocks(page):
        if kind == "python":
            run_python(text, tmp_path)
        elif kind == "console":
            run_console(text, tmp_path)
        else:
            assert kind in NOT_RUN, f"{page.name}: a block of kind {kind!r} runs nowhere"


def run_python(text: str, folder: Path) -> None:
    named = FILE.match(text)
    if named:
        (folder / named[1]).write_text(text)
        text = f"import runpy; runpy.run_path({named[1]!r}, run_name='page')"
    run([sys.executable, "-c", text], folder)


def run_console(text: str, folder: Path) -> None:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        command = re.sub(r"\s+#.*", "", command)
        if command.startswith(ELSEWHERE):
            continue
        if command.startswith("sluiceway run") and "--until-empty" not in command:
            command += " --until-empty"  # on a page it runs until Ctrl-C
        output = run(["bash", "-c", command], folder)
        for line in filter(None, expected.splitlines()):
            wanted = "*" + line.strip().replace("[", "[[]").replace("...", "*") + "*"
            assert any(fnmatch.fnmatchcase(got, wanted) for got in output.splitlines()), (
                f"$ {command}\ndid not print: {line}\nbut:\n{output}"
            )


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "COLUMNS": "200", "PYTHONDEVMODE": "", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command[-1]}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
