"""Ranking and calibration of predicted clicks, with confidence intervals from a bootstrap over users.

Events of one user depend on each other, so the bootstrap draws whole users with replacement, never events.
Symbols: N events, U users, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

Double = NDArray[np.float64]
Int = NDArray[np.int64]

SLICES: tuple[tuple[str, int, int | None], ...] = (
    ("1", 0, 1), ("2-5", 1, 5), ("6-10", 5, 10), ("11-20", 10, 20), ("21-50", 20, 50), ("51+", 50, None),
)  # fmt: skip
"""Name, first and one past the last 0-based index of an event in its user."""

PROBABILITY_FLOOR = 1e-6
"""Log-loss clips probabilities into [1e-6, 1 − 1e-6]: one sure and wrong event costs 13.8 nats, not infinity."""

CALIBRATION_BINS = 15
"""The usual count for the expected calibration error (Guo et al., arXiv 1706.04599)."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """What ``evaluate`` found. NaN (``None`` in ``by_index``) means undefined: one class only, or no samples."""

    auc: float
    gauc: float
    """AUC inside each user, averaged by the user's events over the users with both labels."""
    log_loss: float
    calibration_error: float
    by_index: dict[str, float | None]
    """AUC of the events at each index in their user, by the names in ``SLICES``."""
    ci95: dict[str, tuple[float, float]]
    """2.5th and 97.5th percentile over bootstrap samples, of auc, gauc and log_loss."""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: NaN becomes null and intervals become lists."""
        return {
            "auc": _json_number(self.auc),
            "gauc": _json_number(self.gauc),
            "log_loss": _json_number(self.log_loss),
            "calibration_error": _json_number(self.calibration_error),
            "by_index": {name: _json_number(value) for name, value in self.by_index.items()},
            "ci95": {name: [_json_number(bound) for bound in interval] for name, interval in self.ci95.items()},
        }


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Second minus first AUC of two predictions of the same events."""

    auc_difference: float
    ci95: tuple[float, float]
    """From the same drawn users for both predictions, so that what they share cancels."""


