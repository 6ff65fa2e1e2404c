"""The wheel, as those get it who have no checkout: what is in it, and that it runs alone in an empty environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {re.split(r"[^\w.-]", one)[0] for one in PROJECT["dependencies"]}
PATIENCE = 180.0  # seconds: the most that any single step may take

# Asked in the new environment: what is installed there, and what a plain `pip install sluiceway` may have brought.
INSTALLED = """
import json, re
from importlib.metadata import distributions

names = {}
for one in distributions():
    names[re.sub("[-_.]+", "-", one.name).lower()] = one.requires or []
needed, left = set(), ["sluiceway"]
while left:
    for requirement in names[left.pop()]:
        name, _, condition = requirement.partition(";")
        name = re.sub("[-_.]+", "-", re.split(r"[^\\w.-]", name)[0]).lower()
        if "extra" not in condition and name in names and name not in needed:
            needed.add(name)
            left.append(name)
print(json.dumps({"all": sorted(names), "needed": sorted(needed), "direct": names["sluiceway"]}))
"""

LOADED = """
import sys, sluiceway
print(sluiceway.__file__)
print(*sorted({"apsw", "click", "rich", "pydantic", "uvloop", "duckdb"} & set(sys.modules)))
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("install")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # hatchling comes from the dev group: nothing is fetched
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(ROOT)]
    done = run(command, out)
    assert done.returncode == 0, said(done)
    (built,) = out.iterdir()
    assert built.name == f"sluiceway-{PROJECT['version']}-py3-none-any.whl"
    return built


def test_the_wheel_holds_the_package_with_its_types_and_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        about = f"sluiceway-{PROJECT['version']}.dist-info"
        metadata = file.read(f"{about}/METADATA").decode()
        entry_points = file.read(f"{about}/entry_points.txt").decode()

    sources = {str(one.relative_to(ROOT / "src")) for one in (ROOT / "src").rglob("*.py")}
    assert {one for one in names if not one.startswith(f"{about}/")} == sources | {"sluiceway/py.typed"}
    assert f"{about}/licenses/LICENSE" in names
    assert "sluiceway = sluiceway.cli.main:main" in entry_points

    required = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", metadata, re.MULTILINE)
    assert {name for name, rest in required if "extra ==" not in rest} == DECLARED
    assert "# Sluiceway" in metadata  # the README is what a registry shows


def test_the_wheel_alone_in_an_empty_environment_runs_the_quick_start_and_leaves_nothing_behind(
    wheel: Path, tmp_path: Path
) -> None:
    place = Environment(tmp_path / "venv", tmp_path / "work")
    before = place.packages()
    place.install(wheel)

    found = json.loads(place.python(INSTALLED))
    assert set(found["all"]) - before == {"sluiceway", *found["needed"]}, "more than the dependencies was installed"
    assert {re.split(r"[^\w.-]", one)[0] for one in found["direct"] if "extra" not in one} == DECLARED

    where, loaded = place.python(LOADED).split("\n")[:2]
    assert Path(where).is_relative_to(place.venv)
    assert (Path(where).parent / "py.typed").is_file()
    assert loaded == "", "`import sluiceway` loads what it does not need"

    assert place.shell("sluiceway --version") == f"sluiceway {PROJECT['version']}\n"
    assert place.shell("python -m sluiceway --version") == f"sluiceway {PROJECT['version']}\n"

    program, publish, serve = quick_start()
    (place.folder / "hello.py").write_text(program)
    place.shell(publish)
    assert "Hello, Ada!" in place.shell(f"{serve} --until-empty").splitlines()
    assert {one.name for one in place.folder.iterdir()} >= {"hello.py", "sluiceway.db"}

    place.pip("uninstall", "--yes", "sluiceway")
    assert place.packages() == before | set(found["needed"])
    assert not (place.venv / "bin/sluiceway").exists()
    assert not list(place.venv.rglob("sluiceway*")), "uninstalling left files"


def quick_start() -> tuple[str, str, str]:
    """The README's first program and its two commands, to the letter."""
    text = (ROOT / "README.md").read_text()
    program = re.search(r"^```python\n(# hello\.py\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert program is not None, "the README has no hello.py"
    after = text[program.end() :]
    publish, serve = re.findall(r"^\$ (sluiceway .*)$", after, re.MULTILINE)[:2]
    assert publish.startswith("sluiceway publish ")
    assert serve.startswith("sluiceway run hello:app")
    return program[1], publish, re.sub(r"\s+#.*", "", serve)


class Environment:
    """A virtual environment of its own and a folder to work in, knowing nothing of this checkout."""

    def __init__(self, venv: Path, folder: Path) -> None:
        self.venv = venv
        self.folder = folder
        folder.mkdir()
        done = run([sys.executable, "-m", "venv", str(venv)], folder)
        assert done.returncode == 0, said(done)

    def install(self, wheel: Path) -> None:
        """Skips without a network; on CI that is a failure."""
        try:
            done = self._run("python", "-m", "pip", *PIP, "install", "--retries", "1", str(wheel))
        except subprocess.TimeoutExpired as error:
            no_network(str(error))
        else:
            if "(from versions: none)" in done.stderr or "Connection" in done.stderr:
                no_network(said(done))
            assert done.returncode == 0, said(done)

    def packages(self) -> set[str]:
        listed = json.loads(self.pip("list", "--format", "json"))
        return {re.sub("[-_.]+", "-", one["name"]).lower() for one in listed}

    def pip(self, *arguments: str) -> str:
        return self._good("python", "-m", "pip", *PIP, *arguments)

    def python(self, program: str) -> str:
        return self._good("python", "-c", program)

    def shell(self, command: str) -> str:
        return self._good("bash", "-c", command)

    def _good(self, *command: str) -> str:
        done = self._run(*command)
        assert done.returncode == 0, said(done)
        return done.stdout

    def _run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = self.venv / "bin" / name
        return run([str(program) if program.exists() else name, *arguments], self.folder, self.venv / "bin")


PIP = ("--disable-pip-version-check", "--no-input")


def no_network(why: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"the dependencies cannot be fetched: {why}")
    pytest.skip("the dependencies cannot be fetched: no network?")


def run(command: Sequence[str], folder: Path, *first: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, without what this environment would lend it."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SLUICEWAY", "VIRTUAL"))
    }
    path = os.pathsep.join([*map(str, first), os.environ["PATH"]])
    return subprocess.run(
        command, cwd=folder, env={**kept, "PATH": path}, capture_output=True, text=True, timeout=PATIENCE, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def said(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.args}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
