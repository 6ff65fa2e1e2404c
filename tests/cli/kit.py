"""Running the command line as users do: real processes in a folder of their own, awaited by what they say."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sluiceway

SOON = 20.0  # seconds after which what should come is said to be missing
SOURCES = str(Path(sluiceway.__file__).resolve().parents[1])

SHOP = """
import asyncio
from sluiceway import App, Message, Reject, Retry

app = App("sqlite:///shop.db", group="shop", shutdown_timeout={shutdown})


@app.consumer("payments.created", concurrency=4, retry=Retry(attempts=2, base_delay=0.01))
async def payments(message: Message[int]) -> None:
    if message.payload < 0:
        raise Reject("negative amount")
    if message.payload == 13:
        raise ValueError("unlucky")
    with open("handled.txt", "a") as file:
        print(message.payload, file=file)
    await asyncio.sleep({sleep})
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICEWAY")}
    path = os.pathsep.join(filter(None, (SOURCES, os.environ.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, **more}


class Shell:
    """A folder, and the command in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Running] = []

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def shop(self, *, sleep: float = 0.0, shutdown: float = 25.0) -> None:
        """An app of one consumer that writes down what it handled."""
        self.write("shop.py", SHOP.format(sleep=sleep, shutdown=shutdown))

    def handled(self) -> list[int]:
        file = self.folder / "handled.txt"
        return sorted(map(int, file.read_text().split())) if file.exists() else []

    def __call__(self, *arguments: str, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. Without `stdin` there is nothing to read and no terminal."""
        return subprocess.run(
            [sys.executable, "-m", "sluiceway", *arguments],
            cwd=self.folder, env=environment(**env), capture_output=True, text=True, timeout=60, check=False,
            **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),  # type: ignore[arg-type]
        )  # fmt: skip

    def start(self, *arguments: str, **env: str) -> Running:
        """Start a command that goes on; `--json` events are read from it."""
        running = Running(self.folder, arguments, env)
        self.started.append(running)
        return running

    def close(self) -> None:
        for one in self.started:
            one.close()


class Running:
    """A command that runs."""

    def __init__(self, folder: Path, arguments: tuple[str, ...], env: dict[str, str]) -> None:
        self.events: list[dict[str, Any]] = []
        self.errors = (folder / f"stderr-{time.monotonic_ns()}.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sluiceway", *arguments],
            cwd=folder, env=environment(**env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors,
            text=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, kind: str, wanted: Callable[[dict[str, Any]], bool] = lambda event: True) -> dict[str, Any]:
        """The next event of a kind that is wanted. Fails with what the process said instead."""
        deadline = time.monotonic() + SOON
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {kind} event within {SOON} s; {self.said()}") from None
            if line is None:
                raise AssertionError(f"ended without a {kind} event; {self.said()}")
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            if event["event"] == kind and wanted(event):
                return event

    def said(self) -> str:
        self.errors.flush()
        return f"events: {self.events}\nstandard error:\n{Path(self.errors.name).read_text()}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(SOON)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()


def total(event: dict[str, Any], count: str) -> int:
    """A count over all consumers of a status event."""
    return sum(one[count] for one in event["consumers"])


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until something holds that no event tells of."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON} s: {what}"
        threading.Event().wait(0.02)
