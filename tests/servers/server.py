"""What all servers that tests start have in common: a free loopback port, a start that waits, an end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

import pytest


def find(program: str, *elsewhere: str, package: str | None = None) -> str:
    """Where a server's program is. Missing, it skips the test, but in CI it fails: there the servers must be."""
    for name in (program, *elsewhere):
        found = shutil.which(name)
        if found is not None:
            return found
    missing(program, f"on Debian or Ubuntu: apt-get install {package or program}")


def missing(what: str, install: str) -> NoReturn:
    """A server's program is not there: skip the test and say how to install it, but fail in CI."""
    if os.environ.get("CI"):
        raise RuntimeError(f"{what} is not installed, and CI must have it")
    pytest.skip(f"{what} is not installed; {install}")


def free_port() -> int:
    """A loopback port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server(ABC):
    """One broker process. Its data lives in `folder`, so that it survives `stop` or `kill` and a new `start`.

    A child class says how it is started and when it is ready. The port stays the same over restarts.
    """

    ready_in = 30.0  # seconds after which a start has failed

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str]:
        """The command line that runs the server in the foreground."""

    @abstractmethod
    def url(self) -> str:
        """The URL for `App`."""

    def environment(self) -> Mapping[str, str]:
        """Variables that the server needs beside those of the tests."""
        return {}

    def is_ready(self) -> bool:
        """Whether it takes connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def start(self) -> Self:
        """Start it, and return when it is ready."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env={**os.environ, **self.environment()}, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + self.ready_in
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.command()[0]} did not start:\n{self.log()[-4000:]}")
            time.sleep(0.02)
        return self

    def log(self) -> str:
        """What the server has written."""
        return (self.folder / "server.log").read_text(errors="replace")

    def stop(self) -> None:
        """End it in good order; its data stays."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL it, with all that it started; its data stays."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it stand still, as a machine that swaps does."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def _end(self, number: signal.Signals) -> None:
        self._signal(number)
        self._signal(signal.SIGCONT)
        if self.process is not None:
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self.process.wait(20)
        self.process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
