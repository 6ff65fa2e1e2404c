"""Reading what users write: whether a function is async, what it takes, and which payload type it names."""

from __future__ import annotations

import contextlib
import inspect
import sys
import typing
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Annotated, Any, TypeVar, get_args, get_origin

from .errors import OptionError
from .message import Message


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling `function` gives an awaitable: seen through partials, decorators and objects with `__call__`."""
    layer: Any = function
    while layer is not None:
        if inspect.iscoroutinefunction(layer) or inspect.iscoroutinefunction(getattr(layer, "__call__", None)):  # noqa: B004
            return True
        layer = layer.func if isinstance(layer, partial) else getattr(layer, "__wrapped__", None)
    return False


def name_of(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def method_of(kind: type, name: str) -> Callable[..., Any]:
    """A method as its object will have it: without `self`."""
    found: Callable[..., Any] = getattr(kind, name)
    return partial(found, None) if inspect.isfunction(inspect.getattr_static(kind, name)) else found


def check_call(where: str, function: Callable[..., Any], rule: str, *counts: int) -> None:
    """Raise OptionError unless `function` can be called with one of so many arguments and then does its work."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise OptionError(f"{where}: {name_of(function)} has a `yield`: a call would run nothing of it; use `return`")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise OptionError(f"{where}: {rule}, and {function!r} does not say what it takes") from None
    if next(iter(signature.parameters), None) in ("self", "cls"):
        raise OptionError(f"{where}: a method is declared by its class, one that inherits from Consumer[payload type]")
    for count in counts:
        with contextlib.suppress(TypeError):
            signature.bind(*range(count))
            return
    raise OptionError(f"{where}: {rule}; got {name_of(function)}{signature}")


Lifespan = Callable[[], AbstractAsyncContextManager[Any]]


class NoContext:
    """Stands for the context of an app that has no lifespan."""


NO_CONTEXT = NoContext()


def takes(function: Callable[..., Any], index: int, context: Any) -> bool:
    """Whether the context is handed over as argument `index`. One with a default keeps it when there is no context.

    Raises OptionError when one without a default would get none.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [one for one in inspect.signature(function).parameters.values() if one.kind in kinds]
    if len(taken) <= index:
        return False
    required = taken[index].default is inspect.Parameter.empty
    if required and context is NO_CONTEXT:
        raise OptionError(
            f"{name_of(function)} takes {taken[index].name!r}, which is what the app's lifespan yields, "
            "and there is no lifespan; give one: App(lifespan=...)"
        )
    return required or context not in (None, NO_CONTEXT)


def with_context(function: Callable[..., Any], context: Any) -> Callable[[Any], Any]:
    """`function(message)`, also when it takes the context as its second argument."""
    if not takes(function, 1, context):
        return function
    if is_async(function):

        async def bound(subject: Any) -> Any:
            return await function(subject, context)

        return bound
    return lambda subject: function(subject, context)


def payload_type(name: str, function: Callable[..., Any]) -> Any:
    """T of the first parameter's `Message[T]`; Any (whatever the JSON says) when it says nothing."""
    first = next(iter(inspect.signature(function).parameters.values()))
    if first.annotation is inspect.Parameter.empty:
        return Any
    annotation = _evaluated(name, first.annotation, _globals(function))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Message:
        (argument,) = get_args(annotation)
        return Any if isinstance(argument, TypeVar) else argument
    foreign = inspect.isclass(annotation) and annotation is not Any and annotation not in Message.__mro__
    if foreign and not getattr(annotation, "_is_protocol", False):
        raise OptionError(f"{name}: a handler takes a Message[{annotation.__name__}], not a {annotation.__name__}")
    return Any


def class_payload_type(name: str, kind: type, root: type, has_handle: bool) -> Any:
    """The payload type of a class that inherits from `root[payload type]`."""
    argument = _argument(name, kind, root)
    if not isinstance(argument, TypeVar):
        return argument
    return payload_type(name, method_of(kind, "handle")) if has_handle else Any


def _argument(name: str, kind: type, root: type) -> Any:
    """What stands for T of `root[T]`, followed through the classes between; a TypeVar when nothing does."""
    (nothing,) = root.__parameters__  # type: ignore[attr-defined]
    for base in vars(kind).get("__orig_bases__", kind.__bases__):
        origin = get_origin(base) or base
        if origin is root:
            argument = get_args(base)[0] if get_args(base) else nothing
            return _evaluated(name, argument, vars(sys.modules[kind.__module__]))
        if inspect.isclass(origin) and issubclass(origin, root):
            found = _argument(name, origin, root)
            known: dict[Any, Any] = dict(zip(getattr(origin, "__parameters__", ()), get_args(base), strict=False))
            if isinstance(found, TypeVar):
                return known.get(found, found)
            open_ones = getattr(found, "__parameters__", ())
            return found[tuple(known.get(one, one) for one in open_ones)] if open_ones else found
    return nothing


def _globals(function: Any) -> dict[str, Any]:
    """The names that a function's annotations can use."""
    while isinstance(function, partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, partial) else function.__wrapped__
    if not hasattr(function, "__globals__"):
        function = getattr(function, "__func__", type(function).__call__)
    return getattr(function, "__globals__", {})


def _evaluated(name: str, annotation: Any, names: dict[str, Any]) -> Any:
    """An annotation that may be, or hold, text. It alone: the others of its function may be for type checkers only."""

    def holder() -> None: ...

    holder.__annotations__ = {"it": annotation}
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["it"]
    except Exception as error:
        raise OptionError(
            f"{name}: the annotation {annotation!r} cannot be read here ({error}); "
            "define the type at module level, above the consumer, or give payload=..."
        ) from None
