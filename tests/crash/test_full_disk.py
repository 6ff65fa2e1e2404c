"""A full disk: publish says so, settling waits for room, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.actors import Job
from tests.crash.kit import Site, crash

SIZE = 6  # MiB

pytestmark = [
    *crash,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a small file system to fill"
    ),
]


class Disk:
    """A file system of a few MiB; what is not needed for the database is filled by a ballast."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Take every byte that is left."""
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)
        assert os.statvfs(self.folder).f_bavail == 0

    def make_room(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(site: Site) -> Iterator[Disk]:
    folder = site.folder / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    site.db = folder / "jobs.db"
    try:
        yield Disk(folder)
    finally:
        site.close()
        subprocess.run(["umount", str(folder)], check=True)


def test_publishing_to_a_full_disk_raises_publish_error_and_goes_on_when_there_is_room(site: Site, disk: Disk) -> None:
    book = site.book
    (disk.folder / "ballast").write_bytes(b"x" * (SIZE - 2) * 1024 * 1024)
    for chunk in (1, 20):
        first = max((one.n for one in book.all("offer")), default=-1000) + 1000
        publisher = site.publisher(first=first, chunk=chunk, padding=4_000)
        refused = len(book.all("refuse"))
        site.until("publish is refused", lambda refused=refused: len(book.all("refuse")) > refused)
        assert publisher.process.wait(10) == 0, "it was a PublishError"
        assert book.all("refuse")[-1].what == "FullError"
        assert set(site.stored()) == set(book.accepted().items()), "nothing of what was refused, all of what was not"
    before = len(book.accepted())
    disk.make_room()
    publisher = site.publisher(first=100_000, chunk=1, padding=4_000)
    site.until("publishing goes on", lambda: len(book.accepted()) > before + 20)
    assert site.end(publisher) == [0]
    assert set(site.stored()) == set(book.accepted().items())
    site.check_file()
    worker = site.worker()
    site.until("all is handled", lambda: site.waiting() == 0)
    assert site.end(worker) == [0]
    assert book.numbers("end") == book.accepted().keys()
    assert book.repeated().total() == 0
    site.tell(accepted=len(book.accepted()), refused=len(book.all("refuse")))


@pytest.mark.parametrize("fate", ["ok", "fail:1", "always"])
def test_a_worker_on_a_full_disk_is_blocked_and_goes_on_when_there_is_room(site: Site, disk: Disk, fate: str) -> None:
    gate = site.folder / "gate"
    count = 60
    site.load(Job(n, fate, "x" * 500) for n in range(count))
    worker = site.worker(concurrency=10, max_demand=20, gate=str(gate), attempts=2)
    site.until("it runs ten", lambda: len(site.book.all("start")) == 10)
    site.until("it holds twenty", lambda: site.rows("SELECT max(head) FROM queues")[0][0] >= 20)
    site.until("the log is empty", lambda: site.rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0)
    disk.fill()
    full = time.monotonic()
    gate.touch()
    site.until("it says that it is blocked", lambda: site.book.all("state:blocked"))
    blocked = time.monotonic() - full
    site.until("it has nothing more to do", lambda: len(site.book.all("end", "fail")) == 20)
    assert site.waiting() == count, "nothing was settled, and nothing is lost"
    assert worker.running
    disk.make_room()
    room = time.monotonic()
    site.until("it goes on", lambda: site.waiting() == 0)
    on = time.monotonic() - room
    since = site.book.all("state:blocked")[-1].at
    site.until("it says that it runs", lambda: site.book.all("state:running")[-1].at > since)
    assert site.end(worker) == [0]
    numbers = set(range(count))
    starts = len(site.book.all("start"))
    if fate == "always":
        assert site.dead().keys() == numbers
        assert {len(letters) for letters in site.dead().values()} == {1}
        assert starts == 2 * count
    else:
        assert site.book.numbers("end") == numbers
        assert site.dead() == {}
        assert starts == (count if fate == "ok" else 2 * count)
    site.check_file()
    site.tell(fate=fate, blocked_after=round(blocked, 3), done_after_there_was_room=round(on, 3))
