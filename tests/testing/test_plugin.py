"""The pytest plugin, in projects of their own: with pytest-asyncio in both modes, without it, and switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOUR = """
import asyncio, time, pytest

{mark}
async def test_an_hour():
    began = time.monotonic()
    await asyncio.sleep(3600)
    assert time.monotonic() - began < 60
    assert 3600 <= asyncio.get_running_loop().time() < 3700
"""


def pytest_in(folder: Path, text: str, *options: str, ini: str = "") -> tuple[str, int]:
    """What a pytest of its own says of a test module, and its exit code."""
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    return done.stdout + done.stderr, done.returncode


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_under_pytest_asyncio_the_mark_runs_a_test_in_virtual_time(tmp_path: Path, mode: str) -> None:
    mark = "@pytest.mark.virtual_time" + ("\n@pytest.mark.asyncio" if mode == "strict" else "")
    said, code = pytest_in(tmp_path, HOUR.format(mark=mark), ini=f"asyncio_mode={mode}")
    assert code == 0, said


def test_async_fixtures_of_a_marked_test_have_its_loop_and_unmarked_tests_keep_theirs(tmp_path: Path) -> None:
    said, code = pytest_in(
        tmp_path,
        """
import asyncio, pytest
from sluiceway.testing import VirtualClockLoop

@pytest.fixture
async def loop():
    yield asyncio.get_running_loop()

@pytest.mark.virtual_time
async def test_marked(loop):
    assert loop is asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)

async def test_unmarked(loop):
    assert loop is asyncio.get_running_loop()
    assert type(loop) is Own

class Own(asyncio.SelectorEventLoop): ...
""",
        "-v",
        ini="asyncio_mode=auto",
    )
    assert code == 1, said  # nothing makes an `Own` yet
    assert "test_marked PASSED" in said
    (tmp_path / "conftest.py").write_text(
        "def pytest_asyncio_loop_factories(config, item):\n    from test_it import Own\n    return {'own': Own}\n"
    )
    said, code = pytest_in(tmp_path, (tmp_path / "test_it.py").read_text(), "-v", ini="asyncio_mode=auto\npythonpath=.")
    assert code == 0, said


def test_without_an_async_plugin_the_mark_runs_a_coroutine_function_itself(tmp_path: Path) -> None:
    said, code = pytest_in(tmp_path, HOUR.format(mark="@pytest.mark.virtual_time"), "-p", "no:asyncio")
    assert code == 0, said
    assert "1 passed" in said


def test_an_ordinary_test_in_a_marked_module_is_left_alone(tmp_path: Path) -> None:
    text = "import pytest\npytestmark = pytest.mark.virtual_time\ndef test_it():\n    assert True\n"
    for options in ((), ("-p", "no:asyncio")):
        said, code = pytest_in(tmp_path, text, *options)
        assert code == 0, said


def test_the_plugin_can_be_switched_off(tmp_path: Path) -> None:
    said, code = pytest_in(tmp_path, "def test_it():\n    assert True\n", "-p", "no:sluiceway", "--markers")
    assert code == 0, said
    assert "virtual_time" not in said
    assert "virtual_time" in pytest_in(tmp_path, "", "--markers")[0]


def test_a_run_that_uses_none_of_it_does_not_import_the_package(tmp_path: Path) -> None:
    text = (
        "import sys\ndef test_it():\n    assert not {'sluiceway', 'sluiceway.testing', 'msgspec'} & set(sys.modules)\n"
    )
    said, code = pytest_in(tmp_path, text)
    assert code == 0, said
    said, code = pytest_in(tmp_path, "import sys\ndef test_it():\n    assert '_sluiceway_pytest' in sys.modules\n")
    assert code == 0, said


def test_the_kits_own_functions_are_not_taken_for_tests(tmp_path: Path) -> None:
    text = "from sluiceway.testing import test_message, test_batch\ndef test_mine():\n    assert True\n"
    said, code = pytest_in(tmp_path, text, "-v", "-W", "error")
    assert code == 0, said
    assert "1 passed" in said
    assert "test_message" not in said


def test_under_anyio_the_mark_checks_that_the_backend_has_the_right_loop(tmp_path: Path) -> None:
    anyio = pytest.importorskip("anyio")
    assert anyio
    text = HOUR.format(mark="@pytest.mark.virtual_time\n@pytest.mark.anyio")
    said, code = pytest_in(tmp_path, text, "-p", "no:asyncio", "-k", "asyncio")
    assert code == 1
    assert "anyio chooses the loop, so the mark virtual_time cannot" in said
    text += """
@pytest.fixture
def anyio_backend():
    from sluiceway.testing import VirtualClockLoop
    return "asyncio", {"loop_factory": VirtualClockLoop}
"""
    said, code = pytest_in(tmp_path, text, "-p", "no:asyncio")
    assert code == 0, said
