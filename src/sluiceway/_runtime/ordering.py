"""Between intake and processors when a consumer has `order_by`: one message of a key at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._decisions.lanes import Lanes
from .._decisions.window import Window
from ..message import QUEUED, Message, Settlement
from .processors import Processors
from .settler import PipelineSettler


class LaneKeeper:
    """Starts what its lane lets start.

    With batchers a lane opens when its message is settled, else when its handler returned; after a failure always when
    it is settled, so that a retry is at the broker before anything behind it can come again. One lane holds at most
    half the window.
    """

    def __init__(self, processors: Processors, settler: PipelineSettler, window: Window, *, batched: bool) -> None:
        self._lanes = Lanes()
        self._window = window
        self._processors = processors
        self._settler = settler
        settler.on_settlement = self._settling
        settler.on_ended = self._ended
        if not batched:
            processors.on_finished = self._finished

    @property
    def waiting(self) -> int:
        return self._lanes.waiting

    def put(self, messages: Sequence[Message[Any]]) -> None:
        start, back = self._lanes.enter(messages, max(1, self._window.size // 2))
        if start:
            self._processors.put(start)
        self._park(back)

    def take_waiting(self) -> list[Message[Any]]:
        return self._lanes.take_waiting()

    def _finished(self, message: Message[Any]) -> None:
        self._start(self._lanes.finish(message))

    def _ended(self, messages: Sequence[Message[Any]]) -> None:
        for message in messages:
            if message.key is not None:
                self._start(self._lanes.finish(message))

    def _start(self, following: Message[Any] | None) -> None:
        while following is not None:
            if following.state == QUEUED:
                self._processors.put((following,))
                return
            following = self._lanes.finish(following)  # its lease was lost while it waited

    def _settling(self, settlement: Settlement) -> None:
        if settlement.outcome in ("retry", "release") and settlement.message.key is not None:
            self._park(self._lanes.shut(settlement.message))

    def _park(self, messages: Sequence[Message[Any]]) -> None:
        for message in messages:
            self._settler.settle(Settlement(message, "park", counted=False))
