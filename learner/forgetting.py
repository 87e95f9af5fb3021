"""What a version is worth to each cohort of anchors, and what was forgotten from version to version. Arrays only.

``Scores`` are one version's: losses by user, and counts from which the scores of several workers add up.
``ForgettingMatrix`` is R[t, c]: evaluation t (the versions in the order in which they came to serve) of cohort c, in
AUC and in log-loss, adapted (after the user's support events) and zero-shot (from the start alone).

With a = AUC, or a = −log-loss, so that more is better in both; T the latest evaluation, t_c the first that has cohort
c, b_c what version 0 says of it:

    average            mean over c of R[T, c]
    backward transfer  mean over c of a[T, c] − a[t_c, c]                 Lopez-Paz & Ranzato, arXiv 1706.08840
    forward transfer   mean over c of zero-shot a[t_c, c] − b_c           the same; there b is a random start
    forgetting         f_c = max over t_c ≤ t < T of a[t, c] − a[T, c]    Chaudhry et al., arXiv 1801.10112
    minimum            worst R[t, c] of t > t_c                           De Lange et al., arXiv 2205.13452
    stability gap      deepest fall of a[t, c] below its best before t    the same: what an average at the end hides

So forgetting and gap are positive where something became worse, transfers where it became better, in nats or in
points of AUC / 100. Means run over the cohorts of the latest evaluation for which the term is defined: a cohort has
no forgetting at its first evaluation, and cohorts that version 0 began with have no forward transfer.

Symbols: V evaluations, C cohorts, B users of a cohort.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Double = NDArray[np.float64]
Int = NDArray[np.int64]

LOGIT_LIMIT, LOGIT_BINS = 8.0, 512
"""Logits are counted in bins of 1/32 over [−8, 8], those beyond in the last ones. Two scores of one bin count as a
tie, which moves the AUC of 20,000 events by less than 0.0001, of 300 by some 0.002; a cohort's counts are 16 KiB."""
MEASURES = ("auc", "log_loss")
_ADAPTED, _ZERO_SHOT = 0, 1


class Column(NamedTuple):
    """A cohort, without its users."""

    name: str
    slice: int
    kind: str


