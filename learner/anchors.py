"""Anchors: frozen histories of users who never feed a meta-update, on which every version is measured alike.

A *cohort* holds some users of one time slice (0: those of the offline stage) and of one kind. Of each user the first
``support`` events are adapted on, and the next ones, the *query*, are predicted from the state after them:

    new       0 to 4 support events, by the user's hash: what the start is worth, and the first few events
    warm      20: most of what can be learned of a user has been (AUC hardly rises after some 20 events)
    heavy     100: the regulars, whose state is worth most and who notice first when items move under it
    segment=… 20, the users with this value of a feature, for a group that an average would hide

Users are drawn by their CRC-32 alone, mixed with a salt: the ``users`` smallest of a cohort. That is a uniform sample
without replacement which depends on neither order nor batches, and which several workers, each with its own users, can
make without a word. Once made, a cohort never changes: its loss can be compared over all versions.

Symbols: B users, T events of histories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.adaptation import Adaptation, Adapted, EventColumns
from learner.features import SparseRows
from learner.forgetting import (
    LOGIT_BINS,
    CohortScores,
    Column,
    Scores,
    count_logits,
    json_bytes,
    read_header,
)
from learner.histories import Histories
from learner.metrics import auc, event_log_loss
from learner.rebasing import event_columns
from learner.serving import FirstFilter, SecondFilter, ServingModel
from learner.user_hash import HELD_OUT, drawn, mixed
from learner.user_state import RowLayout, Slab, new_rows

NEW_SUPPORT = 4
"""Most events that a user of ``new`` has seen: with the start alone, AUC is lowest over the first five"""
WARM_SUPPORT = 20
HEAVY_SUPPORT = 100
MIN_QUERY = 4
"""Query events that a user must have: the mean loss of fewer is mostly luck, and would widen every bound"""
MAX_SEGMENTS = 8
"""Values of the segment feature that become cohorts of a slice, the most frequent: each is one more bound to keep"""

_COHORT_SALT, _SUPPORT_SALT = 0x85157AF5, 0x6C62272E
"""Beside those of ``learner.user_hash``: one hash for two purposes would make one choice depend on the other"""


@dataclass(frozen=True, slots=True)
class Cohort:
    """B users of one time slice and kind; histories end with the query."""

    slice: int
    kind: str
    crc32: NDArray[np.uint32]
    """(B,) of the users' ids, rising"""
    histories: Histories
    support: NDArray[np.int64]
    """(B,) events adapted on; MIN_QUERY or more follow"""

    @property
    def column(self) -> Column:
        """How it is called."""
        return Column(f"slice {self.slice} / {self.kind}", self.slice, self.kind)


