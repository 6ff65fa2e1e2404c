"""What cannot run in a worker process is refused at the start, with what to do about it."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sluiceway import App, Batch, Consumer, Message, OptionError, Pipeline, consumer
from sluiceway.options import resolve

from . import handlers

HOW = r"define it with `def` or `class` at the top of a module of its own"


async def nothing() -> Any:
    raise AssertionError("never opened")


def at_the_top(message: Message[Any]) -> None: ...


renamed = at_the_top
at_the_top = lambda message: None  # type: ignore[assignment]  # noqa: E731


class Callable:
    def __call__(self, message: Message[Any]) -> None: ...


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (lambda message: None, r"'<lambda>' is made when the program runs"),
        (functools.partial(handlers.act), r"has no name"),
        (Callable(), r"has no name"),
        (renamed, r"test_refused.at_the_top is something else"),
    ],
)
def test_a_handler_that_no_other_process_finds(handler: Any, why: str) -> None:
    with pytest.raises(OptionError, match=why) as caught:
        Pipeline(nothing, handler, executor="process")
    assert HOW in str(caught.value)


def test_a_function_in_a_function() -> None:
    def inner(message: Message[Any]) -> None: ...

    with pytest.raises(OptionError, match=r"inner: executor='process' .* is made when the program runs; " + HOW):
        Pipeline(nothing, inner, executor="process")


@pytest.mark.parametrize(("module", "why"), [("__main__", "workers do not run"), ("nowhere", "no module 'nowhere'")])
def test_a_function_of_the_program_itself_or_of_no_module(
    module: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers.act, "__module__", module)
    with pytest.raises(OptionError, match=why):
        Pipeline(nothing, handlers.act, executor="process")


def test_a_payload_type_that_no_other_process_finds() -> None:
    class Here: ...

    with pytest.raises(OptionError, match=r"needs the payload's type in the worker processes too"):
        Pipeline(nothing, handlers.act, executor="process", payload=list[Here])


async def test_a_lifespan_that_no_other_process_finds() -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield

    app = App("memory://", consumers=[handlers.plain], lifespan=lifespan)
    with pytest.raises(OptionError, match=r"plain: executor='process' needs the app's lifespan"):
        async with app.running():
            pass


@consumer("t", executor="process")
class OnlyBatches(Consumer[int]):
    async def handle_batch(self, batch: Batch[int]) -> None: ...


async def test_a_class_without_handle() -> None:
    with pytest.raises(OptionError, match=r"OnlyBatches: executor='process' is for handle, and there is none"):
        async with App("memory://", consumers=[OnlyBatches]).running():
            pass


@consumer("t", executor="process")
def prepared(message: Message[Any]) -> None: ...


@prepared.prepare
async def prepare(messages: Any) -> None: ...


async def test_prepare() -> None:
    with pytest.raises(OptionError, match=r"prepared: executor='process' and prepare exclude each other"):
        async with App("memory://", consumers=[prepared]).running():
            pass


def test_concurrency_is_one_process_per_cpu_unless_given() -> None:
    cpus = os.sched_getaffinity(0)
    assert resolve("c", {"executor": "process"})["concurrency"].value == len(cpus)
    assert resolve("c", {"executor": "process"})["concurrency"].origin == "default"
    assert resolve("c", {"executor": "process", "concurrency": 3})["concurrency"].value == 3
    assert resolve("c", {})["concurrency"].value == 10
