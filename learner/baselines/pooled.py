"""The paper's baseline: one network for all users, without adaptation, and the same fine-tuned on the stream.

    e = E_i + C·item features;  x = W·user features
    z = bias_i + w·e + w'·x + e·Ax [+ MLP(e, x)]

trained on the pooled offline events. Its settings and the fine-tuning rate are chosen on ``Problem.holdout``.
What limits it is that few users share many features, so their dropout matters more than the network's form.
Fine-tuning gains partly by following whoever is on the stream just now, not only by learning new items.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from learner.baselines.embedding import FeatureSum, batch_size, item_embedding, run_epochs, take_step
from learner.baselines.problem import Events, Float, Int, Problem, mean_log_loss, smoothed_rate

USER_WIDTH = 16
"""Width of x; wider gains nothing."""

INITIAL_SCALE = 0.05
"""Standard deviation of fresh embeddings: small, so that training starts at the overall click rate."""

STEPS_PER_EPOCH = 300
LARGEST_BATCH = 2048

PREDICTION_CHUNK = 65536
"""Events predicted at once; bounds memory only."""

FINE_TUNE_BATCH = 256
"""Events predicted together on the stream, then learned from in one step."""

FINE_TUNE_RATES = (0.03, 0.1, 0.3, 1.0)
"""Candidate rates of plain gradient descent. Adam, whose steps forget how rare an item is, gains half as much."""

CLIP_NORM = 1.0
"""Largest norm of a fine-tuning gradient: at a rate of 1 a steeper step can diverge."""


@dataclass(frozen=True, slots=True)
class PooledSettings:
    """What the search chooses."""

    item_width: int
    hidden: int
    """Units of the MLP; 0 leaves it out."""
    user_dropout: float
    weight_decay: float
    """AdamW's on the item embeddings; a tenth of it on the item biases."""
    learning_rate: float
    epochs: int


GRID = (
    PooledSettings(16, 0, 0.5, 0.1, 5e-3, 3),
    PooledSettings(32, 0, 0.5, 0.3, 1e-2, 3),
    PooledSettings(32, 0, 0.8, 0.3, 1e-2, 3),
    PooledSettings(32, 0, 0.5, 0.5, 1e-2, 5),
    PooledSettings(32, 64, 0.5, 0.3, 5e-3, 3),
)


