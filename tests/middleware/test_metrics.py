"""The metrics middleware: what a scrape says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from sluiceway import App, Batch, Message, OptionError, Reject, Release, Retry, RetryLater
from sluiceway.middleware.metrics import COUNTERS, GAUGES, Metrics
from sluiceway.transports.memory import MemoryTransport
from tests.middleware.kit import ONCE, Shop

pytestmark = pytest.mark.virtual_time


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"consumer": "pay", "group": "shop", **labels})


async def test_messages_are_counted_by_what_became_of_them() -> None:
    registry = CollectorRegistry()
    shop = Shop(middleware=[Metrics(registry)])
    errors: dict[str, BaseException] = {
        "failed": ValueError("no"),
        "rejected": Reject(),
        "retry_later": RetryLater(1),
        "released": Release(),
    }

    @shop.app.consumer("t", retry=Retry(attempts=2))
    async def pay(message: Message[str]) -> None:
        if message.payload == "told":
            message.fail("no")
        elif message.attempt == 1 and (error := errors.pop(message.payload, None)) is not None:
            raise error

    await shop.run("fine", "fine", "failed", "rejected", "retry_later", "released", "told")
    counted = {
        end: value(registry, "sluiceway_messages_total", outcome=end)
        for end in ("handled", "failed", "rejected", "retry_later", "released")
    }
    # Those that were tried again count twice: once for each call.
    assert counted == {"handled": 2 + 3, "failed": 1 + 2, "rejected": 1, "retry_later": 1, "released": 1}
    assert value(registry, "sluiceway_handler_seconds_count") == sum(filter(None, counted.values()))


async def test_seconds_fall_into_buckets_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import sluiceway.middleware.metrics as module

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(module, "perf_counter", loop.time)  # the loop's clock: virtual here
    registry = CollectorRegistry()
    shop = Shop(middleware=[Metrics(registry, buckets=(0.5, 1, 2))])

    @shop.app.consumer("t", concurrency=1, retry=ONCE)
    async def pay(message: Message[float]) -> None:
        await asyncio.sleep(message.payload)
        if message.payload == 5:
            raise ValueError("too long")

    await shop.run(0.25, 0.25, 0.75, 1.5, 5)
    buckets = {le: value(registry, "sluiceway_handler_seconds_bucket", le=le) for le in ("0.5", "1.0", "2.0", "+Inf")}
    assert buckets == {"0.5": 2, "1.0": 3, "2.0": 4, "+Inf": 5}
    assert value(registry, "sluiceway_handler_seconds_sum") == pytest.approx(7.75)
    assert b"# TYPE sluiceway_handler_seconds histogram" in generate_latest(registry)


async def test_none_is_missed_or_counted_twice_when_threads_scrape_meanwhile() -> None:
    registry = CollectorRegistry()
    shop = Shop(middleware=[Metrics(registry)])
    done = threading.Event()
    seen: list[float] = []

    def scrape() -> None:
        while not done.is_set():
            seen.append(value(registry, "sluiceway_handler_seconds_count") or 0.0)

    @shop.app.consumer("t", retry=ONCE)
    async def pay(message: Message[int]) -> None:
        if message.payload % 1_000 == 0:
            raise ValueError("no")

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        await shop.run(*range(5_000))
    finally:
        done.set()
        scraper.join()
    assert value(registry, "sluiceway_handler_seconds_count") == 5_000
    assert value(registry, "sluiceway_messages_total", outcome="handled") == 4_995
    assert seen == sorted(seen)


async def test_batches_are_measured_by_batcher() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    shop = Shop(middleware=[metrics], batch_middleware=[metrics])

    @shop.app.consumer("t", retry=ONCE)
    async def pay(message: Message[str]) -> str:
        return message.payload

    @pay.batch(size=2)
    async def book(batch: Batch[str]) -> None:
        if "bad" in batch.values:
            raise ValueError("no")

    await shop.run("a", "b", "bad", "c")
    of = {"batcher": "default"}
    assert value(registry, "sluiceway_batches_total", outcome="handled", **of) == 1
    assert value(registry, "sluiceway_batches_total", outcome="failed", **of) == 1
    assert value(registry, "sluiceway_batch_handler_seconds_count", **of) == 2
    assert value(registry, "sluiceway_messages_total", outcome="handled") == 4


async def test_pipelines_are_shown_as_their_stats_are_now() -> None:
    registry = CollectorRegistry()
    shop = Shop(middleware=[Metrics(registry)])
    go = asyncio.Event()

    @shop.app.consumer("t", concurrency=2)
    async def pay(message: Message[int]) -> None:
        await go.wait()

    async with shop.app.running() as manager:
        await shop.app.publish_many("t", range(5))
        await asyncio.sleep(1)
        (stats,) = manager.stats()
        for name in GAUGES:
            assert value(registry, f"sluiceway_pipeline_{name}") == getattr(stats, name)
        assert value(registry, "sluiceway_pipeline_running") == 2
        assert value(registry, "sluiceway_pipeline_state", state="running") == 1
        go.set()
        await manager.idle()
    for name, count in {"received": 5, "finished": 5, "restarts": 0}.items():
        assert name in COUNTERS
        assert value(registry, f"sluiceway_pipeline_{name}_total") == count
    assert value(registry, "sluiceway_pipeline_state", state="stopped") == 1


async def test_one_object_serves_several_apps_and_each_registry_has_its_own() -> None:
    shared, alone = CollectorRegistry(), CollectorRegistry()
    metrics = Metrics(shared)
    apps = [App(MemoryTransport(), group=f"g{n}", middleware=[metrics]) for n in range(2)]
    apps[1].middleware = [metrics, Metrics(alone)]
    for app in apps:

        @app.consumer("t")
        async def pay(message: Message[int]) -> None: ...

        async with app.running() as manager:
            await app.publish("t", 1)
            await manager.idle()

    def handled(registry: CollectorRegistry, group: str) -> float | None:
        return value(registry, "sluiceway_messages_total", group=group, outcome="handled")

    assert (handled(shared, "g0"), handled(shared, "g1")) == (1, 1)
    assert (handled(alone, "g0"), handled(alone, "g1")) == (None, 1)


async def test_what_is_counted_goes_on_over_restarts_of_the_consumer() -> None:
    registry = CollectorRegistry()
    shop = Shop(middleware=[Metrics(registry)])

    @shop.app.consumer("t")
    async def pay(message: Message[int]) -> None: ...

    await shop.run(1)
    await shop.run(2)
    assert value(registry, "sluiceway_messages_total", outcome="handled") == 2


def test_a_second_one_in_a_registry_is_an_option_error_unless_it_has_other_names() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(OptionError, match="this registry has such metrics already; share one Metrics object"):
        Metrics(registry)
    Metrics(registry, namespace="other")


def test_what_is_no_registry_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="Metrics: registry must be a CollectorRegistry; got 'x'"):
        Metrics("x")  # type: ignore[arg-type]


@pytest.mark.parametrize("buckets", [(), (1, 1), (2, 1), (float("inf"),)])
def test_buckets_that_do_not_ascend_are_an_option_error(buckets: Any) -> None:
    with pytest.raises(OptionError, match="Metrics: buckets must be seconds, ascending"):
        Metrics(CollectorRegistry(), buckets=buckets)


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("metrics", "prometheus_client", "metrics"),
        ("tracing", "opentelemetry", "otel"),
        ("idempotency.redis", "redis.asyncio", "redis"),
    ],
)
def test_without_its_library_a_module_says_what_to_install(module: str, library: str, extra: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; import sluiceway.middleware.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert f"pip install 'sluiceway[{extra}]'" in done.stderr
