"""Between intake and processors when a consumer has `order_by`: one message of a key at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .._decisions.batching import Change
from .._decisions.lanes import Lanes
from .._decisions.window import Window
from ..message import QUEUED, Message, Routing, Settlement
from .batchers import Batchers
from .processors import Processors
from .settler import PipelineSettler


class LaneKeeper:
    """Starts what its lane lets start.

    A lane opens when its handler returned; after a failure when its message is settled, so that a retry is at the
    broker before anything behind it can come again; and after a timeout not before the handler has really ended.
    Messages of one key whose handlers returned are in one forming batch at a time: when the next one goes to another,
    the first is emitted, so that batches have an order. One lane holds at most half the window.
    """

    def __init__(self, processors: Processors, settler: PipelineSettler, window: Window, batchers: Batchers) -> None:
        self.arriving: Callable[[], Sequence[Message[Any]]] = _none  # received, and not put here yet
        self._lanes = Lanes()
        self._window = window
        self._processors = processors
        self._settler = settler
        self._batchers = batchers
        self._forming: dict[str, Routing] = {}  # per key, the forming batch that its messages are in
        settler.on_settlement = self._settling
        settler.on_ended = self._ended
        processors.on_finished = self._finished
        processors.on_abandoned = self._abandoned
        if batchers.by_name:
            batchers.take = self._join
            batchers.keep_order(emitted=self._emitted, abandoned=self._abandoned)

    @property
    def waiting(self) -> int:
        return self._lanes.waiting

    def put(self, messages: Sequence[Message[Any]]) -> None:
        start, back = self._lanes.enter(messages, max(1, self._window.size // 2))
        if start:
            self._processors.put_checked(start)
        self._park(back)

    put_checked = put  # what waits in a lane may have failed, so that is looked at whenever one starts

    def arrived(self, messages: Sequence[Message[Any]]) -> None:
        """These are about to be put. A lane that is shut now may be open then; they must not pass what goes back."""
        self._park(self._lanes.shut_out(messages))

    def take_waiting(self) -> list[Message[Any]]:
        """All that wait, and those that are about to come."""
        arriving = [message for message in self.arriving() if message.state == QUEUED]
        self._lanes.turn_back(arriving)
        return self._lanes.take_waiting() + arriving

    def _join(self, message: Message[Any], value: Any) -> Change | None:
        """Put a message whose handler returned into its batch. Raises what `Batchers.add` raises."""
        key = message.key
        if key is None:
            return self._batchers.add(message, value)
        if self._lanes.is_overtaken(message):
            self._settler.settle(Settlement(message, "park", counted=False))
            self._send_back_behind(message)  # what came since may be later ones
            return None
        routing = message.routing = self._batchers.route(message, value)
        place = routing._replace(flush=False)
        forming = self._forming.get(key)
        if forming is not None and forming != place:
            self._batchers.emit(forming)
        change = self._batchers.add(message, value)
        self._forming[key] = place
        return change

    def _emitted(self, messages: Sequence[Message[Any]]) -> None:
        for message in messages:
            if message.key is not None:
                self._forming.pop(message.key, None)

    def _finished(self, message: Message[Any]) -> None:
        self._start(self._lanes.returned(message, batched=bool(self._batchers.by_name)))

    def _ended(self, messages: Sequence[Message[Any]]) -> None:
        for message in messages:
            if message.key is not None:
                self._start(self._lanes.finish(message))

    def _start(self, following: Message[Any] | None) -> None:
        while following is not None:
            if following.state == QUEUED:
                self._processors.put_checked((following,))
                return
            following = self._lanes.finish(following)  # its lease was lost while it waited

    def _settling(self, settlement: Settlement) -> None:
        if settlement.outcome in ("retry", "release") and settlement.message.key is not None:
            self._send_back_behind(settlement.message)

    def _abandoned(self, message: Message[Any]) -> None:
        """Its handler runs on though its time is up: nothing of its key starts until it ended and is settled."""
        if message.key is not None:
            self._send_back_behind(message)

    def _send_back_behind(self, message: Message[Any]) -> None:
        behind = self._lanes.shut(message, entered=self._settler.spec.mode != "async")
        arriving = [one for one in self.arriving() if one.key == message.key and one.state == QUEUED]
        self._lanes.turn_back(arriving)
        batched = [one for one in behind if one.state != QUEUED]
        if batched:  # then all of its key that are in the forming batch are behind it
            self._forming.pop(message.key or "", None)
            self._batchers.drop(batched)
        self._park((*behind, *arriving))

    def _park(self, messages: Sequence[Message[Any]]) -> None:
        for message in messages:
            self._settler.settle(Settlement(message, "park", counted=False))


def _none() -> Sequence[Message[Any]]:
    return ()
