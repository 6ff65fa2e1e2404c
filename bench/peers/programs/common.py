"""What all programs have in common: what they are told, the payload, and the clock. It needs nothing but Python.

A program is called as `program.py BROKER URL TOPIC COUNT [batch]`. It publishes COUNT messages through its library,
then takes them, and prints the messages/s from the first call of the handler to the last.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from typing import Any

BROKER, URL, TOPIC = sys.argv[1:4]
COUNT = int(sys.argv[4])
BATCH = sys.argv[5:] == ["batch"]
SIZE = 100  # messages per batch

ORDER: dict[str, Any] = {
    "id": "order-000000001", "customer": "customer-000001", "cents": 1_000_001, "currency": "USD",
    "lines": ["a-1", "b-2"], "note": "",
}  # fmt: skip
ORDER["note"] = "n" * (200 - len(json.dumps(ORDER, separators=(",", ":"))))

signal.alarm(60)  # whatever happened to the bench

_numbers = itertools.count()  # `next` of it is one step, on threads too
_total = _first = 0  # of batches
_began = 0.0


def seen() -> None:
    """Called by each handler; the last call ends the program."""
    global _began
    number = next(_numbers)
    if number == 0:
        _began = time.perf_counter()
    elif number == COUNT - 1:
        _finish(COUNT - 1)


def seen_batch(count: int) -> None:
    """The same for a batch handler."""
    global _began, _total, _first
    if _total == 0:
        _began, _first = time.perf_counter(), count
    _total += count
    if _total >= COUNT:
        _finish(COUNT - _first)


def _finish(count: int) -> None:
    rate = count / (time.perf_counter() - _began)
    os.write(1, f"\n{json.dumps({'rate': rate})}\n".encode())  # some libraries replace sys.stdout
    os._exit(0)
