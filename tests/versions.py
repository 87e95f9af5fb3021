"""Versions of a small model that differ in every parameter, and streams over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from configs.settings import StateSettings
from learner.features import FeatureEncoder, FeatureField
from learner.interactions import Interactions
from learner.serving import ServingModel
from learner.user_state import HeadKind, RowLayout
from state.histories import HistoryLimits
from state.memory_store import MemoryUserStore
from state.store import UserStore
from streams.processor import OpenStore, Processor
from streams.versions import Rebase, Serving
from tests.models import f32, random_stream, small_model

RING = 32
"""The least that histories need"""
PLENTY = HistoryLimits(1 << 30, 1 << 20)
GENRES = FeatureEncoder.fit((FeatureField("genre", "categorical"),), [("a",), ("b",)])


def version(number: int, kind: HeadKind = "full", *, second: bool = True) -> ServingModel:
    """Version ``number``, the same whenever it is asked for; items have a genre, so that unseen ones have rows."""
    base = small_model(kind, second=second, meta_version=number)
    rng = np.random.default_rng(number)
    drawn = {
        name: f32(getattr(base.fixed, name) + rng.normal(0, 0.2, getattr(base.fixed, name).shape))
        for name in ("item_embedding", "item_bias", "projection", "user_feature_weights")
    }
    genres = f32(rng.normal(size=(2, base.fixed.item_embedding.shape[1])))
    fixed = replace(base.fixed, **drawn, item_encoder=GENRES, item_feature_weights=genres)
    first = replace(base.first, initialization=f32(base.first.initialization + rng.normal(0, 0.3, base.first.dim)))
    second_filter = base.second and replace(base.second, covariance=f32(base.second.covariance * (1 + number / 4)))
    return ServingModel(fixed, first, second_filter, meta_version=number)


def stream_of(events: int, users: int, seed: int = 0) -> Interactions:
    """``random_stream`` whose items carry a genre."""
    stream = random_stream(events, users, seed)
    genres = tuple("ab"[int(item[1:]) % 2] for item in stream.item_ids)
    return replace(stream, item_features={"genre": genres})


@dataclass
class Kept:
    """Opens memory stores that stay readable after the processor."""

    stores: dict[int, MemoryUserStore] = field(default_factory=dict)

    def __call__(self, partition: int, layout: RowLayout) -> UserStore:
        store = self.stores.setdefault(partition, MemoryUserStore(layout))
        store.close = lambda: None  # type: ignore[method-assign]
        return store

    def rows(self, partition: int = 0) -> dict[bytes, bytes]:
        return {user: row.tobytes() for user, row in self.stores[partition].iterate()}


def processor(
    model: ServingModel,
    opened: OpenStore,
    *,
    limits: HistoryLimits | None = PLENTY,
    rebase: Rebase = "history",
    commit_events: int = 16384,
    ring: int = RING,
    expire_after_days: float | None = None,
) -> Processor:
    state = StateSettings(commit_events=commit_events, ring=ring, expire_after_days=expire_after_days)
    return Processor(model, opened, state, limits=limits, rebase=rebase)


def streamed(
    work: Processor, stream: Interactions, served: Mapping[int, Serving], cuts: Iterable[int] = (), *, start: int = 0
) -> np.ndarray:
    """The logits from event ``start`` on; at each place in ``served`` its versions begin to serve."""
    found = []
    places = sorted({start, *(place for place in (*served, *cuts) if place > start), len(stream)})
    for first, last in pairwise(places):
        if (serving := served.get(first)) is not None:
            work.serve(0, serving)
        found.append(work.process(0, stream.take(slice(first, last)).pruned()).logit)
    return np.concatenate(found)
