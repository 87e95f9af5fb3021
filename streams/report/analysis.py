"""The numbers behind a report's figures. Pure: arrays in, arrays out.

Symbols: N scored events, U users, W windows of the stream, K bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.metrics import auc, event_log_loss, paired_difference
from streams.results import POINTS, ScoredStream

MODEL = "coldstream"
"""The model's name beside those of its baselines."""

WINDOW_EVENTS = 500
"""Fewest events of a window: the AUC of fewer says more about the draw than about the model (SE above .025)."""

MOST_WINDOWS = 24
"""Most windows of the learning curve: more would be a jagged line at the width of a phone."""

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lift:
    """The model's AUC less a baseline's, in points, with the 95% interval of the paired difference."""

    points: float
    low: float
    """NaN without bootstrap samples, as ``high``"""
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """AUC along the stream, for the model and every baseline."""

    window_end: NDArray[np.int64]
    """(W,) events up to the end of each window"""
    windowed: Mapping[str, Float]
    """name -> (W,) AUC of the window's events alone; NaN where one class is missing"""
    cumulative: Mapping[str, Float]
    """name -> (W,) AUC of all events up to the window's end"""


@dataclass(frozen=True, slots=True)
class Reliability:
    """Predicted against observed, in K equal bins of probability."""

    predicted: Float
    """(K,) mean prediction, NaN where the bin is empty"""
    observed: Float
    """(K,) share of label 1, NaN where the bin is empty"""
    count: NDArray[np.int64]
    """(K,)"""


def predictors(scored: ScoredStream) -> dict[str, NDArray[np.float32]]:
    """The model first, then the baselines in their order."""
    return {MODEL: scored.probability, **scored.baselines}


def paired_lifts(scored: ScoredStream, samples: int) -> dict[str, Lift]:
    """The model's lift over every baseline; the bootstrap draws the same users for both.

    One thread per baseline: the bootstrap is the report's longest part by far, and its kernel holds no GIL.
    """

    def lift(baseline: NDArray[np.float32]) -> Lift:
        found = paired_difference(scored.label, baseline, scored.probability, scored.user, bootstrap_samples=samples)
        low, high = found.ci95
        return Lift(POINTS * found.auc_difference, POINTS * low, POINTS * high)

    with ThreadPoolExecutor() as pool:
        return dict(zip(scored.baselines, pool.map(lift, scored.baselines.values()), strict=True))


def learning_curve(scored: ScoredStream) -> LearningCurve:
    """Windows of equal length, at most ``MOST_WINDOWS`` and of ``WINDOW_EVENTS`` events or more."""
    n, y = len(scored), scored.label
    windows = max(1, min(MOST_WINDOWS, n // WINDOW_EVENTS))
    edge = np.arange(windows + 1, dtype=np.int64) * n // windows
    spans = list(zip(edge[:-1].tolist(), edge[1:].tolist(), strict=True))
    names = predictors(scored)
    return LearningCurve(
        edge[1:],
        {name: np.array([auc(y[start:end], p[start:end]) for start, end in spans]) for name, p in names.items()},
        {name: np.array([auc(y[:end], p[:end]) for _, end in spans]) for name, p in names.items()},
    )


def reliability(label: NDArray[np.int8], probability: NDArray[np.float32], bins: int = 10) -> Reliability:
    """Bins of equal width over [0, 1]; a prediction of 1 belongs to the last."""
    code = np.minimum((probability.astype(np.float64) * bins).astype(np.int64), bins - 1)
    count = np.bincount(code, minlength=bins)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(code, weights=probability, minlength=bins) / count
        observed = np.bincount(code, weights=label, minlength=bins) / count
    return Reliability(predicted, observed, count)


def wilson_interval(share: Float, count: NDArray[np.int64]) -> tuple[Float, Float]:
    """95% interval of a share of ``count`` trials (Wilson 1927), NaN where there are none."""
    z, n = 1.959964, count.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def user_gain(scored: ScoredStream, baseline: str | None) -> Float:
    """(U,) mean log-loss of the baseline less the model's over each user's events, in nats: above 0 the user gains.

    Without a baseline the model stands against the stream's own share of label 1. NaN for a user without events.
    """
    constant = np.full(len(scored), scored.label.mean())
    reference = constant if baseline is None else scored.baselines[baseline]
    gain = event_log_loss(scored.label, reference) - event_log_loss(scored.label, scored.probability)
    users = len(scored.user_ids)
    with np.errstate(invalid="ignore"):
        mean: Float = np.bincount(scored.user, gain, users) / np.bincount(scored.user, minlength=users)
    return mean
