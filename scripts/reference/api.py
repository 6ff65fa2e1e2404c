"""The page of names: what can be imported, how it is called, and what it says of itself."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import sluiceway
from sluiceway.telemetry import Event

from .calls import call

HEAD = """\
# Names

Every public name, made from the code by `make docs`. What begins with an underscore, and what is not here, may change
without notice. Consumer options are on [a page of their own](options.md), and so are [events](events.md).
"""

# Beside `sluiceway` itself: what is imported from where it is. Without names: the module's `__all__`, or all that it
# defines.
MODULES: dict[str, tuple[str, ...]] = {
    "sluiceway.errors": ("Directive", "KilledItsProcess", "MessageFailed"),
    "sluiceway.message": ("Settlement", "Reason", "Refused", "Stored"),
    "sluiceway.middleware": ("ConsumerInfo", "MiddlewareFor", "BatchMiddlewareFor"),
    "sluiceway.middleware.logging": (),
    "sluiceway.middleware.metrics": (),
    "sluiceway.middleware.tracing": (),
    "sluiceway.middleware.timeout": (),
    "sluiceway.middleware.decode": ("Decode",),
    "sluiceway.middleware.idempotency": (),
    "sluiceway.middleware.idempotency.sqlite": (),
    "sluiceway.middleware.idempotency.redis": (),
    "sluiceway.gate": (),
    "sluiceway.sources": (),
    "sluiceway.source": ("Source", "Subscription", "SourceInfo", "SourceStatus", "Backlog", "Renewer"),
    "sluiceway.transport": (),
    "sluiceway.transports.memory": ("MemoryTransport",),
    "sluiceway.transports.sqlite": ("SQLiteTransport",),
    "sluiceway.telemetry": (),
    "sluiceway.topology": (),
    "sluiceway.testing": (),
}


def page() -> str:
    parts = [HEAD]
    for name in ("sluiceway", *MODULES):
        module = importlib.import_module(name)
        first, _, _ = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
        parts.append(f"## {name}\n\n{first}\n")
        parts += [entry(one, getattr(module, one), module) for one in names_of(module)]
    return "\n".join(parts)


def names_of(module: ModuleType) -> list[str]:
    """The names of a module that are on the page; what `sluiceway` has is under `sluiceway` alone."""
    named: Sequence[str] = MODULES.get(module.__name__, ())
    if named := named or getattr(module, "__all__", ()):
        return [name for name in named if module is sluiceway or name not in sluiceway.__all__]
    return [name for name, thing in vars(module).items() if not name.startswith("_") and _is_own(thing, module)]


def _is_own(thing: Any, module: ModuleType) -> bool:
    """Whether `module` defines it, and it is no event: those have a page."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return False
    event = inspect.isclass(thing) and issubclass(thing, Event) and thing is not Event
    return thing.__module__ == module.__name__ and not event and bool(thing.__doc__)


def entry(name: str, thing: Any, module: ModuleType) -> str:
    """One name: how it is called, what it says, and its methods."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"### {name}\n\n{_said_below(name, module)}\n"
    shown = name if _is_never_called(thing) else call(name, thing)
    lines = [f"### {name}", "", _code(shown), "", inspect.cleandoc(thing.__doc__ or ""), ""]
    if inspect.isclass(thing):
        for method, what in members(thing):
            lines += [f"#### {name}.{method}", "", _code(_member(method, what)), ""]
            lines += [inspect.cleandoc(what.__doc__ or ""), ""]
    return "\n".join(lines)


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself and says something of."""
    for name, what in vars(kind).items():
        function = what.__func__ if isinstance(what, (staticmethod, classmethod)) else what
        known = isinstance(what, property) or inspect.isfunction(function)
        if known and not name.startswith("_") and function.__doc__:
            yield name, what


def _member(name: str, what: Any) -> str:
    if isinstance(what, property):
        hint = inspect.get_annotations(what.fget).get("return", "") if what.fget else ""
        return f"{name}: {hint}"
    if isinstance(what, staticmethod):
        return call(name, what.__func__)
    function = what.__func__ if isinstance(what, classmethod) else what
    prefix = "async " if inspect.iscoroutinefunction(function) else ""
    return prefix + call(name, function, bound=True)


def _is_never_called(thing: Any) -> bool:
    """Whether nobody makes one: a protocol, a mapping's type, or an error without arguments of its own."""
    if not inspect.isclass(thing):
        return False
    plain_error = issubclass(thing, BaseException) and "__init__" not in vars(thing)
    return plain_error or issubclass(thing, dict) or bool(getattr(thing, "_is_protocol", False))


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _said_below(name: str, module: ModuleType) -> str:
    """What the string below the assignment of a name says, wherever `module` has it from."""
    body = ast.parse(inspect.getsource(module)).body
    for number, one in enumerate(body):
        if isinstance(one, ast.ImportFrom) and any(alias.name == name for alias in one.names):
            where = importlib.import_module("." * one.level + (one.module or ""), module.__package__)
            return _said_below(name, where)
        if isinstance(one, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in one.targets):
            below = body[number + 1]
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            return f"{_code(ast.unparse(one))}\n\n{inspect.cleandoc(str(below.value.value))}"
    raise LookupError(f"{module.__name__} does not say what {name} is")
