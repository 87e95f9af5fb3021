"""The same Bayesian head on a conventional factorization: what is left out is the meta-training alone.

    z = b_i + u·[1, V_i],  b_i = bias_i + c·item features,  V_i = E_i + C·item features

is fitted to the offline events with Gaussian priors on u, V and the biases (maximum a posteriori). A Gaussian
fitted to the trained users' u is the prior of every new user, who is then followed by the full-covariance filter
of ``learner.scan`` event by event. Penalties, the prior's scale and the drift are chosen on ``Problem.holdout``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from learner.baselines.embedding import FeatureSum, batch_size, item_embedding, run_epochs
from learner.baselines.problem import Events, Float, Int, Problem, mean_log_loss, smoothed_rate
from learner.scan import kalman_scan

DIM = 16
"""d, as the meta-trained head's default."""

KAPPA = np.pi / 8
"""MacKay's probit factor, untuned: what a Gaussian of the logit does to its mean probability."""

JITTER = 1e-6
"""Added to the variances: keeps the covariance positive where fewer users than dimensions were fitted."""

LEARNING_RATE = 2e-2
STEPS_PER_EPOCH = 85
LARGEST_BATCH = 8192
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Candidate factors on the fitted covariance: penalized embeddings vary less than true tastes."""

DRIFTS = (0.0, 1e-4, 1e-3)
"""Candidate variances added to each dimension after an event."""


@dataclass(frozen=True, slots=True)
class FactorizationSettings:
    """Precisions of the Gaussian priors, and the passes over the events."""

    user_precision: float
    item_precision: float
    epochs: int


GRID = tuple(
    FactorizationSettings(user, item, epochs) for user, item, epochs in ((1, 1, 6), (1, 3, 6), (1, 3, 10), (0.3, 3, 6))
)


class Factorization(nn.Module):
    """(B,) user and item codes -> (B,) logits."""

    def __init__(self, problem: Problem, settings: FactorizationSettings) -> None:
        super().__init__()
        self.settings = settings
        self.user = nn.Embedding(len(problem.users), DIM)
        nn.init.normal_(self.user.weight, 0, 0.1)
        self.item = item_embedding(len(problem.items), DIM - 1, 0.1, problem.offline.item)
        self.item_bias = item_embedding(len(problem.items), 1, 0.0, problem.offline.item)
        self.features = FeatureSum(problem.items, DIM, 0.02)
        rate = smoothed_rate(problem)
        self.bias = nn.Parameter(torch.tensor(float(np.log(rate / (1 - rate)))))
        self.user_share = _inverse_counts(problem.offline.user, len(problem.users))
        self.item_share = _inverse_counts(problem.offline.item, len(problem.items))

    def rows(self, item: Int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, d) ψ = [1, V_i] and (B,) the base b_i."""
        codes, features = torch.from_numpy(item), self.features(item)
        psi = torch.cat([torch.ones(len(item), 1), self.item(codes) + features[:, 1:]], 1)
        return psi, self.item_bias(codes).squeeze(1) + features[:, 0] + self.bias

    def loss(self, events: Events) -> torch.Tensor:
        """Mean log-loss plus the priors, each entity's penalty spread evenly over its events."""
        user, item = torch.from_numpy(events.user), torch.from_numpy(events.item)
        psi, base = self.rows(events.item)
        u = self.user(user)
        fit = functional.binary_cross_entropy_with_logits(base + (u * psi).sum(1), torch.from_numpy(events.label))
        of_user = self.settings.user_precision * (u**2).sum(1) * self.user_share[user]
        of_item = (self.settings.item_precision * (self.item(item) ** 2).sum(1)) * self.item_share[item]
        of_bias = self.item_bias(item).squeeze(1) ** 2 * self.item_share[item]
        penalty: torch.Tensor = (of_user + of_item + of_bias).mean() / 2
        return fit + penalty


