"""The pytest plugin: `@pytest.mark.virtual_time`, and what the acceptance suite of transports needs.

A module of its own, since pytest imports it at every start in every project that has Sluiceway installed: inside the
package it would load the package. It does nothing until a test has the mark.

Under pytest-asyncio the test and its async fixtures get a loop in virtual time. A test that no async plugin runs is run
here. Under anyio the loop is chosen by the `anyio_backend` fixture, so the mark checks that it is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any

import pytest

pytest.register_assert_rewrite("sluiceway.testing.acceptance")  # by name: nothing of it is imported here

MARK = "virtual_time"
ANYIO = """\
anyio chooses the loop, so the mark virtual_time cannot; choose it by a fixture:

    @pytest.fixture
    def anyio_backend():
        return "asyncio", {"loop_factory": VirtualClockLoop}  # from sluiceway.testing
"""


class _Factories:
    """Answers pytest-asyncio's question for the loop of a test."""

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_asyncio_loop_factories(self) -> Mapping[str, Callable[[], Any]]:
        from sluiceway.testing import VirtualClockLoop

        return {"virtual time": VirtualClockLoop}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}: runs an async test in virtual time, where waiting takes no time")
    config.addinivalue_line("markers", "guarantee(*names): what a test of sluiceway.testing.acceptance shows")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The acceptance suite has texts that are no UTF-8. pytest-xdist cannot send a report that shows one."""
    report = yield
    if item.get_closest_marker("guarantee") is not None:
        report.sections = [(title, _sendable(text)) for title, text in report.sections]
        if report.failed and _sendable(str(report.longrepr)) != str(report.longrepr):
            report.longrepr = _sendable(str(report.longrepr))
    return report


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Generator[None, object, object]:
    """Answer while the marked test is asked for, and at no other time: all other tests keep their project's loops."""
    if metafunc.definition.get_closest_marker(MARK) is None:
        return (yield)
    plugins = metafunc.config.pluginmanager
    factories = _Factories()
    plugins.register(factories)
    try:
        return (yield)
    finally:
        plugins.unregister(factories)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Check anyio's loop before anyio runs the test: which plugin's `pytest_pyfunc_call` is asked first is chance."""
    backend = getattr(item, "funcargs", {}).get("anyio_backend")
    if backend is None or item.get_closest_marker(MARK) is None or item.get_closest_marker("anyio") is None:
        return
    from sluiceway.testing import VirtualClockLoop

    options = backend[1] if isinstance(backend, tuple) else {}
    if options.get("loop_factory") is not VirtualClockLoop:
        pytest.fail(ANYIO, pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a marked test that is a coroutine function still: nobody else has made it an ordinary one."""
    if pyfuncitem.get_closest_marker(MARK) is None:
        return None
    config = pyfuncitem.config
    if config.pluginmanager.hasplugin("asyncio") and pyfuncitem.get_closest_marker("asyncio") is not None:
        if not hasattr(config.hook, "pytest_asyncio_loop_factories"):
            pytest.fail("the mark virtual_time needs pytest-asyncio 1.4 or later", pytrace=False)
        return None
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None  # an ordinary test among those that a module has marked: it has no loop
    if "anyio_backend" in pyfuncitem.funcargs:
        return None  # anyio's; `pytest_runtest_call` has looked at its loop
    from sluiceway.testing import run

    names = inspect.signature(pyfuncitem.obj).parameters
    run(pyfuncitem.obj(**{name: value for name, value in pyfuncitem.funcargs.items() if name in names}))
    return True
