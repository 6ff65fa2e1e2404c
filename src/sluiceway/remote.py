"""A consumer's handler as a worker process finds it again: by module and name, with the app's lifespan round it."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from msgspec import Struct

from ._runtime.spec import OpenedHandler, RemoteHandler
from .codec import encode, make_decoder, make_encoder
from .consumer import ClassConsumer, ConsumerDef, FunctionConsumer, definition
from .errors import OptionError
from .signatures import NO_CONTEXT, Lifespan

_MAIN = "__main__"


class _Opener(Struct, frozen=True, kw_only=True):
    """What is sent to a worker process. `given`: options of a function that its module knows as no consumer."""

    module: str
    name: str
    consumer: str
    batchers: tuple[str, ...]
    given: Mapping[str, Any] | None
    lifespan: Lifespan | None
    max_payload: int | None

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[OpenedHandler]:
        """Import the handler's module, enter the lifespan, and bind the handler to what it yields."""
        found = self._definition()
        if self.lifespan is None:
            yield self._open(found, NO_CONTEXT)
        else:
            async with self.lifespan() as context:
                yield self._open(found, context)

    def _definition(self) -> ConsumerDef:
        found = _walk(importlib.import_module(self.module), self.name)
        if self.given is None:
            return definition(found)
        function = found.function if isinstance(found, FunctionConsumer) else found
        return FunctionConsumer(function, ("source",), self.given)

    def _open(self, found: ConsumerDef, context: Any) -> OpenedHandler:
        bound = found.bind(context)
        return OpenedHandler(
            consumer=self.consumer,
            handle=bound.handle,
            is_async=bound.is_async,
            decode=make_decoder(bound.payload_type),
            encode=encode if self.max_payload is None else make_encoder(self.max_payload),
            batchers=self.batchers,
        )


def remote_handler(
    declared: ConsumerDef, *, lifespan: Lifespan | None, max_payload: int | None, is_async: bool
) -> RemoteHandler:
    """What worker processes are given to find a consumer's handler.

    Raises OptionError when they could not find it, or something that goes with it.
    """
    target = _target(declared)
    module, name = _place(declared, target)
    found = _walk(sys.modules[module], name)
    given = None
    if found is not declared and not (isinstance(declared, ClassConsumer) and found is target):
        given = {one: declared.given[one] for one in ("payload",) if one in declared.given}
    for what, part in (("the app's lifespan", lifespan), ("the payload's type", given)):
        _check_crosses(declared, what, part)
    opener = _Opener(
        module=module,
        name=name,
        consumer=declared.name,
        batchers=tuple(declared.batchers),
        given=given,
        lifespan=lifespan,
        max_payload=max_payload,
    )
    return RemoteHandler(pickle.dumps(opener), is_async)


def _target(declared: ConsumerDef) -> Any:
    if isinstance(declared, FunctionConsumer):
        return declared.function
    assert isinstance(declared, ClassConsumer)
    if not declared.has_handle:
        raise OptionError(f"{declared.name}: executor='process' is for handle, and there is none; leave it out")
    return declared.kind


def _place(declared: ConsumerDef, target: Any) -> tuple[str, str]:
    """The module and the qualified name under which a worker process finds `target`."""
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise _not_found(declared, f"{target!r} has no name")
    if module == _MAIN:
        raise _not_found(declared, f"{name!r} is in the program itself (__main__), which workers do not run")
    if "<" in name:  # <locals>, <lambda>
        raise _not_found(declared, f"{name!r} is made when the program runs")
    try:
        known = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        known = False
    if not known or module not in sys.modules:
        raise _not_found(declared, f"there is no module {module!r} to import")
    found = _walk(sys.modules[module], name)
    if found is not target and getattr(found, "function", None) is not target:
        raise _not_found(declared, f"{module}.{name} is something else: {found!r}")
    return module, name


def _walk(module: Any, name: str) -> Any:
    for step in name.split("."):
        module = getattr(module, step, None)
    return module


def _not_found(declared: ConsumerDef, why: str) -> OptionError:
    return OptionError(
        f"{declared.name}: executor='process' needs a handler that a worker process can import: {why}; "
        "define it with `def` or `class` at the top of a module of its own"
    )


def _check_crosses(declared: ConsumerDef, what: str, part: Any) -> None:
    try:
        data = pickle.dumps(part)
    except Exception as error:
        why = str(error)
    else:
        if _MAIN.encode() not in data:
            return
        why = "it is in the program itself (__main__), which workers do not run"
    raise OptionError(
        f"{declared.name}: executor='process' needs {what} in the worker processes too, and it cannot go there: {why}; "
        "define it at the top of a module of its own"
    )
