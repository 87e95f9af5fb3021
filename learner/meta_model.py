"""A version of what all users share, as the online stage trains it: parameters, vocabulary, counts, Adam's moments.

One mutable model walks from version to version (``learner.meta_update``); ``tensors`` is what a version is on disk.
The vocabulary grows by items that the stream brings: their embedding begins at zero, so that only their features
speak until something is learned of them.

Symbols: V items of the vocabulary, Vn new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learner.artifact import Artifact
from learner.features import SparseRows
from learner.filters import FirstFilter, SecondFilter
from learner.histories import take_rows
from learner.recommender import ITEM_TABLES, NEW_LOG_SIGMA, Recommender, RecommenderSpec
from learner.scan import scan_threads
from learner.serving import FixedPart, HashedItems, RawFeatures

Parts = tuple[FixedPart, FirstFilter, SecondFilter | None]
PARAMETERS, MOMENTS, COUNTS, FEATURES = "parameters.", "moments.", "counts.", "features."
"""What the names of a version's tensors begin with"""
FIRST, SECOND = f"{MOMENTS}first.", f"{MOMENTS}second."
"""The same of Adam's moments"""
Values = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""A parameter, and its first and second moments"""


class Excerpt(NamedTuple):
    """A part of a version: some parameters, whole or of R rows of the vocabulary, with all that a step changes."""

    tensors: dict[str, Values]
    """By parameter; (R, …) each where it is an item table"""
    rows: NDArray[np.int64]
    """(R,) each once"""
    item_events: NDArray[np.int64]
    """(R,)"""
    item_steps: NDArray[np.int64]
    """(R,)"""
    steps: int


class Undo(NamedTuple):
    """What a step, or ``MetaModel.put``, has overwritten: ``meta_update.take_back`` undoes it."""

    tensors: dict[str, tuple[Tensor, Tensor, Tensor]]
    """By parameter: value and moments before, of ``rows`` where it is an item table"""
    rows: NDArray[np.int64]
    item_events: NDArray[np.int64]
    item_steps: NDArray[np.int64]
    steps: int


class _Room:
    """Tensors with spare rows behind them: a vocabulary that grows by a few items a round is seldom copied."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def enlarged(self, name: str, old: Tensor, count: int, fill: float) -> Tensor:
        """(n + count, …) the rows of ``old`` (n, …), and ``count`` filled ones; it may share memory with ``old``."""
        rows, held = len(old) + count, self._held.get(name)
        if held is None or held.data_ptr() != old.data_ptr() or len(held) < rows:
            held = self._held[name] = old.new_empty((rows + rows // 4 + 1024, *old.shape[1:]))
            held[: len(old)] = old
        held[len(old) : rows] = fill
        return held[:rows]


class MetaModel:
    """The trainable parameters. Not for several threads at once while it is changed."""

    def __init__(self, artifact: Artifact, item_events: NDArray[np.int64]) -> None:
        """``item_events`` (V,): events of each item of the vocabulary in the offline stage."""
        fixed = artifact.fixed
        grades = tuple(fixed.grades.tolist()) or tuple(map(float, range(len(artifact.like_rate))))
        self.recommender = Recommender(
            RecommenderSpec(
                artifact.learner, fixed.item_ids, fixed.item_features, fixed.item_encoder, fixed.user_encoder, grades,
                artifact.like_rate,
            )
        )  # fmt: skip
        self.graded = bool(len(fixed.grades))
        """Whether the stream knows the grade of an event"""
        self.training = artifact.training
        self.item_ids = list(fixed.item_ids)
        self.item_events = item_events.astype(np.int64)
        """(V,) events of each item so far"""
        self.item_steps = np.zeros(len(item_events), np.int64)
        """(V,) steps that each item's rows have taken"""
        self.steps = 0
        self._room = _Room()
        self._rows = {item: row for row, item in enumerate(self.item_ids)}
        self._hashes = HashedItems(fixed.item_ids)
        self.parameters = dict(self.recommender.named_parameters())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(artifact.parameters[name].copy()))
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        """First and second moments of Adam, by parameter"""

    def rows_of(self, item: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(n,) rows of the vocabulary by ``ring_item``; −1 for items that are not in it."""
        return self._hashes.rows(item)

    def rows_named(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """(n,) rows of items by their ids; −1 for items that are not in it."""
        return np.fromiter((self._rows.get(item, -1) for item in item_ids), np.int64, len(item_ids))

    def lacks(self, items: Mapping[str, RawFeatures | None]) -> dict[str, RawFeatures | None]:
        """Those of the items that the vocabulary does not have."""
        return {item: raw for item, raw in items.items() if item not in self._rows}

    def grow(self, items: Mapping[str, RawFeatures | None]) -> None:
        """Takes items into the vocabulary, in this order; those that are there stay as they are."""
        new = self.lacks(items)
        if new:
            self._append(list(new), self.recommender.spec.item_encoder.encode(new.values()))

    def extend(self, items: Sequence[str], features: SparseRows) -> None:
        """As ``grow``, with features that are encoded. ValueError for an item that is there, or comes twice."""
        new: set[str] = set()
        for item in items:
            if item in self._rows or item in new:
                raise ValueError(f"the vocabulary has {item!r} already: these are not the items that follow it")
            new.add(item)
        if items:
            self._append(items, features)

    def _append(self, items: Sequence[str], features: SparseRows) -> None:
        """``items`` are new, and ``features`` theirs."""
        for item in items:
            self._hashes.add(item, len(self.item_ids))
            self._rows[item] = len(self.item_ids)
            self.item_ids.append(item)
        self._enlarge(len(items))
        self._set_features(_joined(self.recommender.spec.item_features, features))

    def _set_features(self, features: SparseRows) -> None:
        """Of the whole vocabulary."""
        recommender = self.recommender
        recommender.spec = replace(recommender.spec, item_ids=tuple(self.item_ids), item_features=features)
        recommender.register_item_features(recommender.spec)

    def _enlarge(self, count: int) -> None:
        """``count`` more rows in everything that has one for each item."""
        for name in ITEM_TABLES:
            if name not in self.parameters:
                continue
            parameter, first, second = (
                self._room.enlarged(f"{what}{name}", old.detach(), count, fill)
                for what, old, fill in zip(
                    (PARAMETERS, FIRST, SECOND), (self.parameters[name], *self.moments[name]),
                    (NEW_LOG_SIGMA.get(name, 0.0), 0.0, 0.0), strict=True,
                )
            )  # fmt: skip
            self.parameters[name] = nn.Parameter(parameter)
            setattr(self.recommender, name, self.parameters[name])
            self.moments[name] = first, second
        self.item_events = np.append(self.item_events, np.zeros(count, np.int64))
        self.item_steps = np.append(self.item_steps, np.zeros(count, np.int64))

    def parts(self) -> Parts:
        """What ``ServingModel`` is made of."""
        with scan_threads(1):
            return self.recommender.fixed_part(), self.recommender.first_filter(), self.recommender.second_filter()

    def finite(self) -> bool:
        """Whether every parameter is a number."""
        with scan_threads(1):
            return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values())

    # --- in part ----------------------------------------------------------------------------------------------

    def excerpt(self, names: Sequence[str], rows: NDArray[np.int64]) -> Excerpt:
        """A copy of these parameters, of ``rows`` where they are item tables."""
        found: dict[str, Values] = {}
        with torch.no_grad():
            for name in names:
                first, second = self.moments[name]
                whole = [held.detach().numpy() for held in (self.parameters[name], first, second)]
                value, first_, second_ = (w[rows] if name in ITEM_TABLES else w.copy() for w in whole)
                found[name] = value, first_, second_
        return Excerpt(found, rows.copy(), self.item_events[rows], self.item_steps[rows], self.steps)

    def put(self, part: Excerpt) -> Undo:
        """Writes an excerpt where it was taken; ``meta_update.take_back`` of what is returned undoes it.

        ValueError, and nothing is written, for a row or a shape that this model does not have.
        """
        self._check(part)
        saved: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        before = self.item_events.copy(), self.item_steps.copy(), self.steps
        rows = part.rows.copy()
        at = torch.from_numpy(rows)
        with scan_threads(1), torch.no_grad():
            for name, values in part.tensors.items():
                targets = (self.parameters[name], *self.moments[name])
                table = name in ITEM_TABLES
                old = [t.detach()[at] if table else t.detach().clone() for t in targets]
                saved[name] = old[0], old[1], old[2]
                for target, value in zip(targets, values, strict=True):
                    new = torch.from_numpy(np.array(value))
                    if table:
                        target[at] = new
                    else:
                        target.copy_(new)
        self.item_events[part.rows], self.item_steps[part.rows] = part.item_events, part.item_steps
        self.steps = part.steps
        return Undo(saved, rows, *before)

    def _check(self, part: Excerpt) -> None:
        count = len(part.rows)
        if count and (part.rows.min() < 0 or part.rows.max() >= len(self.item_ids)):
            raise ValueError(
                f"rows up to {int(part.rows.max())} of a vocabulary of {len(self.item_ids)}: it is another vocabulary"
            )
        for name, values in part.tensors.items():
            own = tuple(self.parameters[name].shape) if name in self.parameters else None
            wanted = (count, *own[1:]) if own is not None and name in ITEM_TABLES else own
            if any(value.shape != wanted for value in values):
                raise ValueError(f"{name} is {wanted or 'no parameter'} here, and {values[0].shape} in the excerpt")
        if not len(part.item_events) == len(part.item_steps) == count:
            raise ValueError(f"an excerpt of {count} rows has counts of {len(part.item_events)}")

    # --- as tensors -------------------------------------------------------------------------------------------

    def serving_tensors(self, items: int) -> dict[str, NDArray[np.generic]]:
        """Those of ``tensors`` that predictions depend on, of the first ``items`` of the vocabulary; views, no copies.

        ``state.lineage.serving_sha256`` of them is that of the version when the vocabulary ended there.
        """
        found: dict[str, NDArray[np.generic]] = {}
        for name, parameter in self.parameters.items():
            whole = parameter.detach().numpy()
            found[PARAMETERS + name] = whole[:items] if name in ITEM_TABLES else whole
        features = self.recommender.spec.item_features
        end = int(features.starts[items])
        kept = features.starts[: items + 1], features.columns[:end], features.weights[:end]
        found |= zip([FEATURES + part for part in _FEATURE_PARTS], kept, strict=True)
        return found

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """Copies of all that a version is, but for ``item_ids``."""
        found: dict[str, NDArray[np.generic]] = {}
        for name, parameter in self.parameters.items():
            found[PARAMETERS + name] = parameter.detach().numpy().copy()
            for prefix, moment in zip((FIRST, SECOND), self.moments[name], strict=True):
                found[prefix + name] = moment.numpy().copy()
        found[COUNTS + "item_events"] = self.item_events.copy()
        found[COUNTS + "item_steps"] = self.item_steps.copy()
        found[COUNTS + "steps"] = np.array([self.steps], np.int64)
        features = self.recommender.spec.item_features
        for part in _FEATURE_PARTS:
            found[FEATURES + part] = getattr(features, part).copy()
        return found

    def load(self, tensors: Mapping[str, NDArray[np.generic]], item_ids: Sequence[str]) -> None:
        """Becomes the version of these tensors; items that came since stay in the vocabulary, as new ones.

        ValueError unless ``item_ids`` begin as this vocabulary does, or go on where it ends.
        """
        known = min(len(item_ids), len(self.item_ids))
        if list(item_ids[:known]) != self.item_ids[:known]:
            raise ValueError("the version's vocabulary is not that of this model: was it made by another model?")
        parts: Any = [tensors[FEATURES + part] for part in _FEATURE_PARTS]
        held, features = len(item_ids), SparseRows(*parts)
        self._append(item_ids[known:], take_rows(features, np.arange(known, held)))
        own = self.recommender.spec.item_features
        self._set_features(_joined(features, take_rows(own, np.arange(held, len(self.item_ids)))))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                places = slice(0, held) if name in ITEM_TABLES else slice(None)
                new = {PARAMETERS: parameter, FIRST: self.moments[name][0],
                       SECOND: self.moments[name][1]}  # fmt: skip
                for prefix, target in new.items():
                    value = torch.from_numpy(np.array(tensors[prefix + name]))
                    if target.dim():
                        target[places] = value
                        if name in ITEM_TABLES:
                            target[held:] = NEW_LOG_SIGMA.get(name, 0.0) if prefix == PARAMETERS else 0.0
                    else:
                        target.copy_(value)
        self.item_events[:held], self.item_events[held:] = tensors[COUNTS + "item_events"], 0
        self.item_steps[:held], self.item_steps[held:] = tensors[COUNTS + "item_steps"], 0
        self.steps = int(tensors[COUNTS + "steps"][0])


_FEATURE_PARTS = ("starts", "columns", "weights")


def _joined(first: SparseRows, second: SparseRows) -> SparseRows:
    return SparseRows(
        np.concatenate([first.starts, second.starts[1:] + first.starts[-1]]),
        np.concatenate([first.columns, second.columns]),
        np.concatenate([first.weights, second.weights]),
    )
