"""No deadlines: these tests count examples, not milliseconds, and the machine that runs them may be busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("sluiceway", deadline=None, max_examples=60)
settings.load_profile("sluiceway")