@dataclass(frozen=True, slots=True)
class CohortScores:
    """One version on one cohort of B users. Two of a kind are indexed [adapted, zero-shot]."""

    column: Column
    version: int
    user: NDArray[np.uint32]
    """(B,) CRC-32 of the users' ids, rising: what pairs the scores of two versions"""
    loss: Double
    """(2, B) mean log-loss of the user's query events, nats"""
    events: Int
    """(B,) query events"""
    auc: tuple[float, float]
    """Of all query events together; NaN with one class only"""
    counts: Int
    """(2, 2, LOGIT_BINS) query events by [adapted or zero-shot, label, bin of the logit]"""
    not_finite: int
    """Predictions and updates that were not finite; the kernel put something else in their place"""

    @property
    def name(self) -> str:
        """The cohort's."""
        return self.column.name

    @property
    def log_loss(self) -> tuple[float, float]:
        """Mean over users, each counting once; NaN without users."""
        if not len(self.user):
            return math.nan, math.nan
        return float(self.loss[_ADAPTED].mean()), float(self.loss[_ZERO_SHOT].mean())

    @property
    def finite(self) -> bool:
        """Whether every loss, prediction and update was."""
        return self.not_finite == 0 and bool(np.isfinite(self.loss).all())

    def __add__(self, other: CohortScores) -> CohortScores:
        """Both workers' users, ordered by their hash; the AUC is that of the counts."""
        if (self.column, self.version) != (other.column, other.version):
            raise ValueError(
                f"scores of version {other.version} on {other.name!r} do not add to those of version {self.version} "
                f"on {self.name!r}: wait until every worker has scored the same version"
            )
        user = np.concatenate([self.user, other.user])
        order = np.argsort(user, kind="stable")
        counts = self.counts + other.counts
        return CohortScores(
            self.column, self.version, user[order], np.concatenate([self.loss, other.loss], axis=1)[:, order],
            np.concatenate([self.events, other.events])[order],
            (counted_auc(counts[_ADAPTED]), counted_auc(counts[_ZERO_SHOT])), counts,
            self.not_finite + other.not_finite,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scores:
    """One version on every cohort; names occur once."""

    version: int
    cohorts: tuple[CohortScores, ...]

    def __getitem__(self, name: str) -> CohortScores:
        """KeyError for a cohort that was not scored."""
        return self.by_name()[name]

    def by_name(self) -> dict[str, CohortScores]:
        """Cohort name -> its scores."""
        return {cohort.name: cohort for cohort in self.cohorts}

    def __add__(self, other: Scores) -> Scores:
        """Scores of other users by the same version. ValueError if it is another."""
        if self.version != other.version:
            raise ValueError(
                f"scores of version {other.version} do not add to those of version {self.version}: wait until every "
                "worker has scored the same version"
            )
        merged = self.by_name()
        for cohort in other.cohorts:
            merged[cohort.name] = merged[cohort.name] + cohort if cohort.name in merged else cohort
        return Scores(self.version, tuple(merged.values()))

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """For a file or a message; ``header`` is JSON in bytes, the others are the cohorts' one after the other."""
        header = {
            "format": 1,
            "version": self.version,
            "cohorts": [
                {"name": c.name, "slice": c.column.slice, "kind": c.column.kind, "version": c.version,
                 "users": len(c.user), "auc": [json_number(value) for value in c.auc], "not_finite": c.not_finite}
                for c in self.cohorts
            ],
        }  # fmt: skip
        return {
            "header": json_bytes(header),
            "user": _joined([c.user for c in self.cohorts], (0,), np.uint32, 0),
            "loss": _joined([c.loss for c in self.cohorts], (2, 0), np.float64, 1),
            "events": _joined([c.events for c in self.cohorts], (0,), np.int64, 0),
            "counts": _joined([c.counts[None] for c in self.cohorts], (0, 2, 2, LOGIT_BINS), np.int64, 0),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Scores:
        """What ``as_arrays`` made. ValueError for anything else."""
        header = read_header(arrays, "scores")
        sizes = [int(entry["users"]) for entry in header["cohorts"]]
        ends = np.cumsum([0, *sizes]).tolist()
        expected = {"user": (ends[-1],), "loss": (2, ends[-1]), "events": (ends[-1],),
                    "counts": (len(sizes), 2, 2, LOGIT_BINS)}  # fmt: skip
        for name, shape in expected.items():
            if name not in arrays or arrays[name].shape != shape:
                found = arrays[name].shape if name in arrays else "nothing"
                raise ValueError(f"scores hold {found} as {name!r}, but their header says {shape}: score again")
        cohorts = tuple(
            CohortScores(
                Column(entry["name"], int(entry["slice"]), entry["kind"]), int(entry["version"]),
                arrays["user"][first:last].astype(np.uint32), arrays["loss"][:, first:last].astype(np.float64),
                arrays["events"][first:last].astype(np.int64), (_number(entry["auc"][0]), _number(entry["auc"][1])),
                arrays["counts"][k].astype(np.int64), int(entry["not_finite"]),
            )
            for k, (entry, first, last) in enumerate(zip(header["cohorts"], ends[:-1], ends[1:], strict=True))
        )  # fmt: skip
        return Scores(int(header["version"]), cohorts)


def count_logits(logit: NDArray[np.float32], label: NDArray[np.int8]) -> Int:
    """(2, LOGIT_BINS) events by [label, bin of the logit]; NaN counts as 0."""
    inside = np.clip(np.nan_to_num(logit.astype(np.float64), nan=0.0), -LOGIT_LIMIT, LOGIT_LIMIT)
    bins = ((inside + LOGIT_LIMIT) * (LOGIT_BINS / (2 * LOGIT_LIMIT))).astype(np.int64)
    places = np.minimum(bins, LOGIT_BINS - 1) + LOGIT_BINS * label.astype(np.int64)
    counts: Int = np.bincount(places, minlength=2 * LOGIT_BINS).reshape(2, LOGIT_BINS)
    return counts


def counted_auc(counts: Int) -> float:
    """AUC of (2, LOGIT_BINS) counts, two events of one bin being a tie; NaN with one class only."""
    negative, positive = counts
    pairs = int(negative.sum()) * int(positive.sum())
    below = np.cumsum(negative) - negative
    return float(positive @ (2 * below + negative)) / (2 * pairs) if pairs else math.nan


@dataclass(frozen=True, slots=True)
class ForgettingMatrix:
    """R[V, C] of both measures. NaN before a cohort existed, and after it was retired."""

    versions: tuple[int, ...] = ()
    """(V,) what was evaluated, in that order; a version that was taken back to stands there again"""
    columns: tuple[Column, ...] = ()
    """(C,)"""
    values: Double = field(default_factory=lambda: np.zeros((0, 0, 2, 2)))
    """(V, C, 2, 2) by [.., .., measure, adapted or zero-shot]; log-loss in nats, as it is"""
    base: Double = field(default_factory=lambda: np.zeros((0, 2, 2)))
    """(C, 2, 2) what version 0 says of each cohort; NaN where it was never asked"""

    def added(self, scores: Scores, base: Scores | None = None) -> ForgettingMatrix:
        """One more evaluation. ``base``: version 0 on the cohorts that are new here, for the forward transfer.

        The evaluation of version 0 is its own base.
        """
        known = {column.name for column in self.columns}
        columns = self.columns + tuple(c.column for c in scores.cohorts if c.name not in known)
        values = np.full((len(self.versions) + 1, len(columns), 2, 2), np.nan)
        values[:-1, : len(self.columns)] = self.values
        bases = np.full((len(columns), 2, 2), np.nan)
        bases[: len(self.columns)] = self.base
        found, asked = scores.by_name(), (base or scores).by_name()
        for k, column in enumerate(columns):
            if column.name in found:
                values[-1, k] = _cell(found[column.name])
            if column.name in asked and asked[column.name].version == 0:
                bases[k] = np.where(np.isnan(bases[k]), _cell(asked[column.name]), bases[k])
        return ForgettingMatrix((*self.versions, scores.version), columns, values, bases)

    def measures(self, measure: str) -> Measures:
        """Those of "auc" or "log_loss", at the latest evaluation; NaN where there is none yet."""
        m = MEASURES.index(measure)
        sign = -1.0 if measure == "log_loss" else 1.0
        adapted, zero_shot = sign * self.values[:, :, m, _ADAPTED], sign * self.values[:, :, m, _ZERO_SHOT]
        count = len(self.columns)
        first = _first_finite(adapted)
        now = adapted[-1] if len(adapted) else np.full(count, np.nan)
        at_first = _at(adapted, first)
        later = np.arange(len(adapted))[:, None] > first
        best_before = np.fmax.accumulate(adapted, axis=0) if len(adapted) else adapted
        past_best = best_before[-2] if len(adapted) > 1 else np.full(count, np.nan)
        falls = np.full_like(adapted, np.nan)
        falls[1:] = best_before[:-1] - adapted[1:]
        began_with_it = np.array([first[k] < len(adapted) and self.versions[first[k]] == 0 for k in range(count)], bool)
        forward = _at(zero_shot, first) - sign * self.base[:, m, _ZERO_SHOT]
        forward[began_with_it] = np.nan
        gone = np.isnan(now)
        return Measures(
            measure, self.columns, sign * now, _kept(now - at_first, gone | (first == len(adapted) - 1)),
            _kept(forward, gone), _kept(past_best - now, gone),
            _kept(sign * _nan_reduce(np.fmin, np.where(later, adapted, np.nan)), gone),
            _kept(_nan_reduce(np.fmax, falls), gone),
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: NaN becomes null. ``from_dict`` reads it; ``measures`` are for the reader's convenience."""
        return {
            "format": 1,
            "versions": list(self.versions),
            "cohorts": [column._asdict() for column in self.columns],
            **{
                name: {
                    state: [[json_number(v) for v in row] for row in self.values[:, :, m, s].tolist()]
                    for s, state in enumerate(("adapted", "zero_shot"))
                }
                for m, name in enumerate(MEASURES)
            },
            "base": {
                name: {
                    state: [json_number(v) for v in self.base[:, m, s].tolist()]
                    for s, state in enumerate(("adapted", "zero_shot"))
                }
                for m, name in enumerate(MEASURES)
            },
            "measures": {name: self.measures(name).as_dict() for name in MEASURES},
        }

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> ForgettingMatrix:
        """What ``as_dict`` made. ValueError for anything else."""
        if found.get("format") != 1:
            raise ValueError(f"a forgetting matrix of format {found.get('format')!r}, but this release reads 1")
        columns = tuple(Column(c["name"], int(c["slice"]), c["kind"]) for c in found["cohorts"])
        versions = tuple(int(version) for version in found["versions"])
        values = np.full((len(versions), len(columns), 2, 2), np.nan)
        base = np.full((len(columns), 2, 2), np.nan)
        try:
            for m, name in enumerate(MEASURES):
                for s, state in enumerate(("adapted", "zero_shot")):
                    values[:, :, m, s] = np.array(found[name][state], np.float64).reshape(len(versions), len(columns))
                    base[:, m, s] = np.array(found["base"][name][state], np.float64).reshape(len(columns))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"a forgetting matrix says {len(versions)} versions of {len(columns)} cohorts and holds others: {error}"
            ) from None
        return ForgettingMatrix(versions, columns, values, base)

    def monitoring(self) -> list[dict[str, Any]]:
        """Of the latest evaluation, one record for each cohort that it has, then one for all; none before the first."""
        if not self.versions:
            return []
        found = {name: self.measures(name) for name in MEASURES}
        version = self.versions[-1]
        records = []
        for k, column in enumerate(self.columns):
            if np.isnan(self.values[-1, k]).all():
                continue
            record: dict[str, Any] = {"record": "cohort", "version": version, "cohort": column.name,
                                      "slice": column.slice, "kind": column.kind}  # fmt: skip
            for m, name in enumerate(MEASURES):
                record[name] = json_number(self.values[-1, k, m, _ADAPTED])
                record[f"zero_shot_{name}"] = json_number(self.values[-1, k, m, _ZERO_SHOT])
                record |= {f"{name}_{what}": value for what, value in found[name].of_cohort(k).items()}
            records.append(record)
        summary = {f"{name}_{what}": value for name in MEASURES for what, value in found[name].summary().items()}
        return [*records, {"record": "all", "version": version, **summary}]


@dataclass(frozen=True, slots=True)
class Measures:
    """Of the latest evaluation in one measure, by cohort (C,); NaN where a term is not defined. See the module."""

    measure: str
    columns: tuple[Column, ...]
    now: Double
    backward_transfer: Double
    forward_transfer: Double
    forgetting: Double
    minimum: Double
    stability_gap: Double

    @property
    def worst(self) -> Column | None:
        """The cohort with the lowest AUC, or the highest log-loss, now."""
        return self._extreme(self.now if self.measure == "log_loss" else -self.now)

    @property
    def most_forgotten(self) -> Column | None:
        """The cohort that has lost most against its best past."""
        return self._extreme(self.forgetting)

    def of_cohort(self, k: int) -> dict[str, float | None]:
        """Ready for JSON, without ``now``."""
        terms = ("backward_transfer", "forward_transfer", "forgetting", "minimum", "stability_gap")
        return {term: json_number(getattr(self, term)[k]) for term in terms}

    def summary(self) -> dict[str, Any]:
        """Ready for JSON: means over cohorts, the extremes, and whose they are."""
        worst, forgotten = self.worst, self.most_forgotten
        return {
            "average": json_number(_mean(self.now)),
            "backward_transfer": json_number(_mean(self.backward_transfer)),
            "forward_transfer": json_number(_mean(self.forward_transfer)),
            "forgetting": json_number(_mean(self.forgetting)),
            "largest_forgetting": json_number(float(_nan_reduce(np.fmax, self.forgetting))),
            "most_forgotten": None if forgotten is None else forgotten.name,
            "worst": json_number(math.nan if worst is None else float(self.now[self.columns.index(worst)])),
            "worst_cohort": None if worst is None else worst.name,
            "average_minimum": json_number(_mean(self.minimum)),
            "stability_gap": json_number(float(_nan_reduce(np.fmax, self.stability_gap))),
        }

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        cohorts = {column.name: self.of_cohort(k) for k, column in enumerate(self.columns)}
        return {**self.summary(), "cohorts": cohorts}

    def _extreme(self, badness: Double) -> Column | None:
        return None if np.isnan(badness).all() else self.columns[int(np.nanargmax(badness))]


def json_number(value: float | None) -> float | None:
    """None for what JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(value)


def json_bytes(content: Mapping[str, Any]) -> NDArray[np.uint8]:
    """(n,) JSON as an array, to lie among others."""
    return np.frombuffer(json.dumps(content, sort_keys=True, allow_nan=False).encode(), np.uint8).copy()


def read_header(arrays: Mapping[str, NDArray[Any]], what: str) -> dict[str, Any]:
    """The JSON object of ``json_bytes`` under ``header``. ValueError if it is not one of format 1."""
    try:
        header = json.loads(arrays["header"].astype(np.uint8).tobytes())
    except (KeyError, ValueError):
        raise ValueError(f"{what} without a header that is JSON: the arrays are damaged or of something else") from None
    if not isinstance(header, dict) or header.get("format") != 1:
        raise ValueError(f"{what} of a format that this release does not read: make them again")
    return header


def kept(scores: Scores, names: Iterable[str]) -> Scores:
    """Without the cohorts that are not among the names."""
    wanted = set(names)
    return replace(scores, cohorts=tuple(c for c in scores.cohorts if c.name in wanted))


def _cell(scores: CohortScores) -> Double:
    return np.array([scores.auc, scores.log_loss])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _joined(parts: Sequence[NDArray[Any]], empty: tuple[int, ...], dtype: Any, axis: int) -> NDArray[Any]:
    return np.concatenate([np.zeros(empty, dtype), *parts], axis=axis).astype(dtype)


def _first_finite(values: Double) -> Int:
    """(C,) first row of each column that is a number; V where none is."""
    there = ~np.isnan(values)
    return np.where(there.any(axis=0), there.argmax(axis=0), len(values)) if len(values) else _zeros(values.shape[1])


def _zeros(count: int) -> Int:
    return np.zeros(count, np.int64)


def _at(values: Double, row: Int) -> Double:
    """(C,) of each column its row; NaN past the last."""
    padded = np.concatenate([values, np.full((1, values.shape[1]), np.nan)])
    taken: Double = padded[row, np.arange(values.shape[1])]
    return taken


def _kept(values: Double, without: NDArray[np.bool_]) -> Double:
    return np.where(without, np.nan, values)


def _nan_reduce(best: np.ufunc, values: Double) -> Any:
    """fmax or fmin down the first axis; NaN where there is no number."""
    return best.reduce(values, axis=0, initial=np.nan)


def _mean(values: Double) -> float:
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else math.nan
