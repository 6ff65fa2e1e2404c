"""Opening what a pipeline receives from: one source or several, with their hook, and what transforms their events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ..source import Source, SourceInfo
from .flow import CLOSE_TIMEOUT, uncancelled
from .merged import MergedSource
from .spec import PipelineSpec
from .transformed import transformed

OpenSource = Callable[[SourceInfo], Awaitable[Source]]


async def open_sources(spec: PipelineSpec, open_source: OpenSource) -> Source:
    """What one run of a pipeline receives from. Raises what opening one of its sources raises; none is open then."""

    async def open_one(index: int) -> Source:
        return await _open(spec, open_source, index)

    if spec.sources == 1:
        return await open_one(0)
    opening = [asyncio.ensure_future(open_one(index)) for index in range(spec.sources)]
    try:
        return MergedSource(spec, await asyncio.gather(*opening), open_one)
    except BaseException:
        await uncancelled(_none_wanted(opening))
        raise


async def _open(spec: PipelineSpec, open_source: OpenSource, index: int) -> Source:
    info = SourceInfo(
        pipeline=spec.name,
        topics=spec.topics,
        group=spec.group,
        index=index,
        count=spec.sources,
        options=spec.options,
    )
    source = await open_source(info)
    prepare = getattr(source, "prepare_for_start", None)
    if prepare is not None:
        try:
            await prepare(info)
        except BaseException:
            await uncancelled(source.aclose())
            raise
    if spec.transform is None:
        return source
    return transformed(source, spec.transform, topic=spec.topics[0], encode=spec.encode)


async def not_wanted(opening: asyncio.Future[Source]) -> None:
    """Stop opening a source; close it if it opened nevertheless."""
    opening.cancel()
    await asyncio.wait((opening,), timeout=CLOSE_TIMEOUT)
    if opening.done() and not opening.cancelled() and opening.exception() is None:
        await opening.result().aclose()


async def _none_wanted(openings: Sequence[asyncio.Future[Source]]) -> None:
    await asyncio.gather(*map(not_wanted, openings), return_exceptions=True)