def evaluate(
    label: ArrayLike,
    probability: ArrayLike,
    user: ArrayLike,
    index: ArrayLike,
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> Metrics:
    """All metrics of N predictions. The interval of a single user is a point: it says nothing of other users.

    label (N,) 0 or 1; probability (N,) in [0, 1]; user (N,) integer codes; index (N,) 0-based index of the event
    in its user. Raises ValueError where there are no events, where only one class occurs, where lengths differ, or
    where a label or a probability is out of range.
    """
    y, p = _checked(label, probability)
    codes, places = _same_length(user, len(y), "user"), _same_length(index, len(y), "index")
    compact, users = _compact_users(codes)
    ranked = _Ranked.of(y, p, compact)
    losses = event_log_loss(y, p)
    user_auc, user_events = _user_aucs(y, p, compact, users)
    user_losses = np.bincount(compact, losses, users)
    sizes = np.bincount(compact, minlength=users).astype(np.float64)

    def sample(counts: Int) -> tuple[float, float, float]:
        return (
            ranked.auc(counts),
            _ratio(counts @ (user_auc * user_events), counts @ user_events),
            _ratio(counts @ user_losses, counts @ sizes),
        )

    drawn = _bootstrap(users, bootstrap_samples, seed, sample)
    auc, gauc, log_loss = sample(np.ones(users, np.int64))
    return Metrics(
        auc=auc,
        gauc=gauc,
        log_loss=log_loss,
        calibration_error=calibration_error(y, p),
        by_index=_by_index(y, p, places),
        ci95=dict(zip(("auc", "gauc", "log_loss"), _intervals(drawn, 3), strict=True)),
    )


def paired_difference(
    label: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    user: ArrayLike,
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """AUC of ``second`` minus AUC of ``first`` (each (N,)) with a bootstrap over users that draws both alike.

    Raises what ``evaluate`` raises.
    """
    y, p = _checked(label, first)
    _, q = _checked(label, second)
    compact, users = _compact_users(_same_length(user, len(y), "user"))
    one, two = _Ranked.of(y, p, compact), _Ranked.of(y, q, compact)

    def sample(counts: Int) -> tuple[float]:
        return (two.auc(counts) - one.auc(counts),)

    drawn = _bootstrap(users, bootstrap_samples, seed, sample)
    return PairedDifference(sample(np.ones(users, np.int64))[0], _intervals(drawn, 1)[0])


def event_index(user: ArrayLike) -> Int:
    """(N,) how many earlier events of the array belong to the same user."""
    codes = np.asarray(user)
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = _run_starts(ordered)
    index = np.empty(len(codes), dtype=np.int64)
    index[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    return index


def auc(label: ArrayLike, score: ArrayLike) -> float:
    """Area under the ROC curve of N scores (any order-keeping scale); ties count half. NaN with one class only."""
    y, s = np.asarray(label, dtype=np.int8), np.asarray(score, dtype=np.float64)
    return _Ranked.of(y, s, np.zeros(len(y), np.int64)).auc(np.ones(1, np.int64))


def event_log_loss(label: ArrayLike, probability: ArrayLike) -> Double:
    """(N,) −log of the probability given to what happened, clipped at ``PROBABILITY_FLOOR``."""
    y = np.asarray(label)
    p = np.clip(np.asarray(probability, dtype=np.float64), PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return -np.log(np.where(y == 1, p, 1 - p))


def calibration_error(label: ArrayLike, probability: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error over bins of equal mass: Σ share of the bin · |mean probability − mean label|.

    Bins hold N/bins events each by rank; events of one probability share the bin of their mean rank, so the order
    of the events changes nothing.
    """
    y, p = np.asarray(label, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    slot = np.minimum(((_midranks(p) - 0.5) * bins / len(p)).astype(np.int64), bins - 1)
    gaps = np.bincount(slot, p - y, bins)
    return float(np.abs(gaps).sum() / len(p))


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Events sorted once by score, so that the AUC of any weighting by user is one pass."""

    label: NDArray[np.int8]
    user: Int
    group: Int
    """(N,) rises by one where the score rises: ties share it."""

    @staticmethod
    def of(label: NDArray[np.int8], score: Double, user: Int) -> _Ranked:
        order = np.argsort(score, kind="stable")
        ordered = score[order]
        group = np.cumsum(np.append(np.zeros(min(len(ordered), 1), np.int64), ordered[1:] != ordered[:-1]))
        return _Ranked(label[order], user[order], group)

    def auc(self, counts: Int) -> float:
        """AUC with every event counted ``counts[user]`` times; NaN where one class is missing."""
        return float(_weighted_auc(self.label, self.user, self.group, counts))


@numba.njit(nogil=True, cache=True)
def _weighted_auc(label: NDArray[np.int8], user: Int, group: Int, counts: Int) -> float:
    """Twice the won pairs, in whole numbers (exact below 3e9 events), over twice all pairs."""
    won, below, positives, negatives, current = 0, 0, 0, 0, -1
    for k in range(len(label)):
        if group[k] != current:
            won += positives * (2 * below + negatives)
            below += negatives
            positives, negatives, current = 0, 0, group[k]
        weight = counts[user[k]]
        if label[k] == 1:
            positives += weight
        else:
            negatives += weight
    won += positives * (2 * below + negatives)
    below += negatives
    total = 0
    for k in range(len(label)):
        total += counts[user[k]]
    pairs = (total - below) * below
    return won / (2.0 * pairs) if pairs > 0 else np.nan


def _user_aucs(y: NDArray[np.int8], p: Double, user: Int, users: int) -> tuple[Double, Double]:
    """(U,) AUC inside each user and (U,) its events; both 0 for a user with one class only."""
    order = np.lexsort((p, user))
    u, s, label = user[order], p[order], y[order]
    starts = np.flatnonzero(np.r_[True, (u[1:] != u[:-1]) | (s[1:] != s[:-1])])
    ends = np.append(starts[1:], len(u))
    sizes = np.bincount(u, minlength=users).astype(np.float64)
    first = np.cumsum(sizes) - sizes
    ranks = np.repeat((starts + 1 + ends) / 2, ends - starts) - first[u]
    positives = np.bincount(u, label, users)
    negatives = sizes - positives
    pairs = positives * negatives
    rank_sum = np.bincount(u, ranks * label, users)
    both = pairs > 0
    aucs = np.where(both, (rank_sum - positives * (positives + 1) / 2) / np.where(both, pairs, 1), 0.0)
    return aucs, np.where(both, sizes, 0.0)


def _midranks(values: Double) -> Double:
    """(N,) ranks from 1; ties share their mean rank."""
    order = np.argsort(values, kind="stable")
    starts = _run_starts(values[order])
    ends = np.append(starts[1:], len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return ranks


def _run_starts(ordered: NDArray[Any]) -> Int:
    changed = np.ones(len(ordered), dtype=bool)
    changed[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(changed)


def _by_index(y: NDArray[np.int8], p: Double, index: NDArray[Any]) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for name, first, past in SLICES:
        inside = (index >= first) & (index < (np.inf if past is None else past))
        value = auc(y[inside], p[inside])
        result[name] = None if math.isnan(value) else value
    return result


def _bootstrap(users: int, samples: int, seed: int, sample: Callable[[Int], tuple[float, ...]]) -> list[Any]:
    if samples < 0:
        raise ValueError(f"bootstrap_samples is {samples}; give 0 to skip the intervals, or 1000 as is usual")
    rng = np.random.default_rng(seed)
    return [sample(np.bincount(rng.integers(users, size=users), minlength=users)) for _ in range(samples)]


def _intervals(drawn: list[Any], width: int) -> list[tuple[float, float]]:
    columns = np.array(drawn, dtype=np.float64).reshape(-1, width)
    intervals = []
    for k in range(width):
        finite = columns[np.isfinite(columns[:, k]), k]
        low, high = np.percentile(finite, (2.5, 97.5)) if len(finite) else (math.nan, math.nan)
        intervals.append((float(low), float(high)))
    return intervals


def _checked(label: ArrayLike, probability: ArrayLike) -> tuple[NDArray[np.int8], Double]:
    y, p = np.asarray(label), np.asarray(probability, dtype=np.float64)
    if not len(y):
        raise ValueError("no events to score: the online part of the protocol is empty")
    _same_length(p, len(y), "probability")
    if not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("labels must be 0 or 1; check the label rule of the event schema")
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("probabilities must lie in [0, 1]; NaN, or logits passed as probabilities?")
    if bool((y == y[0]).all()):
        raise ValueError(
            f"all {len(y)} labels are {int(y[0])}: AUC needs both classes; check the label rule of the event schema"
        )
    return y.astype(np.int8), p


def _same_length(values: ArrayLike, n: int, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(f"{name} has shape {array.shape}, labels have shape ({n},): give one entry per event")
    return array


def _compact_users(codes: NDArray[Any]) -> tuple[Int, int]:
    present, compact = np.unique(codes, return_inverse=True)
    return compact.reshape(-1).astype(np.int64), len(present)


def _ratio(numerator: Any, denominator: Any) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def _json_number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
