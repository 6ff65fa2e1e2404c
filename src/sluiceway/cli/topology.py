"""What an app runs, in words: for the first screen of `run` and for `inspect`. It connects to nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from .._decisions.backoff import retry_delay
from .._decisions.topics import dead_letter_topic, is_pattern
from ..app import App
from ..assembly import check_features, window_bounds
from ..consumer import ConsumerDef
from ..message import DEFAULT_BATCHER
from ..options import Resolved
from ..remote import remote_handler
from ..retry import Retry
from ..signatures import name_of


class BatcherView(Struct, frozen=True, kw_only=True):
    """One batcher: a batch goes after `size` messages or `seconds`."""

    name: str
    size: int
    seconds: float
    keyed: bool
    concurrency: int
    split: str | None = None

    def __str__(self) -> str:
        text = f"{self.name}: {self.size} messages or {self.seconds:g} s"
        text += f", split by {self.split}" if self.split else ""
        text += ", by key" if self.keyed else ""
        return text + (f", {self.concurrency} at once" if self.concurrency > 1 else "")


class OptionView(Struct, frozen=True, kw_only=True):
    """An option's effective value, as text where it is no number, and where it comes from."""

    value: str | float | None
    origin: str


class ConsumerView(Struct, frozen=True, kw_only=True):
    """One consumer as it would run now. Middleware is named from the outside in, the app's first."""

    name: str
    topics: tuple[str, ...]
    group: str
    payload: str
    concurrency: int
    runs_on: str
    batchers: tuple[BatcherView, ...]
    middleware: tuple[str, ...]
    batch_middleware: tuple[str, ...]
    gates: tuple[str, ...]
    retry: str
    dead_letters: tuple[str, ...]
    order: str | None
    window: tuple[int, int]
    options: dict[str, OptionView]
    guarantees: dict[str, str]


def describe(app: App, definition: ConsumerDef) -> ConsumerView:
    """What a consumer is and is promised over this broker. Raises OptionError and Unsupported for options that exclude
    each other or that the broker cannot give."""
    check_features(definition, app.transport.features)
    group = group_of(app, definition)
    sizes = definition.batchings()
    view = ConsumerView(
        name=definition.name,
        topics=definition.topics,
        group=group,
        payload=_type_name(definition.payload_type),
        concurrency=definition.value("concurrency"),
        runs_on=_runs_on(app, definition),
        batchers=tuple(
            BatcherView(
                name=name,
                size=one.size,
                seconds=one.timeout,
                keyed=one.key is not None,
                concurrency=one.concurrency,
                split=None if one.split is None else name_of(one.split.step),
            )
            for name, one in sizes.items()
        ),
        middleware=_names(app.middleware, definition.value("middleware")),
        batch_middleware=_names(app.batch_middleware, definition.value("batch_middleware")),
        gates=tuple(map(_gate, definition.value("gates"))),
        retry=_retry(definition),
        dead_letters=dead_letter_topics(app, definition),
        order=definition.value("order_by"),
        window=window_bounds(definition, sizes),
        options={
            name: OptionView(value=_value(name, one.value, definition, group), origin=_origin(name, one))
            for name, one in _effective(definition).items()
        },
        guarantees={},
    )
    view.guarantees.update(_guarantees(app, definition, view))
    return view


def file_of(app: App) -> str | None:
    """Where the broker's file is, when its URL is relative: then it depends on the folder that one is in."""
    path = getattr(app.transport, "path", None)
    return None if path is None or app.broker.startswith("sqlite:////") else str(path)


def group_of(app: App, definition: ConsumerDef) -> str:
    """The group that a consumer runs in."""
    group: str = definition.value("group") or app.group
    return group


def dead_letter_topics(app: App, definition: ConsumerDef) -> tuple[str, ...]:
    """Where a consumer's dead letters go; for a pattern `{topic}` stands for the message's own topic."""
    said = definition.value("dead_letter_topic")
    if said is not None:
        return (said,)
    group = group_of(app, definition)
    names = ("{topic}" if is_pattern(topic) else topic for topic in definition.topics)
    return tuple(dict.fromkeys(dead_letter_topic(name, group) for name in names))


def _effective(definition: ConsumerDef) -> dict[str, Resolved]:
    """The options, with what `@consumer.batch(...)` says of batches."""
    options = dict(definition.options)
    sizes = definition.batchings()
    if sizes and options["batchers"].origin == "default":
        options["batchers"] = Resolved(tuple(sizes), "consumer")
    own = sizes.get(DEFAULT_BATCHER)
    for name, value in (("batch_size", own and own.size), ("batch_timeout", own and own.timeout)):
        if options[name].origin == "default" and value != options[name].value:
            options[name] = Resolved(value, "default" if value is None else "consumer")
    return options