class PooledNetwork(nn.Module):
    """(B,) user and item codes -> (B,) logits."""

    def __init__(self, problem: Problem, settings: PooledSettings) -> None:
        super().__init__()
        items, width = len(problem.items), settings.item_width
        self.item = item_embedding(items, width, INITIAL_SCALE, problem.offline.item)
        self.item_bias = item_embedding(items, 1, 0.0, problem.offline.item)
        self.item_features = FeatureSum(problem.items, width, INITIAL_SCALE)
        self.user_features = FeatureSum(problem.users, USER_WIDTH, INITIAL_SCALE)
        self.user_dropout = nn.Dropout(settings.user_dropout)
        self.item_weight = nn.Linear(width, 1, bias=False)
        self.user_weight = nn.Linear(USER_WIDTH, 1, bias=False)
        self.cross = nn.Linear(USER_WIDTH, width)
        self.mlp: nn.Module | None = None
        if settings.hidden:
            self.mlp = nn.Sequential(
                nn.Linear(width + USER_WIDTH, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 1)
            )
        rate = smoothed_rate(problem)
        self.bias = nn.Parameter(torch.tensor(float(np.log(rate / (1 - rate)))))

    def forward(self, user: Int, item: Int) -> torch.Tensor:
        """User codes are used only to look up features: two users with the same features are one."""
        codes = torch.from_numpy(item)
        e = self.item(codes) + self.item_features(item)
        x = self.user_dropout(self.user_features(user))
        z = self.item_bias(codes) + self.item_weight(e) + self.user_weight(x) + (e * self.cross(x)).sum(1, keepdim=True)
        if self.mlp is not None:
            z = z + self.mlp(torch.cat([e, x], 1))
        return z.squeeze(1) + self.bias  # type: ignore[no-any-return]

    def loss(self, events: Events) -> torch.Tensor:
        """Mean log-loss."""
        return functional.binary_cross_entropy_with_logits(
            self(events.user, events.item), torch.from_numpy(events.label)
        )

    def optimizer(self, rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW with the decay on what belongs to single items."""
        tables = (self.item.weight, self.item_bias.weight)
        rest = [p for p in self.parameters() if all(p is not table for table in tables)]
        groups = [
            {"params": [tables[0]], "weight_decay": weight_decay},
            {"params": [tables[1]], "weight_decay": weight_decay * 0.1},
            {"params": rest, "weight_decay": 1e-3},
        ]
        return torch.optim.AdamW(groups, lr=rate)


def pooled_predictions(
    problem: Problem, seed: int, progress: Callable[[str], None], fine_tuned: bool = True
) -> dict[str, Float]:
    """``pooled`` (frozen on the stream) and, if asked, ``pooled_finetuned``, each (N,) for the online events."""
    trial = problem.holdout()
    settings, network = _search(trial, seed, progress)
    rate = _search_rate(trial, network, settings) if fine_tuned else 0.0
    progress(f"pooled: chose {settings}, fine-tuning rate {rate:g}; training on all offline events")
    network = train(problem, settings, seed)
    result = {"pooled": predict(network, problem.online)}
    if fine_tuned:
        result["pooled_finetuned"] = fine_tune(network, problem.online, rate)
    return result


def train(problem: Problem, settings: PooledSettings, seed: int) -> PooledNetwork:
    """A network that learned the offline events."""
    torch.manual_seed(seed)
    network = PooledNetwork(problem, settings)
    run_epochs(
        problem.offline,
        network.optimizer(settings.learning_rate, settings.weight_decay),
        network.loss,
        epochs=settings.epochs,
        batch=batch_size(problem.offline, STEPS_PER_EPOCH, LARGEST_BATCH),
        rng=np.random.default_rng(seed),
    )
    return network


@torch.no_grad()
def predict(network: PooledNetwork, events: Events) -> Float:
    """(N,) probabilities; the network stays as it is."""
    network.eval()
    parts = [np.empty(0, np.float32)]
    for start in range(0, len(events), PREDICTION_CHUNK):
        chunk = events.take(slice(start, start + PREDICTION_CHUNK))
        parts.append(torch.sigmoid(network(chunk.user, chunk.item)).numpy())
    network.train()
    return np.concatenate(parts)


def fine_tune(network: PooledNetwork, events: Events, rate: float) -> Float:
    """(N,) probabilities of the stream: each micro-batch is predicted, then one step is taken on it.

    Works on a copy of ``network``, without dropout.
    """
    live = deepcopy(network)
    live.user_dropout.p = 0.0
    optimizer = torch.optim.SGD(live.parameters(), lr=rate)
    parts = [np.empty(0, np.float32)]
    for start in range(0, len(events), FINE_TUNE_BATCH):
        batch = events.take(slice(start, start + FINE_TUNE_BATCH))
        parts.append(predict(live, batch))
        take_step(optimizer, live.loss(batch), CLIP_NORM)
    return np.concatenate(parts)


def _search(trial: Problem, seed: int, progress: Callable[[str], None]) -> tuple[PooledSettings, PooledNetwork]:
    if not len(trial.offline):
        return GRID[0], train(trial, GRID[0], seed)
    found: list[tuple[float, PooledSettings, PooledNetwork]] = []
    for settings in GRID:
        network = train(trial, settings, seed)
        found.append((mean_log_loss(trial.online, predict(network, trial.online)), settings, network))
        progress(f"pooled: {settings} has validation log-loss {found[-1][0]:.4f}")
    _, settings, network = min(found, key=lambda f: f[0])
    return settings, network


def _search_rate(trial: Problem, network: PooledNetwork, settings: PooledSettings) -> float:
    if not len(trial.offline):
        return FINE_TUNE_RATES[0]
    losses = [mean_log_loss(trial.online, fine_tune(network, trial.online, rate)) for rate in FINE_TUNE_RATES]
    return FINE_TUNE_RATES[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]
