"""Summed feature embeddings and the training loop that the network baselines share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from learner.baselines.problem import Entities, Events, Int


class FeatureSum(nn.Module):
    """Σ weight · embedding of an entity's feature columns: (B,) codes -> (B, width); zeros without features."""

    def __init__(self, entities: Entities, width: int, scale: float) -> None:
        super().__init__()
        self.features = entities.features
        self.table = nn.Parameter(torch.randn(max(entities.width, 1), width) * scale)

    def forward(self, codes: Int) -> torch.Tensor:
        """The rows of ``codes`` differ in length: they go to ``embedding_bag`` flat, with offsets."""
        starts = self.features.starts[codes]
        lengths = self.features.starts[codes + 1] - starts
        offsets = np.cumsum(lengths) - lengths
        flat = np.repeat(starts - offsets, lengths) + np.arange(int(lengths.sum()))
        return functional.embedding_bag(
            torch.from_numpy(self.features.columns[flat]),
            self.table,
            torch.from_numpy(offsets),
            mode="sum",
            per_sample_weights=torch.from_numpy(self.features.weights[flat]),
        )


def item_embedding(items: int, width: int, scale: float, met: Int) -> nn.Embedding:
    """Random rows for the items in ``met`` and zeros for all others, whose features alone speak."""
    embedding = nn.Embedding(items, width)
    known = np.zeros((items, 1), np.float32)
    known[met] = 1
    with torch.no_grad():
        embedding.weight.normal_(0, scale).mul_(torch.from_numpy(known))
    return embedding


def run_epochs(
    events: Events,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Events], torch.Tensor],
    *,
    epochs: int,
    batch: int,
    rng: np.random.Generator,
) -> None:
    """Shuffled passes over the events, the rate falling linearly to zero."""
    total = max(epochs * -(-len(events) // batch), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    for _ in range(epochs):
        order = rng.permutation(len(events))
        for start in range(0, len(order), batch):
            take_step(optimizer, loss(events.take(order[start : start + batch])))
            schedule.step()


def take_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip_norm: float = float("inf")) -> None:
    """One gradient step, its gradient shortened to ``clip_norm``."""
    optimizer.zero_grad()
    loss.backward()
    if clip_norm < float("inf"):
        nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), clip_norm)
    optimizer.step()


def batch_size(events: Events, steps: int, largest: int) -> int:
    """Events in a step, so that an epoch has about ``steps`` of them: small data needs as many steps as large."""
    return int(np.clip(len(events) // steps, 16, largest))
