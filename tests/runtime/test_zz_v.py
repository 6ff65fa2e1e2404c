from __future__ import annotations
import asyncio, sys, threading, time
from typing import Any
import pytest
from sluiceway import *
from sluiceway import Pipeline, RateLimit, Message, PipelineFailed
from tests.runtime.recording import Broker, running, bodies, RecordingSource

@pytest.mark.virtual_time
async def test_ghost() -> None:
    limit = RateLimit(10, 1000)
    broker = Broker(*bodies(10))
    class Wrong(RecordingSource):
        async def receive(self, demand):
            await super().receive(demand)
            return ["not a message"]
    other = Broker()
    async def open_wrong():
        s = Wrong(other); other.sources.append(s); other.put("a"); return s
    async def h(m): ...
    wrong = Pipeline(open_wrong, h, gates=[limit], max_restarts=0)
    async with running(Pipeline(Broker().open, h, gates=[limit]), broker2 := Broker(), check=False) if False else running(Pipeline((b:=Broker()).open, h, gates=[limit]), b):
        with pytest.raises(PipelineFailed):
            await wrong.run()
        b.put(*bodies(5))
        await asyncio.sleep(1)
        assert len(b.acked) >= 5, b.acked

async def test_threads_look() -> None:
    """stats() from another thread while things run."""
    old = sys.getswitchinterval(); sys.setswitchinterval(1e-6)
    broker = Broker()
    async def h(m): m.to(key=int(m.body) % 50)
    async def batch(b): await asyncio.sleep(0)
    limit = RateLimit(2000, 0.02)
    p = Pipeline(broker.open, h, batch=batch, batch_size=5, batch_timeout=0.01, gates=[limit], max_restarts=0)
    errors = []; stop = False
    def look():
        while not stop:
            try: p.stats()
            except Exception as e: errors.append(e)
    threads = [threading.Thread(target=look) for _ in range(2)]
    try:
        async with running(p, broker, check=False):
            for t in threads: t.start()
            end = time.monotonic() + 8
            while time.monotonic() < end and not errors:
                broker.put(*bodies(500))
                await asyncio.sleep(0.01)
            stop = True
            for t in threads: t.join()
    finally:
        stop = True
        sys.setswitchinterval(old)
    assert limit._rate._window._count == sum(t.count for t in limit._rate._window._taken)
    assert not errors, errors[0].__class__.__name__ + str(errors[:1])
