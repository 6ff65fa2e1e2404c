"""The demo: a publisher, two workers, a SIGKILL half-way, and an audit that counts what came of it."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import time
from collections import deque
from pathlib import Path
from urllib.parse import quote

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.flights.audit import Figures, audit, expect, load_dead, load_source
from examples.flights.board import Board
from examples.flights.chart import draw_delays, draw_throughput
from examples.flights.children import Broken, Child, Children
from examples.flights.page import write_page
from examples.flights.publish import ROWS, TOPIC
from examples.flights.warehouse import read
from sluiceway import App
from sluiceway.message import Stored

HERE = Path(__file__).resolve().parent
SOME = 150_000
RATE = 8_000.0
DEAD = f"{TOPIC}.default.dead"
STALLED = 60.0  # seconds without progress after which the demo gives up
WORKER = ("-m", "sluiceway", "run", "examples.flights.app:app", "--log-level", "warning")


class Watch:
    """What can be seen of the run from outside: the workers' journals and the dead letters at the broker."""

    def __init__(self, app: App, warehouse: Path) -> None:
        self._app = app
        self._warehouse = warehouse
        self._read: dict[Path, int] = {}
        self._times: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self.written = 0
        self.batches = 0
        self.dead: list[Stored] = []

    @property
    def handled(self) -> int:
        """Rows on disk, repeated ones twice, and dead letters."""
        return self.written + len(self.dead)

    @property
    def rate(self) -> float:
        """Messages a second over the last three seconds."""
        (since, before), (now, handled) = self._times[0], self._times[-1]
        return (handled - before) / (now - since) if now > since else 0.0

    async def look(self) -> None:
        """See what is new."""
        for journal in self._warehouse.glob("*.jsonl"):
            with journal.open("rb") as file:
                file.seek(self._read.get(journal, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[journal] = self._read.get(journal, 0) + len(whole)
            for line in whole.splitlines():
                self.written += msgspec.json.decode(line)["rows"]
                self.batches += 1
        async for letter in self._app.transport.browse(DEAD, after=self.dead[-1].position if self.dead else None):
            self.dead.append(letter)
        self._times.append((time.monotonic(), self.handled))
        while self._times[-1][0] - self._times[0][0] > 3.0:
            self._times.popleft()

    async def left(self) -> int:
        """How many messages the broker still has, waiting or in a worker's hand."""
        return sum([1 async for _ in self._app.transport.browse(TOPIC)])


class Demo:
    """One run."""

    def __init__(self, rows: int, rate: float, out: Path, console: Console) -> None:
        self.rows = rows
        self.rate = rate
        self.out = out
        self.run_folder = out / "run"
        self.warehouse = self.run_folder / "warehouse"
        self.console = console
        self.published = 0
        self.killed_at = 0.0
        self.killed_pid = 0

    async def run(self) -> Figures:
        """Run to the end and audit it. Raises Broken when the run cannot go on."""
        self._prepare()
        broker = f"sqlite:///{quote(str(self.run_folder / 'broker.db'))}"
        children = Children(self.run_folder, {"FLIGHTS_BROKER": broker, "FLIGHTS_WAREHOUSE": str(self.warehouse)})
        async with App(broker) as app:
            watch = Watch(app, self.warehouse)
            with Board(self.console, self.rows) as board:
                try:
                    await self._move(children, watch, board)
                finally:
                    await children.end()
            await watch.look()
            return await asyncio.to_thread(self._audit, watch, await watch.left())

    def _prepare(self) -> None:
        """Away with the run before this one."""
        try:
            if self.run_folder.exists():
                shutil.rmtree(self.run_folder)
            self.warehouse.mkdir(parents=True)
        except OSError as error:
            raise Broken(f"cannot use the folder {self.run_folder} (--out names another): {error}") from error

    async def _move(self, children: Children, watch: Watch, board: Board) -> None:
        """Publish, handle, kill a worker half-way, go on, and stop when everything is handled."""
        workers = [await children.start(f"worker {number}", *WORKER) for number in (1, 2)]
        arguments = ("-m", "examples.flights.publish", "--rows", str(self.rows), "--rate", str(self.rate))
        publisher = await children.start("publisher", *arguments, pipe=True)
        publisher.may_end = True
        board.say(
            f"a publisher (process {publisher.pid}) and two workers ({workers[0].pid}, {workers[1].pid}) have started"
        )
        counting = asyncio.create_task(self._count(publisher))
        seen, seen_at = 0, time.monotonic()
        while True:
            await asyncio.sleep(0.1)
            await watch.look()
            children.check()
            board.show(self.published, watch.handled, watch.batches, len(watch.dead), watch.rate)
            if not self.killed_at and watch.handled >= self.rows // 2:
                workers[0] = await self._kill(workers[0], children, board)
            if counting.done() and publisher.ended and watch.handled >= self.published and not await watch.left():
                break
            if watch.handled > seen:
                seen, seen_at = watch.handled, time.monotonic()
            elif time.monotonic() - seen_at > STALLED:
                raise Broken(f"nothing was handled for {STALLED:g} s, at {seen:,} messages; logs: {self.run_folder}")
        board.say("everything is handled; SIGTERM lets the workers drain")
        await children.drain(*workers)

    async def _kill(self, worker: Child, children: Children, board: Board) -> Child:
        """SIGKILL a worker, and start one that takes its place."""
        self.killed_at, self.killed_pid = time.time(), worker.pid
        await children.kill(worker)
        board.say(f"[bold red]SIGKILL[/] for {worker.name} (process {worker.pid}): no drain, no goodbye")
        another = await children.start("worker 3", *WORKER)
        board.say(f"{another.name} (process {another.pid}) takes its place")
        return another

    async def _count(self, publisher: Child) -> None:
        """The publisher says how many messages the broker has confirmed."""
        assert publisher.process.stdout is not None
        async for line in publisher.process.stdout:
            self.published = int(line)

    def _audit(self, watch: Watch, left: int) -> Figures:
        db = read(self.warehouse)
        try:
            load_dead(db, watch.dead)
            load_source(db, self.rows, self.run_folder / "flights.csv")
            expected = expect(self.rows)
            figures = audit(db, published=self.published, expected=expected, left=left, killed_at=self.killed_at)
            delays = draw_delays(db, self.out / "delays.png")
            throughput = draw_throughput(db, self.killed_at, self.killed_pid, self.out / "throughput.png")
            write_page(db, figures, delays, throughput, self.out / "flights.html")
        finally:
            db.close()
        return figures


def summary(figures: Figures) -> Table:
    """The figures for a terminal."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column(justify="left")
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")
    lost = f"[bold {'green' if not figures.lost else 'red'}]{figures.lost:,}[/]"
    for row in (
        ("published", f"{figures.published:,}", "rows of the CSV, as JSON messages"),
        ("handled", f"{figures.handled:,}", "each counted once"),
        ("batches", f"{figures.batches:,}", f"one transaction each; half hold {figures.batch_median:,} or more"),
        *(("dead-lettered", f"{count:,}", reason) for reason, count in figures.dead.items()),
        ("in the killed worker's hand", f"{figures.suspects:,}", "each was handled again, apart from the rest"),
        ("repeated after the kill", f"{figures.repeated:,}", "on disk before the kill, but not yet acked"),
        ("lost", lost, "every row of the CSV was looked for in the tables and the dead letters"),
        ("messages/s", f"{figures.rate:,.0f}", f"over {figures.seconds:.1f} s; {figures.busiest:,.0f} in the busiest"),
        ("latency p50, p99", f"{seconds(figures.p50)}, {seconds(figures.p99)}", "from publish to the batch on disk"),
        ("longest pause after the kill", seconds(figures.pause), "between two batches on disk, of any worker"),
        ("what it held went on after", seconds(figures.resumed), f"all made good after {seconds(figures.recovered)}"),
    ):
        table.add_row(*row)
    return table


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def main() -> int:
    """Run the demo. 0: every number is right; 1: one is wrong, or the run broke; 130: Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m examples.flights", description=__doc__)
    how_many = f"how many of the CSV's {ROWS} rows, spread evenly over the year (default: %(default)s)"
    parser.add_argument("--rows", type=int, default=SOME, help=how_many)
    parser.add_argument("--rate", type=float, default=RATE, help="messages published a second (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="where to leave it all (default: %(default)s)")
    options = parser.parse_args()
    if not 1 <= options.rows <= ROWS or options.rate <= 0:
        parser.error(f"--rows is 1 to {ROWS}, --rate more than 0")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    demo = Demo(options.rows, options.rate, options.out.resolve(), console)
    try:
        figures = asyncio.run(_until_asked(demo))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped; no process was left behind")
        return 130
    except Broken as broken:
        console.print(f"[bold red]the demo broke:[/] {escape(str(broken))}", highlight=False)
        return 1
    return report(figures, demo.out, console)


async def _until_asked(demo: Demo) -> Figures:
    """Run; SIGTERM ends it as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await demo.run()


def report(figures: Figures, out: Path, console: Console) -> int:
    """Print the summary; returns the exit code."""
    console.print()
    console.print(summary(figures))
    console.print()
    for check in figures.wrong:
        text = f"{check.name}: expected {check.expected}, found {check.found}"
        console.print(f"[bold red]wrong:[/] {escape(text)}", highlight=False)
    if figures.wrong:
        count = f"{len(figures.wrong)} of {len(figures.checks)} checks failed"
        console.print(f"[bold red]{count}[/]; data and logs: {out / 'run'}", highlight=False, soft_wrap=True)
        return 1
    console.print(f"all {len(figures.checks)} checks against the CSV are right", highlight=False)
    for path in (out / "flights.html", out / "delays.png"):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return 0
