"""State directories as a run leaves them: rows in RocksDB, the model beside them, and snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.serving import ServingModel
from state.reading.model_view import write_model_view
from state.store import RocksUserStore
from streams.processor import Processor
from streams.replay import rocks_stores

RING = 8
DAY_MS = 86_400_000
START_MS = 1_600_000_000_000


@contextmanager
def running(
    directory: Path, model: ServingModel, *, ring: int = RING, expire_after_days: float | None = None
) -> Iterator[Processor]:
    """A processor on the directory, as a run has it open."""
    settings = StateSettings(ring=ring, expire_after_days=expire_after_days)
    with Processor(model, rocks_stores(directory, settings), settings) as processor:
        write_model_view(directory, model, processor.layout, expire_after_days)
        yield processor
        write_model_view(directory, model, processor.layout, expire_after_days)


def left_behind(directory: Path, model: ServingModel, stream: Interactions, *, ring: int = RING) -> Path:
    """The directory after a run over the stream."""
    with running(directory, model, ring=ring) as processor:
        processor.process(0, stream)
    return directory


def take_snapshot(processor: Processor, directory: Path, partition: int = 0) -> None:
    """What a query needs of a snapshot: the partition's files and a manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    store = processor.store(partition)
    assert isinstance(store, RocksUserStore)
    store.checkpoint(directory / f"partition-{partition}")
    (directory / "snapshot.json").write_text("{}")


def visits(user: str, events: int, *, first_offset: int = 0, step: int = 10, start_ms: int = START_MS) -> Interactions:
    """One user's events over the items i0 … i11, an hour apart, at every ``step``-th offset; labels by a fixed draw."""
    rng = np.random.default_rng(events + first_offset)
    return Interactions.from_columns(
        [user] * events,
        [f"i{k}" for k in rng.integers(0, 12, events)],
        rng.integers(0, 2, events).astype(np.int8),
        start_ms + 3_600_000 * np.arange(events),
        offsets=first_offset + step * np.arange(events),
    )
