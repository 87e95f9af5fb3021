"""Streams that are made for the online stage: generated ones with a shift of tastes, flipped labels, other arrivals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from learner.features import Catalogue, FeatureField
from learner.histories import Histories, starts_of
from learner.interactions import NO_VALUE, Interactions
from learner.serving import ServingModel
from learner.user_state import NO_GRADE, item_hash, ring_item
from streams.generation.events import EventBatch, EventStream
from streams.generation.files import item_columns, user_columns
from streams.generation.population import (
    CATEGORIES,
    ITEM_FEATURE_SHARE,
    TAGS,
    Items,
    K,
)

BATCH_EVENTS = 65_536
Chosen = Callable[[Sequence[str]], NDArray[np.bool_]]
"""User ids -> which of them"""


def interactions(batch: EventBatch) -> Interactions:
    """A generated batch as the learner takes it; ids as in generated files."""
    users, user = np.unique(batch.user, return_inverse=True)
    items, item = np.unique(batch.item, return_inverse=True)
    return Interactions(
        tuple(f"u{n + 1}" for n in users.tolist()), tuple(f"i{n + 1}" for n in items.tolist()),
        user.astype(np.int32), item.astype(np.int32), batch.label, np.full(len(batch), NO_VALUE, np.float32),
        batch.event_time_ms, np.arange(len(batch)),
    )  # fmt: skip


def catalogues(stream: EventStream) -> tuple[Catalogue, Catalogue]:
    """Users' and items' features of a generated stream."""
    kinds = {"age": "categorical", "country": "categorical", "category": "categorical", "tags": "multi",
             "quality": "numeric"}  # fmt: skip
    return _catalogue(user_columns(stream.users), kinds), _catalogue(item_columns(stream.items), kinds)


def with_items(stream: EventStream, items: Items) -> EventStream:
    """The same stream with these items."""
    other = EventStream(stream.settings)
    other.items = items
    return other


def with_other_items(stream: EventStream, seed: int) -> EventStream:
    """The same users and times, but what they like in items is another: factors and biases are drawn anew.

    Ids, features and popularity stay; what a category or a tag says of the factors is drawn anew too.
    """
    rng, items = np.random.default_rng(seed), stream.items
    by_category, by_tag = rng.standard_normal((len(CATEGORIES), K)), rng.standard_normal((len(TAGS), K))
    tagged = items.tags @ by_tag / np.sqrt(items.tags.sum(axis=1, keepdims=True))
    told = (by_category[items.category] + tagged) / np.sqrt(2)
    own = rng.standard_normal(items.factors.shape)
    factors = np.sqrt(ITEM_FEATURE_SHARE) * told + np.sqrt(1 - ITEM_FEATURE_SHARE) * own
    return with_items(stream, replace(items, factors=factors, bias=rng.permutation(items.bias)))


def events_of(stream: EventStream, start: int = 0, stop: int | None = None) -> Interactions:
    """The events from ``start`` up to, not including, ``stop``."""
    return Interactions.concatenate(interactions(batch) for batch in stream.batches(start, stop))


def batches_of(events: Interactions) -> tuple[Interactions, ...]:
    """A stream of these events, in their order."""
    events = events.with_offsets(np.arange(len(events)))
    cuts = range(0, len(events), BATCH_EVENTS)
    return tuple(events.take(slice(first, first + BATCH_EVENTS)).pruned() for first in cuts)


def of_new_users(events: Interactions, past: Interactions) -> Interactions:
    """The events of users of whom the past knows nothing."""
    known = frozenset(past.user_ids)
    return of_users(events, lambda ids: np.fromiter((i not in known for i in ids), np.bool_, len(ids)))


def flipped(batches: Iterable[Interactions], chosen: Chosen) -> Iterator[Interactions]:
    """The labels of these users are the other way round."""
    for batch in batches:
        of = chosen(batch.user_ids)[batch.user]
        yield replace(batch, label=np.where(of, 1 - batch.label, batch.label).astype(np.int8))


def of_users(events: Interactions, chosen: Chosen) -> Interactions:
    """The events of these users alone."""
    return events.take(np.flatnonzero(chosen(events.user_ids)[events.user])).pruned()


def histories_of(events: Interactions, model: ServingModel) -> Histories:
    """Whole histories of the events' users, in the order of their ids; without grades."""
    order = np.argsort(events.user, kind="stable")
    hashes = np.fromiter((ring_item(item_hash(i)) for i in events.item_ids), np.uint64, len(events.item_ids))
    lengths = np.bincount(events.user, minlength=len(events.user_ids))
    return Histories(
        starts_of(lengths), hashes[events.item[order]], events.label[order],
        np.full(len(order), NO_GRADE, np.int32), np.zeros(len(lengths), np.int64),
        model.user_features(events.user_ids, {}),
    )  # fmt: skip


def write_movielens(directory: Path, published: Path, events: Interactions, time_s: NDArray[np.int64]) -> None:
    """MovieLens 1M with these ratings at these times, beside the users and films as they were published."""
    for name in ("users.dat", "movies.dat"):
        (directory / name).symlink_to((published / name).resolve())
    columns = zip(events.user.tolist(), events.item.tolist(), events.value.tolist(), time_s.tolist(), strict=True)
    with (directory / "ratings.dat").open("w", encoding="latin-1") as file:
        file.writelines(
            f"{events.user_ids[user]}::{events.item_ids[item]}::{value:.0f}::{time}\n"
            for user, item, value, time in columns
        )


def arrivals_by_rate(events: Interactions) -> NDArray[np.int64]:
    """(N,) times in seconds: users arrive in order of their share of likes, the highest first.

    The arrivals are those of the data, each now another user's; between a user's events pass the times that did.
    """
    time = events.event_time_ms // 1000
    users = len(events.user_ids)
    first = np.full(users, np.iinfo(np.int64).max)
    np.minimum.at(first, events.user, time)
    rate = np.bincount(events.user, events.label, users) / np.bincount(events.user, minlength=users)
    arrival = np.empty(users, np.int64)
    arrival[np.argsort(-rate, kind="stable")] = np.sort(first)
    moved: NDArray[np.int64] = time + (arrival - first)[events.user]
    return moved


def _catalogue(columns: Mapping[str, object], kinds: Mapping[str, str]) -> Catalogue:
    ids, *values = (column.to_pylist() for column in columns.values())  # type: ignore[attr-defined]
    fields = tuple(FeatureField(name, kinds[name]) for name in list(columns)[1:])  # type: ignore[arg-type]
    return Catalogue(fields, dict(zip(ids, zip(*values, strict=True), strict=True)))