@dataclass(frozen=True)
class AnchorSet:
    """Cohorts of at most ``users`` users, with at most ``query`` predicted events each."""

    users: int
    query: int
    seed: int = 0
    cohorts: tuple[Cohort, ...] = ()

    def __post_init__(self) -> None:
        if self.users < 1 or self.query < MIN_QUERY:
            raise ValueError(
                f"anchors of {self.users} users and {self.query} query events: give at least 1 and {MIN_QUERY} "
                "(meta.anchors)"
            )

    @property
    def slices(self) -> tuple[int, ...]:
        """Time slices that have a cohort, rising."""
        return tuple(sorted({cohort.slice for cohort in self.cohorts}))

    def with_slice(
        self,
        slice: int,
        histories: Histories,
        crc32s: NDArray[np.uint32],
        segments: Sequence[str] | None = None,
    ) -> AnchorSet:
        """With the cohorts of one more time slice, drawn from these users (who are held out, see ``held_out``).

        Support and query are the first events of what is given. ``new`` takes only users whose first event is there;
        users with too few events for a cohort are not in it, and a cohort without users is left out. ``segments``: a
        value for each user, "" for none. ValueError for a slice that is there already.
        """
        if slice in self.slices:
            raise ValueError(f"slice {slice} has its cohorts already, and they are frozen: take the next number")
        if not len(histories) == len(crc32s) == (len(histories) if segments is None else len(segments)):
            raise ValueError(f"{len(histories)} histories, but {len(crc32s)} hashes or not as many segments: one each")
        full = {kind: np.full(len(crc32s), count, np.int64) for kind, count in _SUPPORTS.items()}
        new = (mixed(crc32s, self._salt(_SUPPORT_SALT)) % np.uint32(NEW_SUPPORT + 1)).astype(np.int64)
        everyone = np.ones(len(crc32s), np.bool_)
        wanted = [("new", new, histories.first == 0), *((kind, full[kind], everyone) for kind in _SUPPORTS)]
        for value in _frequent(segments or ()):
            wanted.append((f"segment={value}", full["warm"], np.array([s == value for s in segments or ()], np.bool_)))
        made = [self._drawn(slice, kind, histories, crc32s, support, of) for kind, support, of in wanted]
        return replace(self, cohorts=self.cohorts + tuple(cohort for cohort in made if len(cohort.crc32)))

    def retired(self, slices: Collection[int]) -> AnchorSet:
        """Without the cohorts of these slices."""
        return replace(self, cohorts=tuple(cohort for cohort in self.cohorts if cohort.slice not in slices))

    @cached_property
    def histories(self) -> Histories:
        """Of all cohorts, one after the other; a user of several stands there several times."""
        return Histories.concatenate([cohort.histories for cohort in self.cohorts])

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """For a file; ``header`` is JSON in bytes, the others are the cohorts' one after the other."""
        header = {
            "format": 1, "users": self.users, "query": self.query, "seed": self.seed,
            "cohorts": [{"slice": c.slice, "kind": c.kind, "users": len(c.crc32)} for c in self.cohorts],
        }  # fmt: skip
        h = self.histories
        return {
            "header": json_bytes(header),
            "crc32": np.concatenate([np.zeros(0, np.uint32), *(c.crc32 for c in self.cohorts)]),
            "support": np.concatenate([np.zeros(0, np.int64), *(c.support for c in self.cohorts)]),
            "starts": h.starts, "item": h.item, "label": h.label, "grade": h.grade, "first": h.first,
            "feature_starts": h.features.starts, "feature_columns": h.features.columns,
            "feature_weights": h.features.weights,
        }  # fmt: skip

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> AnchorSet:
        """What ``as_arrays`` made. ValueError for anything else."""
        header = read_header(arrays, "anchors")
        try:
            features = SparseRows(*(arrays[f"feature_{name}"] for name in ("starts", "columns", "weights")))
            columns = {name: arrays[name] for name in ("starts", "item", "label", "grade", "first")}
            histories, crc32, support = Histories(**columns, features=features), arrays["crc32"], arrays["support"]
        except KeyError as error:
            raise ValueError(f"anchors without {error}: the arrays are damaged or of something else") from None
        ends = np.cumsum([0, *(int(entry["users"]) for entry in header["cohorts"])])
        if not len(crc32) == len(support) == len(histories) == ends[-1]:
            raise ValueError(f"anchors of {ends[-1]} users by their header, but the arrays hold {len(crc32)}")
        if not ((support >= 0) & (support + MIN_QUERY <= histories.lengths)).all():
            raise ValueError(
                f"anchors with fewer than {MIN_QUERY} query events after a user's support: make them again"
            )
        cohorts = []
        for entry, first, last in zip(header["cohorts"], ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            part = histories.take(np.arange(first, last))
            cohorts.append(Cohort(int(entry["slice"]), entry["kind"], crc32[first:last], part, support[first:last]))
        return AnchorSet(int(header["users"]), int(header["query"]), int(header["seed"]), tuple(cohorts))

    def _salt(self, purpose: int) -> int:
        return (purpose ^ self.seed) & 0xFFFFFFFF

    def _drawn(
        self,
        slice: int,
        kind: str,
        histories: Histories,
        crc32s: NDArray[np.uint32],
        support: NDArray[np.int64],
        eligible: NDArray[np.bool_],
    ) -> Cohort:
        enough = np.flatnonzero(eligible & (histories.lengths >= support + MIN_QUERY))
        salt = self._salt(_COHORT_SALT ^ slice * 0x01000193)
        smallest = enough[np.argsort(mixed(crc32s[enough], salt), kind="stable")[: self.users]]
        chosen = smallest[np.argsort(crc32s[smallest], kind="stable")]
        part = histories.take(chosen)
        last = np.minimum(part.lengths, support[chosen] + self.query)
        return Cohort(slice, kind, crc32s[chosen], part.cut(np.zeros_like(last), last), support[chosen])


_SUPPORTS = {"warm": WARM_SUPPORT, "heavy": HEAVY_SUPPORT}


def held_out(crc32s: NDArray[np.uint32], share: float) -> NDArray[np.bool_]:
    """(n,) users who never feed a gradient, offline or online, so that the gate never measures the fit."""
    return drawn(crc32s, HELD_OUT, share)


def score(anchors: AnchorSet, model: ServingModel, layout: RowLayout) -> Scores:
    """The model's version on every cohort: each user from their start, through the support, to the query.

    What is measured is the code that serves: the same kernel, from the same start. A model with a number that is not
    finite gets NaN for every loss. ``layout``: of the model's rows.
    """
    if not anchors.cohorts:
        return Scores(model.meta_version, ())
    histories = anchors.histories
    user = np.repeat(np.arange(len(histories)), histories.lengths)
    place = np.arange(histories.events) - histories.starts[user]
    query = place >= np.concatenate([cohort.support for cohort in anchors.cohorts])[user]
    cohort_of = np.repeat(np.arange(len(anchors.cohorts)), [len(cohort.crc32) for cohort in anchors.cohorts])
    asked = _Query(user[query], histories.label[query], cohort_of, len(anchors.cohorts))
    if not _finite(model.first, model.second):
        nothing = np.full(len(asked.user), np.nan, np.float32)
        states = [(nothing, nothing)] * 2
        return asked.scores(anchors, model.meta_version, states, np.bincount(cohort_of[asked.user]))
    means = model.means_of(histories.features)
    slab = new_rows(layout, model.first, model.second, means, model.meta_version)
    adaptation, columns = Adaptation(layout, model.first, model.second), event_columns(model, histories)
    questions = _part(columns, query)

    def said() -> tuple[Adapted, NDArray[np.int64]]:
        found = adaptation.predict(slab, questions, model.items)
        return found, _refused(found, adaptation, slab, questions, model, asked)

    zero_shot, refused = said()
    adaptation.learn(slab, _part(columns, ~query), model.items)
    adapted, refused_later = said()
    unlearned = np.bincount(cohort_of, layout.rows(slab)["guarded"], len(anchors.cohorts)).astype(np.int64)
    states = [(found.logit, found.probability) for found in (adapted, zero_shot)]
    return asked.scores(anchors, model.meta_version, states, refused + refused_later + unlearned)


@dataclass(frozen=True, slots=True)
class _Query:
    """All query events together, of U users in C cohorts."""

    user: NDArray[np.int64]
    label: NDArray[np.int8]
    cohort_of: NDArray[np.int64]
    """(U,) rising"""
    cohorts: int

    def scores(
        self,
        anchors: AnchorSet,
        version: int,
        states: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
        not_finite: NDArray[np.int64],
    ) -> Scores:
        """``states``: (logits, probabilities), adapted and zero-shot."""
        users = len(self.cohort_of)
        events = np.bincount(self.user, minlength=users)
        losses = [np.bincount(self.user, event_log_loss(self.label, p), users) / events for _, p in states]
        loss, ends = np.stack(losses), np.searchsorted(self.cohort_of, np.arange(self.cohorts + 1)).tolist()
        cuts = np.searchsorted(self.user, ends).tolist()
        found = []
        for k, cohort in enumerate(anchors.cohorts):
            of, here = slice(ends[k], ends[k + 1]), slice(cuts[k], cuts[k + 1])
            label = self.label[here]
            aucs = [auc(label, logit[here]) for logit, _ in states]
            counts = np.stack([count_logits(logit[here], label) for logit, _ in states])
            if np.isnan(loss[:, of]).any():
                aucs, counts = [np.nan, np.nan], np.zeros((2, 2, LOGIT_BINS), np.int64)
            found.append(
                CohortScores(cohort.column, version, cohort.crc32, loss[:, of], events[of], (aucs[0], aucs[1]), counts,
                             int(not_finite[k]))
            )  # fmt: skip
        return Scores(version, tuple(found))


def _part(columns: EventColumns, chosen: NDArray[np.bool_]) -> EventColumns:
    return replace(
        columns, slot=columns.slot[chosen], item=columns.item[chosen], label=columns.label[chosen],
        grade=columns.grade[chosen], event_time_ms=columns.event_time_ms[chosen], offset=columns.offset[chosen],
    )  # fmt: skip


def _refused(
    found: Adapted, adaptation: Adaptation, slab: Slab, questions: EventColumns, model: ServingModel, asked: _Query
) -> NDArray[np.int64]:
    """(C,) predictions that were not finite; the kernel counts them all together, so they are asked again if any."""
    refused = np.zeros(asked.cohorts, np.int64)
    if found.guarded:
        of = asked.cohort_of[asked.user]
        for k in range(asked.cohorts):
            refused[k] = adaptation.predict(slab, _part(questions, of == k), model.items).guarded
    return refused


def _finite(first: FirstFilter, second: SecondFilter | None) -> bool:
    values = [getattr(part, f.name) for part in (first, second) if part is not None for f in fields(part)]
    return all(np.isfinite(value).all() for value in values if not isinstance(value, str))


def _frequent(segments: Sequence[str]) -> list[str]:
    """The values most users have, ties in order of the text."""
    counted = Counter(value for value in segments if value)
    return sorted(counted, key=lambda value: (-counted[value], value))[:MAX_SEGMENTS]
