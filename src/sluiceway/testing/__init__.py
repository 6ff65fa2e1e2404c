"""For tests of what is built with Sluiceway."""

from __future__ import annotations

from .clock import Deadlock, VirtualClockLoop, external, run

__all__ = ["Deadlock", "VirtualClockLoop", "external", "run"]
