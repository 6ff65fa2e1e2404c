"""Metrics for Prometheus: needs the extra `metrics`."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import accumulate
from math import inf
from threading import Lock
from time import perf_counter
from typing import Any

from ..batch import Batch, BatchHandler
from ..errors import OptionError
from ..message import Handler, Message
from . import ConsumerInfo
from ._ends import end_of

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
except ImportError as error:
    raise ImportError("metrics need prometheus_client: pip install 'sluiceway[metrics]'") from error

BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

LABELS = ("consumer", "group")

GAUGES = {
    "held": "Messages received and not settled.",
    "unstarted": "Messages that wait for a processor.",
    "running": "Messages in a handler.",
    "forming": "Messages in batches that are not full.",
    "unsettled": "Messages whose settlement is on its way to the broker.",
    "window": "The most messages that may be held.",
    "demand": "Messages that the source is asked for now.",
}
COUNTERS = {
    "received": "Messages received since the pipeline started.",
    "finished": "Deliveries that ended since the pipeline started.",
    "restarts": "Restarts of the pipeline after a crash.",
}


class Metrics:
    """How long handlers take, how they end, and how the pipelines are, for Prometheus to scrape.

    As middleware it measures what is further in, per message; as batch middleware, per batch. `registry` is where it
    registers; every name begins with `namespace`; `buckets` are the histograms' upper bounds, in seconds, ascending.
    One object serves any number of consumers and apps: names and groups of consumers are labels. Raises OptionError
    when the registry has these metrics already, or for wrong buckets.

    What a message adds is counted in plain lists, and put into Prometheus' form when somebody scrapes.
    """

    def __init__(
        self,
        registry: CollectorRegistry = REGISTRY,
        *,
        namespace: str = "sluiceway",
        buckets: Sequence[float] = BUCKETS,
    ) -> None:
        if not callable(getattr(registry, "register", None)):
            raise OptionError(f"Metrics: registry must be a CollectorRegistry; got {registry!r}")
        bounds = [float(bound) for bound in buckets if bound != inf]
        if not bounds or bounds != sorted(set(bounds)):
            raise OptionError(f"Metrics: buckets must be seconds, ascending; got {buckets!r}")
        self._bounds = bounds
        self._namespace = namespace
        self._messages: dict[tuple[str, ...], _Calls] = {}  # by consumer and group
        self._batches: dict[tuple[str, ...], _Calls] = {}  # by consumer, group and batcher
        self._stats: dict[tuple[str, str], Callable[[], Any]] = {}
        try:
            registry.register(self)
        except ValueError as error:
            raise OptionError(
                "Metrics: this registry has such metrics already; share one Metrics object between apps, or give it "
                f"another registry or namespace ({error})"
            ) from error

    def for_consumer(self, consumer: ConsumerInfo) -> Callable[[Any, Any], Awaitable[Any]]:
        names = (consumer.name, consumer.group)
        self._stats[names] = consumer.stats
        if consumer.batcher is None:
            return _Measured(self._messages.setdefault(names, _Calls(self._bounds)), self._bounds)
        batcher = (*names, consumer.batcher)
        return _measured_batches(self._batches.setdefault(batcher, _Calls(self._bounds)), self._bounds)

    def describe(self) -> list[Metric]:
        """The names, so that the registry refuses a second one with the same."""
        return [*self._calls(), *self._pipelines({})]

    def collect(self) -> Iterator[Metric]:
        """What there is now; the registry calls it, from any thread."""
        yield from self._calls()
        yield from self._pipelines({names: stats() for names, stats in list(self._stats.items())})

    def _calls(self) -> Iterator[Metric]:
        yield from self._measures(self._messages, "handler", "messages", LABELS)
        yield from self._measures(self._batches, "batch_handler", "batches", (*LABELS, "batcher"))

    def _measures(
        self, measured: dict[tuple[str, ...], _Calls], what: str, of: str, labels: tuple[str, ...]
    ) -> Iterator[Metric]:
        space = self._namespace
        seconds = HistogramMetricFamily(f"{space}_{what}_seconds", f"Seconds in the {what}, by call.", labels=labels)
        ends = CounterMetricFamily(
            f"{space}_{of}", f"How many {of} there were, by what became of them.", labels=(*labels, "outcome")
        )
        for names, calls in list(measured.items()):
            calls.fill(names, self._bounds, seconds, ends)
        yield seconds
        yield ends

    def _pipelines(self, found: dict[tuple[str, str], Any]) -> Iterator[Metric]:
        for kind, meanings in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, meaning in meanings.items():
                family = kind(f"{self._namespace}_pipeline_{name}", meaning, labels=LABELS)
                for names, stats in found.items():
                    if stats is not None:
                        family.add_metric(names, getattr(stats, name))
                yield family
        text = "1 for the state that the pipeline is in."
        state = GaugeMetricFamily(f"{self._namespace}_pipeline_state", text, labels=(*LABELS, "state"))
        for names, stats in found.items():
            if stats is not None:
                state.add_metric((*names, stats.state), 1)
        yield state


class _Calls:
    """The calls of one handler. Its loop writes; a scrape reads, from any thread.

    Good calls that are as short as the first bucket are counted in the middleware itself, in a third of the time, and
    asked for when somebody scrapes: `short` returns how many of them there were and their seconds.
    """

    __slots__ = ("_lock", "counts", "ends", "seconds", "short")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.counts = [0] * (len(bounds) + 1)  # by bucket
        self.seconds = 0.0
        self.ends: Counter[str] = Counter()  # of those that were not simply handled
        self.short: list[Callable[[], tuple[int, float]]] = []  # one for each start of the pipeline
        self._lock = Lock()

    def ended(self, bounds: list[float], seconds: float, error: BaseException | None) -> None:
        with self._lock:
            self.counts[bisect_left(bounds, seconds)] += 1
            self.seconds += seconds
            if error is not None:
                self.ends[end_of(error)] += 1

    def fill(
        self, names: tuple[str, ...], bounds: list[float], seconds: HistogramMetricFamily, ends: CounterMetricFamily
    ) -> None:
        counts, others, total = list(self.counts), dict(self.ends), self.seconds
        for count, short in [one() for one in self.short]:
            counts[0] += count
            total += short
        limits = [*map(repr, bounds), "+Inf"]
        seconds.add_metric(names, list(zip(limits, accumulate(counts), strict=True)), total)
        for end, count in {"handled": sum(counts) - sum(others.values()), **others}.items():
            ends.add_metric((*names, end), count)


class _Measured:
    """The middleware of one consumer."""

    def __init__(self, calls: _Calls, bounds: list[float]) -> None:
        self._calls = calls
        self._bounds = bounds

    async def __call__(self, message: Message[Any], call_next: Handler) -> Any:
        started = perf_counter()
        error: BaseException | None = None
        try:
            value = await call_next(message)
            error = message.error
            return value
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._calls.ended(self._bounds, perf_counter() - started, error)

    def around(self, call_next: Handler) -> Handler:
        calls, bounds, first, clock = self._calls, self._bounds, self._bounds[0], perf_counter
        count, total = 0, 0.0
        calls.short.append(lambda: (count, total))

        async def measured(message: Message[Any]) -> Any:
            nonlocal count, total
            started = clock()
            try:
                value = await call_next(message)
            except BaseException as error:
                calls.ended(bounds, clock() - started, error)
                raise
            seconds = clock() - started
            if seconds <= first and message.error is None:
                count += 1
                total += seconds
            else:
                calls.ended(bounds, seconds, message.error)
            return value

        return measured


def _measured_batches(calls: _Calls, bounds: list[float]) -> Callable[[Batch[Any], BatchHandler], Awaitable[Any]]:
    async def measured(batch: Batch[Any], call_next: BatchHandler) -> Any:
        started = perf_counter()
        error: BaseException | None = None
        try:
            return await call_next(batch)
        except BaseException as raised:
            error = raised
            raise
        finally:
            calls.ended(bounds, perf_counter() - started, error)

    return measured