@dataclass(frozen=True, slots=True)
class Prior:
    """A Gaussian over user embeddings, and how it drifts."""

    mean: NDArray[np.float64]
    """(d,)"""
    covariance: NDArray[np.float64]
    """(d, d)"""
    drift: float = 0.0

    def scaled(self, scale: float, drift: float) -> Prior:
        """The same mean with the covariance times ``scale``."""
        return Prior(self.mean, self.covariance * scale, drift)


def non_meta_same_head(problem: Problem, seed: int, progress: Callable[[str], None]) -> Float:
    """(N,) probabilities of the online events in order, each before its label is used."""
    settings, scale, drift = _search(problem.holdout(), seed, progress)
    progress(f"non-meta: chose {settings}, scale {scale:g}, drift {drift:g}; training on all offline events")
    model = train(problem, settings, seed)
    return follow(model, fitted_prior(model, problem.offline).scaled(scale, drift), problem.online)


def train(problem: Problem, settings: FactorizationSettings, seed: int) -> Factorization:
    """The factorization of the offline events."""
    torch.manual_seed(seed)
    model = Factorization(problem, settings)
    run_epochs(
        problem.offline,
        torch.optim.Adam(model.parameters(), lr=LEARNING_RATE),
        model.loss,
        epochs=settings.epochs,
        batch=batch_size(problem.offline, STEPS_PER_EPOCH, LARGEST_BATCH),
        rng=np.random.default_rng(seed),
    )
    return model


def fitted_prior(model: Factorization, offline: Events) -> Prior:
    """Mean and covariance of the embeddings of the users who had offline events."""
    trained = model.user.weight.detach().numpy()[np.unique(offline.user)].astype(np.float64)
    if len(trained) < 2:
        return Prior(np.zeros(DIM), np.eye(DIM))
    return Prior(trained.mean(0), np.cov(trained.T) + JITTER * np.eye(DIM))


@torch.no_grad()
def follow(model: Factorization, prior: Prior, events: Events) -> Float:
    """(N,) probabilities of a stream of new users: each starts at the prior; predict, then update, one by one."""
    order = np.argsort(events.user, kind="stable")
    ordered = events.take(order)
    changes = np.flatnonzero(ordered.user[1:] != ordered.user[:-1]) + 1
    starts = np.concatenate([[0], changes, [len(ordered)]]).astype(np.int64) if len(ordered) else np.zeros(1, np.int64)
    mean = torch.from_numpy(prior.mean.astype(np.float32))
    psi, base = model.rows(ordered.item)
    logit = kalman_scan(
        psi,
        base,
        torch.from_numpy(ordered.label),
        torch.ones(len(ordered)),
        mean.repeat(len(starts) - 1, 1),
        torch.from_numpy(prior.covariance.astype(np.float32)),
        torch.tensor(float(KAPPA)),
        torch.full((DIM,), prior.drift),
        torch.from_numpy(starts),
    )
    probability = np.empty(len(events), np.float32)
    probability[order] = torch.sigmoid(logit).numpy()
    return probability


def _search(trial: Problem, seed: int, progress: Callable[[str], None]) -> tuple[FactorizationSettings, float, float]:
    if not len(trial.offline):
        return GRID[0], 1.0, 0.0
    found: list[tuple[float, FactorizationSettings, float, float]] = []
    for settings in GRID:
        model = train(trial, settings, seed)
        prior = fitted_prior(model, trial.offline)
        for scale, drift in product(SCALES, DRIFTS):
            loss = mean_log_loss(trial.online, follow(model, prior.scaled(scale, drift), trial.online))
            found.append((loss, settings, scale, drift))
        best = min(found[-len(SCALES) * len(DRIFTS) :], key=lambda f: f[0])
        progress(f"non-meta: {settings} has validation log-loss {best[0]:.4f} at scale {best[2]:g}, drift {best[3]:g}")
    return min(found, key=lambda f: f[0])[1:]


def _inverse_counts(codes: Int, size: int) -> torch.Tensor:
    counts = np.bincount(codes, minlength=size)
    return torch.from_numpy((1 / np.maximum(counts, 1)).astype(np.float32))
