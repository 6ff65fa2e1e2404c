"""All batchers of a pipeline, by name: where processors put what they have handled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

from .._decisions.batching import Add, Change
from ..batch import Trigger
from ..errors import RoutingError
from ..message import DEFAULT_BATCHER, Message, Routing
from ..telemetry import Telemetry
from .batch_order import BatchOrder
from .batcher import Batcher
from .failures import Failures
from .settler import PipelineSettler
from .spec import PipelineSpec


class Batchers:
    """All batchers of a pipeline, by name."""

    def __init__(self, spec: PipelineSpec, settler: PipelineSettler, failures: Failures, hub: Telemetry) -> None:
        self.by_name = {name: Batcher(spec, batcher, settler, failures, hub) for name, batcher in spec.batchers.items()}
        self.name = spec.name
        self.take: Add = self.add  # what processors call; lanes put themselves before it

    def add(self, message: Message[Any], value: Any) -> Change | None:
        """Take a message whose handler returned `value`; a change is to be handed to `changed`.

        Raises RoutingError, and what the user's `key` function raises.
        """
        name = DEFAULT_BATCHER if message.routing is None else message.routing.batcher
        return self._named(name).forming.add(message, value)

    def route(self, message: Message[Any], value: Any) -> Routing:
        """Where `add` will put the message. Raises what `add` raises."""
        name, key, flush = message.routing or Routing()
        batcher = self._named(name).batcher
        if key is None and batcher.key is not None:
            key = batcher.key(value)
        hash(key)
        return Routing(name, key, flush)

    def _named(self, name: str) -> Batcher:
        batcher = self.by_name.get(name)
        if batcher is None:
            known = ", ".join(map(repr, self.by_name))
            raise RoutingError(f"{self.name}: there is no batcher {name!r}; its batchers: {known}")
        return batcher

    def adder(self) -> Add | None:
        """What a processor calls with a message whose handler returned; None without batchers."""
        return self.take if self.by_name else None

    def plain(self) -> tuple[list[Message[Any]], int]:
        """A batch that a processor may append to by itself, which saves a call per message: while it is neither empty
        nor has as many messages as are told here, and for what nobody routed."""
        if self.take != self.add or list(self.by_name) != [DEFAULT_BATCHER]:
            return [], 0
        return self.by_name[DEFAULT_BATCHER].forming.plain()

    def keep_order(
        self, *, emitted: Callable[[Sequence[Message[Any]]], None], abandoned: Callable[[Message[Any]], None]
    ) -> None:
        """Run batches that share an ordering key one at a time; see BatchOrder for what is called when."""
        order = BatchOrder(emitted, abandoned, self._start_all)
        for batcher in self.by_name.values():
            batcher.order = order

    def _start_all(self) -> None:
        for batcher in self.by_name.values():
            batcher.start()

    def emit(self, place: Routing) -> None:
        """Emit the forming batch of this batcher and key, if there is one."""
        self.by_name[place.batcher].emit(place.key)

    def drop(self, messages: Sequence[Message[Any]]) -> None:
        """Take messages out of batches that have not run: they go back to the broker."""
        gone = set(messages)
        for batcher in self.by_name.values():
            batcher.drop(gone)
        self._start_all()  # what waited for them has its turn

    def on_exhausted(self, call: Callable[[], None]) -> None:
        for batcher in self.by_name.values():
            batcher.on_exhausted = call

    def changed(self, message: Message[Any], change: Change) -> None:
        name = DEFAULT_BATCHER if message.routing is None else message.routing.batcher
        self.by_name[name].changed(change)

    @property
    def busy(self) -> bool:
        return any(batcher.busy for batcher in self.by_name.values())

    @property
    def forming(self) -> int:
        """How many messages wait in batches that are not full."""
        return sum(batcher.forming.count for batcher in self.by_name.values())

    @property
    def emitted(self) -> int:
        """How many messages wait in batches for a batch processor."""
        # A copy, made in one step: a thread that scrapes metrics may ask while the loop changes the queue.
        return sum(len(messages) for batcher in self.by_name.values() for messages, _ in batcher.queue.copy())

    def emit_all(self, trigger: Trigger) -> None:
        for batcher in self.by_name.values():
            batcher.emit_all(trigger)

    def emit_oldest(self) -> None:
        """Emit the oldest forming batch of all batchers."""
        if self.by_name:
            min(self.by_name.values(), key=lambda batcher: batcher.forming.oldest_due()).emit_oldest()

    def on_idle(self, call: Callable[[], None]) -> None:
        for batcher in self.by_name.values():
            batcher.on_idle = call

    def on_crash(self, call: Callable[[BaseException], None]) -> None:
        for batcher in self.by_name.values():
            batcher.on_crash = call

    def cancel(self) -> int:
        return sum(batcher.cancel() for batcher in self.by_name.values())

    def take_unstarted(self) -> list[Message[Any]]:
        return [message for batcher in self.by_name.values() for message in batcher.take_unstarted()]

    def close(self) -> Collection[asyncio.Task[None]]:
        """Cancel all; returns what has yet to end."""
        return [task for batcher in self.by_name.values() for task in batcher.close()]
