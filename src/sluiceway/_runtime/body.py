"""The body of an `async with` under which pipelines run: it is cut off when they have failed."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class Body:
    """A context whose task `cut_off` cancels. The cancellation ends with the context; whoever entered it says why.

    It is as with asyncio.timeout: a cancellation from elsewhere goes on outside, also when both came; a body that
    swallows its cancellation is not cancelled again; and a body that raises something else raises that.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._before = 0  # cancellations that the task had when it entered
        self._cut = False

    def cut_off(self) -> None:
        """Cancel the task that is inside. Idempotent; before the body and after it, it does nothing."""
        if self._task is not None and not self._cut:
            self._cut = True
            self._task.cancel()

    def __enter__(self) -> Self:
        task = self._task = asyncio.current_task()
        self._before = 0 if task is None else task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        if task is None or not self._cut:
            return False
        here = asyncio.current_task() is task  # a fixture may leave in another
        if not here:
            return False
        return task.uncancel() <= self._before and isinstance(error, asyncio.CancelledError)
