"""One cell of the matrix: one broker, one fault, and the counts at the end."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import Struct

from sluiceway import App
from sluiceway.source import Subscription

from .actors import WINDOW, key_of
from .broker import Broker
from .faults import Damage, Fault
from .site import Site, Stuck, opened

WARM = 50  # messages handled before the fault
RATE = 150.0  # messages/s: two workers can handle about 260
AFTER = 1.0  # seconds that messages still flow when all is well again
PATIENCE = 15.0  # seconds: the most that each step of a recovery may take


class Row(Struct, frozen=True, kw_only=True):
    """One row, as it is in the results.

    - `sent`: publishes that returned. `refused`: publishes that raised, and were tried again with the same id.
    - `handled`: messages whose handler came to its end. `deleted`: those that the fault deleted at the broker.
    - `lost`: sent, and neither handled nor deleted. `dead`: dead letters, which none should be. `left`: messages that
      still wait at the broker.
    - `repeated`: times that a handler was entered once more than its message was published. `at_most`: the windows of
      the processes that may have lost what they held, and what the broker forgot that it was done.
    - `overtaken`: messages that were begun before an earlier one of their key had ended; None where no order is kept.
    - `recovered`: seconds from the end of the fault to the end of a message that nobody had begun before; `caught_up`:
      until all that was sent before was handled. None: not within the time there was.
    - `log`: what Sluiceway's log said, warnings and errors, each once.
    - `error`: what did not happen in time, or did not take hold.
    """

    broker: str
    fault: str
    sent: int = 0
    refused: int = 0
    handled: int = 0
    deleted: int = 0
    lost: int = 0
    repeated: int = 0
    at_most: int = 0
    overtaken: int | None = None
    dead: int = 0
    left: int = 0
    recovered: float | None = None
    caught_up: float | None = None
    log: list[str] = []
    error: str | None = None

    @property
    def ok(self) -> bool:
        return (
            self.error is None
            and self.lost == self.dead == self.left == 0
            and self.repeated <= self.at_most
            and not self.overtaken
            and self.recovered is not None
        )


def run_cell(broker: Broker, fault: Fault, *, patience: float = PATIENCE, keep: Path | None = None) -> Row:
    """Run one cell; whatever goes wrong is in its row. Each step of the recovery may take `patience` seconds. With
    `keep` that folder gets the log and the ledger of a cell that failed. All that it started has ended when it returns.
    """
    rate = RATE * broker.workers / 2
    topic = f"jobs-{fault.name.replace(' ', '-')}-{time.time_ns() % 1_000_000}"
    damage, error = None, None
    counts = (0, 0)
    with TemporaryDirectory(prefix="sluiceway-chaos-") as folder:
        with opened(broker, Path(folder), topic, rate) as site:
            try:
                broker.start()
                site.start(broker.workers)
                site.until(f"{WARM} messages are handled", lambda: len(site.book.ended) >= WARM)
                site.mark()
                damage = fault.run(site)
                _recover(site, damage, patience)
                counts = _count(site)
                if counts[1]:  # what was handled and could not be acked waits here, and comes once more
                    site.start_worker()
                    deadline = time.monotonic() + patience + broker.rests
                    while (counts := _count(site))[1] and time.monotonic() < deadline:
                        site.wait(0.3)
                    site.end_workers()
            except Stuck as stuck:
                error = str(stuck)
            except Exception as other:  # the others of the matrix are still to come
                error = f"{type(other).__name__}: {other}"
            said = site.said()
        row = _row(broker, fault, site, damage, counts, said, error)
        if keep is not None and not row.ok:
            shutil.copytree(folder, keep / topic, dirs_exist_ok=True)
        return row


def _recover(site: Site, damage: Damage, patience: float) -> None:
    """From the end of the fault to the end of everything. Raises Stuck for what does not come."""
    site.until("something new is handled", lambda: site.book.new_since(damage.over) is not None, patience)
    site.wait(AFTER)
    site.end_publisher()
    site.until("all that was sent is handled", lambda: not _lost(site, damage), patience + site.broker.rests)
    site.end_workers()


def _lost(site: Site, damage: Damage | None) -> set[int]:
    """What was sent and is nowhere. What was published before a deletion is not lost but deleted."""
    missing = site.book.missing()
    deleted = None if damage is None else damage.deleted
    return missing if deleted is None else {n for n in missing if site.book.offered[n] > deleted}


def _count(site: Site) -> tuple[int, int]:
    """Dead letters, and what still waits at the broker."""

    async def count() -> tuple[int, int]:
        app = App(site.broker.url(site.broker.port))
        async with asyncio.timeout(PATIENCE), app:
            dead = [stored async for stored in app.transport.browse(f"{site.topic}.{app.group}.dead")]
            order = "key" if site.broker.ordered else None
            wanted = Subscription(topics=(site.topic,), group=app.group, window=1, order_by=order)
            source = await app.transport.subscribe(wanted)
            try:
                backlog = await source.backlog()
            finally:
                await source.aclose()
        return len(dead), 0 if backlog is None else backlog.messages

    return asyncio.run(count())


def _row(
    broker: Broker, fault: Fault, site: Site, damage: Damage | None, counts: tuple[int, int], said: list[str],
    error: str | None,
) -> Row:  # fmt: skip
    book = site.book
    lost = _lost(site, damage)
    recovered = caught_up = None
    if damage is not None:
        new, all_of_it = book.new_since(damage.over), book.caught_up(damage.over)
        recovered = None if new is None else round(new - damage.over, 2)
        if damage.deleted is None and not math.isinf(all_of_it):
            caught_up = round(max(0.0, all_of_it - damage.over), 2)
    return Row(
        broker=broker.name, fault=fault.name, sent=len(book.accepted), refused=book.refused.total(),
        handled=len(book.ended), deleted=len(book.missing() - lost), lost=len(lost), repeated=book.repeated(),
        at_most=0 if damage is None else WINDOW * damage.interruptions + damage.forgotten,
        dead=counts[0], left=counts[1], overtaken=book.overtaken(key_of) if broker.ordered else None,
        recovered=recovered, caught_up=caught_up, log=said, error=error,
    )  # fmt: skip
