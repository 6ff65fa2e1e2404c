"""Where a run is shown: a terminal, a log, JSON lines, or a worker's parent."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Protocol, TextIO

from .events import ConsumerStatus, Event, Started, Status, Stopped, WorkerChanged, encode
from .lifeline import Lifeline
from .topology import ConsumerView
from .words import clean, duration, many

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

log = logging.getLogger("sluiceway")

LOG_INTERVAL = 30.0


class Screen(Protocol):
    """Shows what a run tells. `interval`: seconds between two status events that it wants."""

    interval: float
    owns_stdout: bool  # what handlers print must go elsewhere
    workers_write_themselves: bool  # what they print goes where ours does, not through `line`

    def show(self, event: Event) -> None:
        """Show an event now. Raises BrokenPipeError when nobody reads."""
        ...

    def line(self, worker: int, text: str) -> None:
        """Show a line that a worker wrote."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was. Idempotent."""
        ...


def first_lines(started: Started) -> list[str]:
    """The first screen: what runs where."""
    found = "" if started.how == "as named" else f" ({started.how})"
    file = "" if started.file is None else f" ({started.file})"
    where = f"{started.app}{found} on {started.broker}{file}, process {started.pid}"
    if started.workers:
        where += f", workers {', '.join(map(str, started.workers))}"
    return [where, *(line for one in started.consumers for line in consumer_lines(one))]


def consumer_lines(view: ConsumerView) -> list[str]:
    """A consumer in two or three lines."""
    lines = [
        f"{view.name}: {', '.join(view.topics)} → group {view.group}",
        f"  {view.concurrency} at once, as {view.runs_on}; {view.guarantees['failure']}",
    ]
    more = [f"batches {one}" for one in view.batchers]
    if view.order is not None:
        more.append(f"order: {view.guarantees['order']}")
    return lines + [f"  {one}" for one in more]


def last_line(stopped: Stopped) -> str:
    """How it went."""
    text = f"{many(stopped.handled, 'message')} handled in {duration(stopped.seconds)}"
    if stopped.failed:
        text += f", {many(stopped.failed, 'attempt')} failed"
    if stopped.retried:
        text += f", {stopped.retried:,} retried"
    if stopped.dead_lettered:
        text += f", {stopped.dead_lettered:,} dead-lettered"
    text += f"; drained in {duration(stopped.drain_seconds)}"
    if stopped.drain_released or stopped.cancelled:
        text += f": {stopped.drain_released:,} went back unstarted, {stopped.cancelled:,} were cut off"
    if stopped.unsettled:
        text += f", {stopped.unsettled:,} left to the broker, which gives them out again"
    return text


class JsonScreen:
    """One JSON object per line on standard output, for programs. What handlers print goes to standard error."""

    interval = 1.0
    owns_stdout = True
    workers_write_themselves = True

    def __init__(self) -> None:
        self._out = sys.stdout
        sys.stdout = sys.stderr

    def show(self, event: Event) -> None:
        self._out.write(encode(event).decode())
        self._out.flush()

    def line(self, worker: int, text: str) -> None:
        log.info("worker %d: %s", worker, text)

    def close(self) -> None:
        sys.stdout = self._out


class WireScreen:
    """The parent of this worker."""

    interval = 0.25
    owns_stdout = False
    workers_write_themselves = True

    def __init__(self, lifeline: Lifeline) -> None:
        self._lifeline = lifeline
        self._skipped = b""

    def show(self, event: Event) -> None:
        line = encode(event)
        if not isinstance(event, Status):
            self._lifeline.send(self._skipped + line, wait=True)
            self._skipped = b""
        else:
            self._skipped = b"" if self._lifeline.send(line) else line

    def line(self, worker: int, text: str) -> None:
        log.info("worker %d: %s", worker, text)

    def close(self) -> None:
        """Nothing to restore: the line ends with the process."""


class LogScreen:
    """Plain log lines: the first screen, a line now and then while something happens, and how it went."""

    interval = LOG_INTERVAL
    owns_stdout = False
    workers_write_themselves = True

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def show(self, event: Event) -> None:
        if isinstance(event, Started):
            for line in first_lines(event):
                log.info("%s", line)
        elif isinstance(event, Status):
            self._status(event)
        elif isinstance(event, Stopped):
            if event.reason is not None:
                log.log(logging.ERROR if event.code else logging.INFO, "%s", event.reason)
            if event.opened:
                log.info("%s", last_line(event))

    def _status(self, status: Status) -> None:
        for one in status.consumers:
            moved = one.handled + one.failed + one.dead_lettered
            if moved != self._last.get(one.consumer, 0) and one.state != "stopped":
                log.info("%s: %s", one.consumer, status_text(one))
            self._last[one.consumer] = moved

    def line(self, worker: int, text: str) -> None:
        log.info("worker %d: %s", worker, text)

    def close(self) -> None:
        """Nothing to restore."""


def status_text(one: ConsumerStatus) -> str:
    """One consumer's status in a line."""
    waiting = "" if one.waiting is None else f", {one.waiting:,} waiting"
    reason = f" ({one.reason})" if one.reason else ""
    counts = f"{one.handled:,} handled, {one.rate:,.0f}/s, {one.in_hand:,} in hand, {one.failed:,} failed"
    return f"{one.state}{reason}, {counts}{waiting}"


class TerminalScreen:
    """A terminal: the first screen, a status that moves, log lines above it, and how it went."""

    interval = 0.25
    owns_stdout = False
    workers_write_themselves = False

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self.console: Console = Console(file=stream, highlight=False)
        self._live: Live | None = None

    def show(self, event: Event) -> None:
        if isinstance(event, Started):
            self._first(event)
        elif isinstance(event, Status):
            if self._live is not None:
                self._live.update(_table(event), refresh=True)
        elif isinstance(event, WorkerChanged):
            return
        else:
            self._last(event)

    def line(self, worker: int, text: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble((f"worker {worker}│ ", "dim"), clean(text)), soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _first(self, started: Started) -> None:
        from rich.live import Live
        from rich.text import Text

        head, *lines = first_lines(started)
        self.console.print(Text(head, "bold"))
        for line in lines:
            self.console.print(Text(line), soft_wrap=True)
        self.console.print(Text("Ctrl-C drains and stops.", "dim"))
        self._live = Live(
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
        )
        self._live.start()

    def _last(self, stopped: Stopped) -> None:
        from rich.text import Text

        self.close()
        if stopped.reason is not None:
            style = "bold red" if stopped.code else ""
            self.console.print(Text(clean(stopped.reason), style), soft_wrap=True)
        if stopped.opened:
            self.console.print(Text(last_line(stopped)), soft_wrap=True)


def _table(status: Status) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(duration(status.seconds), no_wrap=True, overflow="ellipsis")
    table.add_column("state", overflow="ellipsis", no_wrap=True)
    for name in ("handled", "rate", "in hand", "failed", "waiting"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    for one in status.consumers:
        state = one.state if one.reason is None else f"{one.state}: {clean(one.reason)}"
        table.add_row(
            Text(one.consumer),
            Text(state, "" if one.state in ("running", "draining", "stopped") else "yellow"),
            f"{one.handled:,}",
            f"{one.rate:,.0f}/s",
            f"{one.in_hand:,}",
            Text(f"{one.failed:,}", "red" if one.failed else ""),
            "?" if one.waiting is None else f"{one.waiting:,}",
        )
    return table
