"""The page of options."""

from __future__ import annotations

import inspect
from typing import Any

from sluiceway import App, Batching, ConsumerOptions, Retry
from sluiceway.options import OPTIONS, Option

from .calls import default, hint

HEAD = """\
# Options

Made from the code by `make docs`. `sluiceway inspect` shows those of an app, and where each value comes from. Durations
are seconds, sizes are bytes.

## Of a consumer

Keyword arguments of `@app.consumer(topic, ...)`, `@consumer(topic, ...)` and `Pipeline(source, handler, ...)`. A name
or a value that is not allowed raises `OptionError` where it is written, or at start when it depends on the broker. An
option with a check mark under *set* can be changed for a run: `sluiceway run shop:app --set payments.concurrency=20`.
The last column names the [guarantees](../explanation/design.md#guarantees) that it bears on.

| option | type | default | allowed | meaning | set | bears on |
| --- | --- | --- | --- | --- | --- | --- |
"""

RETRY = """
## Of a retry

`retry=Retry(...)` of a consumer, and of `message.configure(retry=...)`. On the command line it is JSON:
`--set 'payments.retry={"attempts": 2}'`.
"""

BATCHING = """
## Of a batcher

Keyword arguments of `@payments.batch(...)`, or `batchers={"s3": Batching(...)}` of a class.
"""

APP = """
## Of an app

Arguments of `App(...)`.
"""


def page() -> str:
    types = inspect.get_annotations(ConsumerOptions)
    rows = [_row(name, hint(types[name]), option) for name, option in OPTIONS.items()]
    parts = [HEAD + "\n".join(rows) + "\n"]
    parts += [head + "\n" + _table(kind) for head, kind in ((RETRY, Retry), (BATCHING, Batching), (APP, App))]
    return "".join(parts)


def _row(name: str, kind: str, option: Option) -> str:
    allowed = option.check(object()) or "anything"
    is_set = "✓" if option.parse is not None or name == "retry" else ""
    cells = (f"`{name}`", f"`{kind}`", f"`{default(option.default)}`", allowed, option.meaning, is_set)
    return "| " + " | ".join(map(_escaped, (*cells, ", ".join(option.guarantees)))) + " |"


def _table(kind: type[Any]) -> str:
    """The arguments of a class with their defaults, and what it says of them."""
    fields = inspect.get_annotations(kind)
    lines = ["| option | type | default |", "| --- | --- | --- |"]
    for one in inspect.signature(kind).parameters.values():
        text = hint(fields.get(one.name, one.annotation))
        lines.append(
            "| " + " | ".join(map(_escaped, (f"`{one.name}`", f"`{text}`", f"`{default(one.default)}`"))) + " |"
        )
    return "\n".join(lines) + f"\n\n{inspect.cleandoc(kind.__doc__ or '')}\n"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")
