"""The clock of gates: the running loop's."""

from __future__ import annotations

import asyncio
import time


def loop_time() -> float:
    """Seconds on the running loop's clock; outside of one on the clock that asyncio's loops have."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()
