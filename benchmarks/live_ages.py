"""How old events were when the changelog was told of them: read from the topics afterwards, without asking the worker.

A partition's marker in the changelog says up to which source offset all is in the store; its record's time is taken
after that commit and before the brokers' acknowledgement. An event's age is the time of the first marker that covers
it less the time of the event's own record.

Symbols: N events, M markers.
"""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from benchmarks.live_stage import PARTITIONS, Scene
from state.codec import Progress
from state.keys import PROGRESS_KEY
from streams.kafka.chunk import Chunk
from streams.live.topic_reader import TopicReader

Ages = NDArray[np.float64]


def told_ages(scene: Scene, after_ms: float) -> Ages:
    """(N,) seconds, of the events whose records are of ``after_ms`` (milliseconds since 1970) or later."""
    return asyncio.run(_told_ages(scene, after_ms))


async def _told_ages(scene: Scene, after_ms: float) -> Ages:
    options = scene.connection.aiokafka()
    source = TopicReader(scene.topic, options)
    changelog = TopicReader(scene.settings.stream.topics.changelog, options)
    found = []
    for partition in range(PARTITIONS):
        events, markers = await _whole(source, partition), _markers(await _whole(changelog, partition))
        offset, time_ms = (np.concatenate([getattr(c, name) for c in events]) for name in ("offset", "timestamp_ms"))
        counted = time_ms >= after_ms
        found.append(ages(offset[counted], time_ms[counted], *markers))
    return np.concatenate(found)


def ages(
    offset: NDArray[np.int64], time_ms: NDArray[np.int64], covered: NDArray[np.int64], told_ms: NDArray[np.int64]
) -> Ages:
    """(N,) seconds.

    Args:
        offset: (N,) of the events.
        time_ms: (N,) of their records.
        covered: (M,) the last offset that each marker covers; rising.
        told_ms: (M,) of the markers' records.

    Raises:
        ValueError: no marker covers the last event.
    """
    first = np.searchsorted(covered, offset)
    if len(offset) and (not len(covered) or first.max() == len(covered)):
        raise ValueError(f"the changelog's last marker does not cover offset {offset.max()}")
    aged: Ages = (told_ms[first] - time_ms) / 1e3
    return aged


def _markers(chunks: list[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    found = [
        (Progress.decode(value).offset, int(chunk.timestamp_ms[k]))
        for chunk in chunks
        for k in np.flatnonzero(chunk.key_length == len(PROGRESS_KEY)).tolist()
        if chunk.key(k) == PROGRESS_KEY and (value := chunk.value(k)) is not None
    ]
    covered, told_ms = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return covered, told_ms


async def _whole(reader: TopicReader, partition: int) -> list[Chunk]:
    loop, span = asyncio.get_running_loop(), await reader.span(partition)
    return await asyncio.to_thread(
        lambda: list(reader.chunks(partition, span.start, span.end, loop, lambda: False))
    )  # fmt: skip
