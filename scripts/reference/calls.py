"""How a class or a function is called, as text."""

from __future__ import annotations

import inspect
import re
from typing import Any, ForwardRef

from msgspec import Struct

WIDTH = 100
_AT = re.compile(r"<(?:function |class ')?([\w.]+?)'?(?: object)?(?: at 0x[0-9a-f]+)?>")
_PACKAGES = re.compile(r"\b(?:typing|collections\.abc|sluiceway(?:\.\w+)*|contextlib)\.(?=\w)")


def call(name: str, what: Any, *, bound: bool = False) -> str:
    """`name(argument: type = default, ...) -> type`, over several lines where it is long.

    `bound`: without the first argument, which is the object.
    """
    try:
        signature = inspect.signature(what)
    except (TypeError, ValueError):
        return name
    hints = _fields(what)
    parts: list[str] = []
    kinds = inspect.Parameter
    starred = False
    for number, one in enumerate(signature.parameters.values()):
        if number == 0 and bound:
            continue
        if one.kind is kinds.KEYWORD_ONLY and not starred:
            starred = True
            parts.append("*")
        starred = starred or one.kind is kinds.VAR_POSITIONAL
        parts.append(_parameter(one, hints))
    returns = _hint(signature.return_annotation)
    end = f") -> {returns}" if returns and not inspect.isclass(what) else ")"
    line = f"{name}({', '.join(parts)}{end}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), end])


def _fields(what: Any) -> dict[str, Any]:
    """The annotations of a Struct's fields as they are written."""
    if not (inspect.isclass(what) and issubclass(what, Struct)):
        return {}
    return {name: hint for kind in reversed(what.__mro__) for name, hint in inspect.get_annotations(kind).items()}


def _parameter(one: inspect.Parameter, hints: dict[str, Any]) -> str:
    stars = "*" if one.kind is one.VAR_POSITIONAL else "**" if one.kind is one.VAR_KEYWORD else ""
    hint = _hint(hints.get(one.name, one.annotation))
    text = f"{stars}{one.name}: {hint}" if hint else f"{stars}{one.name}"
    return text if one.default is one.empty else f"{text} = {default(one.default)}"


def default(value: Any) -> str:
    """A default value, without where in memory it is."""
    if repr(value) == "<factory>":
        return "..."
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    return "{}" if repr(value) == "mappingproxy({})" else _AT.sub(r"\1", repr(value))


def _hint(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return _PACKAGES.sub("", hint(annotation))


def hint(annotation: Any) -> str:
    """An annotation as it is written."""
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    if isinstance(annotation, str):
        return annotation
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation)
