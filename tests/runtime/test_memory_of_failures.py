"""What failed is given back as soon as it is settled, and does not wait for the garbage collector."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from sluiceway import App, Batch, Message, Retry
from sluiceway.transports.memory import MemoryTransport

pytestmark = pytest.mark.virtual_time


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """It counts objects and not their bytes, so it would let large bodies pile up."""
    gc.collect()
    gc.disable()
    logging.disable(logging.CRITICAL)  # pytest keeps log records, and with them the tracebacks
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


@pytest.mark.parametrize("way", ["async", "thread", "batch"])
@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_message_that_failed_is_freed_when_it_is_settled(way: str, attempts: int) -> None:
    app = App(MemoryTransport())
    seen: list[weakref.ref[Message[Any]]] = []
    options: Any = {"retry": Retry(attempts=attempts, base_delay=0.01), "exhausted": "drop"}

    def fail(message: Message[bytes]) -> None:
        seen.append(weakref.ref(message))
        raise ValueError("no")

    if way == "thread":
        app.consumer("t", **options)(fail)
    else:

        @app.consumer("t", **options)
        async def consume(message: Message[bytes]) -> None:
            if way == "async":
                fail(message)
            seen.append(weakref.ref(message))

        if way == "batch":

            @consume.batch(size=5, timeout=0.01)
            async def together(batch: Batch[None]) -> None:
                raise ValueError("no")

    async with app.running() as manager:
        await app.publish_many("t", [b"x"] * 300)
        await manager.idle(0.1)
        assert len(seen) == 300 * attempts
        alive = sum(one() is not None for one in seen)
        assert alive <= 100  # what each of ten processors ran last, and what was settled together last
