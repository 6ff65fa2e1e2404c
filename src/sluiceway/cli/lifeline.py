"""The line between a worker and its parent: a socket that carries reports up; its end says that the parent died."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

from .exits import Fault

VARIABLE = "SLUICEWAY_WORKER"  # number:descriptor:echoed, set by the parent for its worker and removed by the worker


class Lifeline:
    """A worker's end of the line.

    When the parent dies `on_parent_gone` is called, on a thread, and `grace` seconds later the process ends, however
    busy its loop is. Before anything listens it ends at once: then nothing is in hand.
    """

    def __init__(self, number: int, line: socket.socket, *, echoed: bool) -> None:
        self.number = number
        self.echoed = echoed  # the parent shows what this process writes, with its number before each line
        self.on_parent_gone: Callable[[], None] | None = None
        self.grace = 0.0
        self._line = line
        self._unsent = b""
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    @classmethod
    def from_environment(cls) -> Lifeline | None:
        """The line to this process's parent; None when it is no worker. What it starts itself does not inherit it."""
        text = os.environ.pop(VARIABLE, None)
        if text is None:
            return None
        try:
            number, descriptor, echoed = map(int, text.split(":"))
            line = socket.socket(fileno=descriptor)
        except (ValueError, OSError) as error:
            raise Fault(
                f"{VARIABLE}={text!r} is set by `run --workers` for its workers, not by hand ({error})"
            ) from None
        line.set_inheritable(False)
        return cls(number, line, echoed=bool(echoed))

    def send(self, line: bytes, *, wait: bool = False) -> bool:
        """Send a report. Without `wait` it is skipped while the parent has not read the last ones: False."""
        try:
            if wait:
                self._line.sendall(self._unsent + line)
                self._unsent = b""
                return True
            if self._unsent:
                self._unsent = self._unsent[self._line.send(self._unsent, socket.MSG_DONTWAIT) :]
            if self._unsent:
                return False
            self._unsent = line[self._line.send(line, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return False
        except OSError:  # the parent is gone, and the watching thread knows
            return False
        return True

    def _watch(self) -> None:
        try:
            while self._line.recv(1024):
                pass
        except OSError:  # reset by a parent that was killed: the same as its end
            pass
        if self.on_parent_gone is not None:
            self.on_parent_gone()
            time.sleep(self.grace)
        os._exit(1)
