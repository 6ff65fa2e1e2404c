"""The processes of the demo: started, watched, killed, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Broken(Exception):
    """The demo cannot go on; the text says why."""


class Child:
    """One process. Its output is in `log`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.may_end = False

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None


class Children:
    """All processes of one run. `environment` is theirs beside our own."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self._logs = logs
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._environment = {**os.environ, **environment, "PYTHONPATH": path}
        self._all: list[Child] = []

    async def start(self, name: str, *arguments: str, pipe: bool = False) -> Child:
        """Run `python ARGUMENTS`; with `pipe` its standard output can be read."""
        log = self._logs / f"{name.replace(' ', '-')}.log"
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, env=self._environment, cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE if pipe else file, stderr=file,
            )  # fmt: skip
        child = Child(name, process, log)
        self._all.append(child)
        return child

    def check(self) -> None:
        """Raise Broken when a process ended that should run, or ended badly."""
        for child in self._all:
            code = child.process.returncode
            if code is not None and not (child.may_end and code in (0, -signal.SIGKILL)):
                raise Broken(
                    f"{child.name} (process {child.pid}) ended with {code}; the end of {child.log}:\n{tail(child.log)}"
                )

    async def kill(self, child: Child) -> None:
        """SIGKILL: no drain, no goodbye."""
        child.may_end = True
        child.process.kill()
        await child.process.wait()

    async def drain(self, *children: Child, seconds: float = 30.0) -> None:
        """SIGTERM, and wait until they have ended. Raises Broken when one does not, or not with 0."""
        for child in children:
            child.may_end = True
            child.process.terminate()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(child.process.wait() for child in children))
        except TimeoutError:
            names = ", ".join(f"{child.name} (process {child.pid})" for child in children if not child.ended)
            raise Broken(f"{names} did not end within {seconds:g} s of SIGTERM") from None
        self.check()

    async def end(self) -> None:
        """Whatever happened: leave no process behind."""
        running = [child for child in self._all if not child.ended]
        for child in running:
            child.process.terminate()
        try:
            async with asyncio.timeout(3.0):
                await asyncio.gather(*(child.process.wait() for child in running))
        except TimeoutError:
            for child in running:
                if not child.ended:
                    child.process.kill()
            await asyncio.gather(*(child.process.wait() for child in running))


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) or "(empty)"