def _runs_on(app: App, definition: ConsumerDef) -> str:
    if definition.value("executor") == "process":
        remote_handler(definition, lifespan=app.lifespan, max_payload=None, is_async=True)  # can workers find it?
        return "processes"
    return "tasks" if _runs_in_loop(app, definition) else "threads"


def _runs_in_loop(app: App, definition: ConsumerDef) -> bool:
    return definition.is_async or bool(app.middleware or definition.value("middleware"))


def _retry(definition: ConsumerDef) -> str:
    retry = definition.value("retry")
    if definition.value("exhausted") == "retry":
        return f"for ever, {_apart(retry, sys.maxsize)}"
    if retry.attempts == 1:
        return "no retry"
    return f"{retry.attempts} attempts, {_apart(retry, retry.attempts - 1)}"


def _apart(retry: Retry, last: int) -> str:
    """The shortest and the longest delay that can be drawn up to the one after the attempt `last`."""
    least, most = retry_delay(retry, 1, 1.0), retry_delay(retry, last, 0.0)
    return f"{least:g} s apart" if least == most else f"{least:g} to {most:g} s apart"


def _guarantees(app: App, definition: ConsumerDef, view: ConsumerView) -> dict[str, str]:
    features = app.transport.features
    floor, ceiling = view.window
    largest = definition.value("max_payload") or features.max_payload
    window = f"{floor:,} messages" if floor == ceiling else f"{floor:,} to {ceiling:,} messages, by the measured rate"
    return {
        "delivery": "at least once: acknowledged only after the handler" + (" and its batch" if view.batchers else ""),
        "window": f"never more in hand than {window}, and {_bytes(definition.value('max_buffer_bytes'))}",
        "failure": _failure(definition, view),
        "order": _order(view, features.order),
        "durable": "yes: what was published survives the death of every process"
        if features.durable
        else "no: messages go when the broker's process ends",
        "delay": f"held by the broker ({features.delay})" if features.delay != "none" else "none on this broker",
        "crash": "what a killed process held comes back, at most its window is repeated"
        if features.lease
        else "what a killed process held comes back when its connection is gone",
        "size": f"bodies up to {_bytes(largest)}; larger ones are dead-lettered undecoded",
    }


def _failure(definition: ConsumerDef, view: ConsumerView) -> str:
    if definition.value("exhausted") == "drop":
        return f"{view.retry}, then dropped, with an error in the log"
    if definition.value("exhausted") == "retry":
        return f"tried {view.retry}; rejected ones to {', '.join(view.dead_letters)}"
    return f"{view.retry}, then dead letter to {', '.join(view.dead_letters)}"


def _order(view: ConsumerView, scope: str) -> str:
    if view.order is None:
        return "none promised (order_by is not set)"
    where = {"group": "over the whole group", "process": "within each process"}.get(scope, scope)
    return f"messages of one {view.order} one at a time, in order, {where}"


def _value(name: str, value: Any, definition: ConsumerDef, group: str) -> str | float | None:
    if name == "name":
        return definition.name
    if name == "group":
        return group
    if name == "retry":
        growing = f"{value.base_delay:g} s × {value.multiplier:g}, at most {value.longest_delay:g} s"
        spread = f", each up to {100 * value.jitter:g} % less by chance" if value.jitter else ""
        return f"{value.attempts} attempts, {growing}{spread}"
    if name == "payload":
        return _type_name(definition.payload_type)
    if name in ("middleware", "batch_middleware", "acknowledgers", "gates"):
        return ", ".join(map(name_of, value)) or "none"
    if name == "batchers":
        return ", ".join(definition.batchers) or "none"
    return value if value is None or isinstance(value, (int, float)) else str(value)


def _origin(name: str, option: Resolved) -> str:
    """Where a value comes from; two defaults are not fixed ones but are read elsewhere."""
    if option.origin == "default" and option.value is None:
        return {"group": "app", "name": "handler", "payload": "handler"}.get(name, "default")
    return option.origin


def _names(*middlewares: Iterable[Any]) -> tuple[str, ...]:
    return tuple(name_of(one) for some in middlewares for one in some)


def _gate(gate: Any) -> str:
    """A gate with its figures, where it says them; else what it is."""
    said = repr(gate)
    return type(gate).__name__ if " object at 0x" in said else said.removeprefix("<").removesuffix(">")


def _type_name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind))


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
