"""What a broker of the matrix is: a server of its own, or a file, and the ways in which it can be harmed."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Self

from tests.servers.server import Server


class Broker:
    """One broker over all of its cells; each cell has a topic of its own. Used as a context manager.

    - `is_server`: it runs elsewhere, and is spoken to through proxies.
    - `rests`: seconds for which a message may rest at the broker that a process was interrupted with.
    - `forgets`: seconds of acks that are forgotten with a group that is deleted.
    - `hold`: seconds after which others get what a process holds that is no longer heard of.
    - `survives_kill`: the server itself comes back by itself after a SIGKILL.
    - `deletes`: what can be deleted under a pipeline, of `topic` and `group`.
    - `ordered`: messages of a key are handled in order, and the cell looks whether they are.
    - `workers`: how many processes handle its messages; 1 where a broker promises order within one process only.
    - `fills`, `locks_out`: whether it can be full, and whether its password can be changed while it runs.
    """

    name: str
    hold: float
    rests = 0.0
    forgets = 0.0
    is_server = True
    survives_kill = True
    deletes: frozenset[str] = frozenset()
    fills = False
    locks_out = False
    ordered = False
    workers = 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: Server | None = None

    def make_server(self) -> Server | None:
        """Its server, not yet started; None for a file."""
        return None

    @property
    def port(self) -> int | None:
        return None if self.server is None else self.server.port

    def url(self, port: int | None) -> str:
        """For `App`, through a proxy on `port`."""
        raise NotImplementedError

    def version(self) -> str:
        """Its name and version, as the page tells them."""
        raise NotImplementedError

    # -- its life

    def __enter__(self) -> Self:
        self.server = self.make_server()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.server.kill()

    def start(self) -> None:
        """Start the server unless it runs."""
        if self.server is not None and self.server.process is None:
            self.server.start()

    # -- its harms; those that it has not are never asked for

    def freeze(self, pid: int) -> None:
        """SIGSTOP a worker, at an instant at which it stops nobody else."""
        os.kill(pid, signal.SIGSTOP)

    def delete_topic(self, topic: str) -> int:
        """Delete the topic's stream or queues with what is in them; returns how many there were."""
        raise NotImplementedError

    def delete_group(self, topic: str) -> int:
        """Delete the group or consumer, not the messages; returns how many there were."""
        raise NotImplementedError

    def fill(self, topic: str) -> None:
        """Leave no room for what is published."""
        raise NotImplementedError

    def free(self, topic: str) -> None:
        """Undo `fill`."""
        raise NotImplementedError

    def lock_out(self) -> None:
        """Take no longer the password that the URL has."""
        raise NotImplementedError

    def let_in(self) -> None:
        """Undo `lock_out`."""
        raise NotImplementedError

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep all others from writing while the body runs."""
        raise NotImplementedError
