"""Pairs: the limit and ours are measured in turn, so that what the machine does meanwhile meets both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

from msgspec import Struct

from .child import Job, MeasureFailed, measure
from .servers import server


class Figure(Struct, frozen=True):
    """One row of the table, from one key of what the measure returns.

    `kind` says what the ratio is: `rate` is ours / limit, where both were measured; `bound` is bound / ours, for what
    must stay below; `rise` is bound / (ours - limit), for what must not grow by more. So a larger ratio is always
    better. `least`: what it must reach; None: the row only informs.
    """

    case: str
    unit: str = "messages/s"
    key: str = "rate"
    kind: Literal["rate", "bound", "rise"] = "rate"
    bound: float | None = None
    least: float | None = None


class Case(Struct, frozen=True):
    """What is measured together: ours, what it is held against, and the rows that come of it.

    `prepare` runs once, before all pairs. With `folder`, all jobs get a folder of the case's own; with `server`, the
    `url` of a server of that name, which runs as long as the case. `most`: no more pairs than that.
    """

    figures: tuple[Figure, ...]
    ours: Job
    limit: Job | None = None
    prepare: Job | None = None
    folder: bool = False
    server: str | None = None
    most: int | None = None


class Row(Struct, frozen=True):
    """One row, as it is in the results."""

    case: str
    rate: float | None
    unit: str
    limit: float | None
    ratio: float | None
    least: float | None
    ok: bool


class Outcome(Struct, frozen=True):
    """The rows of one case, and why it could not be measured."""

    rows: tuple[Row, ...]
    error: str | None = None


SMALLEST_RISE = 0.1  # below it a difference is noise, and dividing by it says nothing


def run_case(case: Case, rounds: int, step: Callable[[], None], *, scale: float = 1.0) -> Outcome:
    """Measure a case in `rounds` pairs. `step` is called after each pair. A failure makes rows that are not ok."""
    rounds = rounds if case.most is None else min(rounds, case.most)
    with TemporaryDirectory(prefix="sluiceway-bench-") as folder, ExitStack() as stack:
        more: dict[str, Any] = {"scale": scale}
        if case.folder:
            more["folder"] = folder
        try:
            if case.server is not None:
                more["url"] = stack.enter_context(server(case.server, Path(folder)))
            pairs = _measure(case, rounds, step, more)
        except MeasureFailed as error:
            return Outcome(tuple(_failed(figure) for figure in case.figures), str(error))
    return Outcome(tuple(make_row(figure, pairs) for figure in case.figures))


def _measure(
    case: Case, rounds: int, step: Callable[[], None], more: dict[str, Any]
) -> list[tuple[dict[str, float] | None, dict[str, float]]]:
    if case.prepare is not None:
        measure(case.prepare, **more)
    pairs = []
    for _ in range(rounds):
        limit = measure(case.limit, **more) if case.limit is not None else None
        pairs.append((limit, measure(case.ours, **more)))
        step()
    return pairs


def make_row(figure: Figure, pairs: Sequence[tuple[dict[str, float] | None, dict[str, float]]]) -> Row:
    """The medians of the pairs: of ours, of the limit, and of the ratios of each pair."""
    ours = [pair[1][figure.key] for pair in pairs]
    limits = [pair[0][figure.key] for pair in pairs if pair[0] is not None]
    limit: float | None
    if figure.kind == "bound":
        ratios = [] if figure.bound is None else [figure.bound / max(one, 1e-9) for one in ours]
        rate, limit = median(ours), figure.bound
    elif figure.kind == "rise":
        rises = [one - base for one, base in zip(ours, limits, strict=True)]
        rate, limit = median(rises), figure.bound
        ratios = [(figure.bound or 0.0) / max(rise, SMALLEST_RISE) for rise in rises]
    else:
        rate, limit = median(ours), median(limits) if limits else None
        ratios = [one / base for one, base in zip(ours, limits, strict=False)]
    ratio = median(ratios) if ratios else None
    ok = figure.least is None or (ratio is not None and ratio >= figure.least)
    return Row(figure.case, rate, figure.unit, limit, ratio, figure.least, ok)


def _failed(figure: Figure) -> Row:
    return Row(figure.case, None, figure.unit, figure.bound, None, figure.least, ok=False)
