"""For tests of what is built with Sluiceway."""

from __future__ import annotations

from .calls import Result, test_batch, test_message
from .clock import Deadlock, VirtualClockLoop, external, run
from .faults import Fault, Faults, FaultyTransport
from .harness import Harness, running
from .record import Delivery

__all__ = [
    "Deadlock",
    "Delivery",
    "Fault",
    "Faults",
    "FaultyTransport",
    "Harness",
    "Result",
    "VirtualClockLoop",
    "external",
    "run",
    "running",
    "test_batch",
    "test_message",
]
