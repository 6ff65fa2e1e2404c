"""What the built-in middlewares ask of their arguments."""

from __future__ import annotations

import sys
from typing import Any


def is_seconds(value: Any) -> bool:
    """Whether it is a number of seconds, more than 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


def is_count(value: Any) -> bool:
    """Whether it is a whole number, 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
