"""Topology: which stages a pipeline has, what they are called, and how many of each there are."""

from __future__ import annotations

from msgspec import Struct


class Stage(Struct, frozen=True, kw_only=True):
    """One stage: up to `concurrency` of it work side by side. `name` is how their tasks and threads are named."""

    name: str
    concurrency: int


class BatcherStage(Struct, frozen=True, kw_only=True):
    """One batcher, by its name among the consumer's, and its batch processors."""

    batcher: str
    batch_processors: Stage


class Topology(Struct, frozen=True, kw_only=True):
    """The stages of one pipeline, from its sources to its batch processors.

    `batchers` stand in the order in which they were declared; there are none where messages end with their handler.
    """

    pipeline: str
    topics: tuple[str, ...]
    group: str
    sources: Stage
    processors: Stage
    batchers: tuple[BatcherStage, ...] = ()
