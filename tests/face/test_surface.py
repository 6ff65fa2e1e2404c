"""The public surface: what can be imported, what importing it loads, and what it says of itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sluiceway
from sluiceway import errors

ROOT = Path(sluiceway.__file__).parent


def test_all_lists_what_the_package_imports_and_nothing_else() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert sorted(imported) == sluiceway.__all__
    assert all(hasattr(sluiceway, name) for name in sluiceway.__all__)
    assert sluiceway.__version__


def test_every_public_error_is_in_the_errors_module() -> None:
    for name in sluiceway.__all__:
        one = getattr(sluiceway, name)
        if isinstance(one, type) and issubclass(one, BaseException):
            assert one.__module__ == "sluiceway.errors"


def public_things() -> list[tuple[str, Any]]:
    things = []
    for name in sluiceway.__all__:
        one = getattr(sluiceway, name)
        if name in ("Middleware", "BatchMiddleware"):
            continue  # type aliases: their words stand below them in their module
        things.append((name, one))
        if inspect.isclass(one) and not issubclass(one, (BaseException, dict)):
            members = vars(one).items()
            things += [(f"{name}.{key}", value) for key, value in members if _is_documented(key, value)]
    return things


def _is_documented(name: str, value: Any) -> bool:
    if name.startswith("_"):
        return False
    return isinstance(value, property) or inspect.isfunction(value)


GATES = ("CircuitBreaker", "Pause", "RateLimit")
OBVIOUS = {f"{gate}.{name}" for gate in GATES for name in ("allow", "took", "opens_at", "on_change")}  # Gate says it
OF_CONSUMERS = {"FunctionConsumer.bind", "FunctionConsumer.check_without_context"}  # what the app calls


@pytest.mark.parametrize(("name", "thing"), public_things(), ids=[name for name, _ in public_things()])
def test_every_public_name_says_what_it_is(name: str, thing: Any) -> None:
    if name in OBVIOUS | OF_CONSUMERS:
        return
    text = thing.__doc__
    assert text
    first = text.strip().splitlines()[0]
    assert len(first) > 15
    assert not first.startswith(f"{name}(")  # what msgspec or dataclasses make up


# -- importing -------------------------------------------------------------------------------------------------------

EXTRAS = (
    "apsw",
    "click",
    "rich",
    "pydantic",
    "uvloop",
    "sqlite3",
    "ssl",
    "http",
    "multiprocessing",
    "typing_extensions",
    "prometheus_client",
    "opentelemetry",
    "redis",
    "lz4",
    "zstandard",
)


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_broker_client_no_terminal_and_no_extra() -> None:
    loaded = loaded_by("import sluiceway")
    without = loaded_by("import asyncio, msgspec, inspect, typing")  # what these load is not ours to choose
    assert not {name for name in loaded - without if name.split(".")[0] in EXTRAS}
    assert not {
        name for name in loaded if name.startswith(("sluiceway.cli", "sluiceway.transports.", "sluiceway.testing"))
    }


def test_declaring_consumers_loads_no_broker_client_either() -> None:
    declare = """
import sluiceway
@sluiceway.consumer("t", concurrency=3)
async def handle(message: sluiceway.Message[list[int]]) -> None: ...
sluiceway.App("memory://", consumers=[handle])
"""
    assert not {"apsw", "click", "rich", "pydantic", "uvloop"} & loaded_by(declare)


# -- the tree of errors ----------------------------------------------------------------------------------------------


def drawn_tree() -> dict[str, str | None]:
    """Who inherits from whom, as the docstring of the errors module draws it."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines()[2:]:
        match = re.match(r"([│├└─ ]*)(\w+)(?:  |$)", line)
        if match:
            depth = len(match[1]) // 4
            path = [*path[:depth], match[2]]
            parents[match[2]] = path[-2] if depth else None
    return parents


def real_tree() -> dict[str, str | None]:
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and one.__module__ == errors.__name__]
    assert all(issubclass(one, BaseException) for one in kinds)
    return {
        one.__name__: next((base.__name__ for base in one.__bases__ if base.__module__ == errors.__name__), None)
        for one in kinds
    }


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    assert drawn_tree() == real_tree()


def test_bases_outside_the_tree_are_told_beside_it() -> None:
    for line in (errors.__doc__ or "").splitlines():
        also = re.search(r"(\w+) .*\(also an? (\w+)\)", line)
        if also:
            assert also[2] in {base.__name__ for base in getattr(errors, also[1]).__mro__}
    told = re.findall(r"also an? (\w+)", errors.__doc__ or "")
    real = [
        base.__name__
        for one in vars(errors).values()
        if isinstance(one, type) and one.__module__ == errors.__name__
        for base in one.__bases__
        if base.__module__ == "builtins" and base is not Exception
    ]
    assert sorted(told) == sorted(real)


def test_no_exception_of_the_library_is_defined_anywhere_else() -> None:
    elsewhere = set()
    for module in pkgutil.walk_packages([str(ROOT)], "sluiceway."):
        if module.name.startswith(("sluiceway.cli", "sluiceway.__main__", "sluiceway.testing", "sluiceway.transports")):
            continue  # what is raised and caught within one adapter, the door or a test reaches no handler
        for one in vars(importlib.import_module(module.name)).values():
            if isinstance(one, type) and issubclass(one, BaseException) and one.__module__.startswith("sluiceway"):
                elsewhere.add(f"{one.__module__}.{one.__name__}")
    assert {name for name in elsewhere if not name.startswith("sluiceway.errors.")} == set()
