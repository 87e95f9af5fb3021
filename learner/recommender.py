"""The trainable model: the fixed part θ and the meta-learned start of every user's adaptive part.

    e_i = E[i] + C·features_i      ψ_i = [1, P·e_i]      b_i = w·e_i + bias_i      m_u = φ_0 + W·features_u

Item embeddings and biases are variational: a Gaussian posterior per entry (mean, log-σ) under a learned prior
scale per dimension, one sample a step; the means serve. After *Learning to Recommend via Meta Parameter
Partition* (arXiv 1912.04108) for the split, Blundell et al. 2015 (arXiv 1505.05424) for the posterior.

Symbols: V items of the vocabulary, D item embedding, d and e widths of the two filters, G grades, B users and
T events of a batch, U distinct items of it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.settings import LearnerSettings
from learner.features import FeatureEncoder, SparseRows
from learner.scan import gradient_scan, kalman_scan
from learner.serving import FirstFilter, FixedPart, Float, SecondFilter

LOGISTIC_VARIANCE = 0.3927
"""π/8: the probit approximation of a logistic under a Gaussian (MacKay 1992), scaled by the learned κ."""
DENSE_FEATURE_COLUMNS = 256
"""Up to so many feature columns the items' features are a dense matrix, one product a step; beyond it a million items
would need gigabytes, and a sparse sum takes its place."""
ITEM_TABLES = (
    "item_embedding", "item_bias", "item_embedding_log_sigma", "item_bias_log_sigma", "ordinal_item",
)  # fmt: skip
"""Parameters with a row for each item of the vocabulary"""
NEW_LOG_SIGMA = {"item_embedding_log_sigma": math.log(0.1), "item_bias_log_sigma": math.log(0.2)}
"""Where the posterior of an item begins that nothing was learned of; other tables begin at zero, but for the noise
that breaks the symmetry before the offline stage"""
USER_FEATURE_RANK = 8
"""W is a product of rank 8 per feature: enough for a few dozen categories, and starts at zero gently."""


@dataclass(frozen=True, slots=True)
class RecommenderSpec:
    """What fixes the model's shapes besides the settings."""

    learner: LearnerSettings
    item_ids: tuple[str, ...]
    item_features: SparseRows
    """V rows"""
    item_encoder: FeatureEncoder
    user_encoder: FeatureEncoder
    grades: tuple[float, ...]
    """Graded values in rising order; empty where neither targets nor the auxiliary loss use them."""
    like_rate: tuple[float, ...]
    """(G,) share of label 1 among offline events of each grade: where graded targets start."""


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """B users' whole sequences, one after the other, in each user's own event order."""

    starts: Tensor
    """(B + 1,) int64, on the CPU"""
    item: Tensor
    """(T,) rows of the vocabulary"""
    label: Tensor
    """(T,) float32"""
    grade: Tensor
    """(T,) index into the grades, G where there is none"""
    index: Tensor
    """(T,) how many events the user had before"""
    user_columns: Tensor
    """(B, K) padded feature columns of the users"""
    user_weights: Tensor
    """(B, K) their weights, 0 for padding"""

    @property
    def users(self) -> int:
        """B"""
        return len(self.starts) - 1


@dataclass(frozen=True, slots=True)
class Unrolled:
    """Test-then-train over a batch: every logit came before its label was used."""

    logit: Tensor
    """(T,)"""
    embedding: Tensor
    """(U, D) e_i of the batch's distinct items"""
    position: Tensor
    """(T,) row of ``embedding`` of each event's item"""


class KalmanStart(nn.Module):
    """φ_0, S_0 = AA', κ and q of a filter, all learned on a log scale where they must stay positive."""

    def __init__(self, dim: int, full: bool, initialization: list[float], variance: float, drift: float) -> None:
        super().__init__()
        self.initialization = nn.Parameter(torch.tensor(initialization))
        self.log_scale = nn.Parameter(torch.full((dim,), math.log(variance)))
        self.lower = nn.Parameter(torch.zeros(dim, dim)) if full else None
        self.log_drift = nn.Parameter(torch.full((dim,), math.log(drift)))
        self.log_kappa = nn.Parameter(torch.zeros(()))

    def covariance(self) -> Tensor:
        """(d, d) when full, (d,) when diagonal."""
        if self.lower is None:
            return torch.exp(self.log_scale)
        A = torch.tril(self.lower, -1) + torch.diag(torch.exp(self.log_scale / 2))
        return A @ A.T

    def kappa(self) -> Tensor:
        """κ·π/8, ()"""
        return torch.exp(self.log_kappa) * LOGISTIC_VARIANCE

    def drift(self) -> Tensor:
        """q, (d,)"""
        return torch.exp(self.log_drift)


class GradientStart(nn.Module):
    """φ_0 and the meta-learned step sizes of the paper's gradient head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.initialization = nn.Parameter(torch.zeros(dim))
        self.log_rate = nn.Parameter(torch.full((dim,), math.log(0.3)))
        self.log_tau = nn.Parameter(torch.tensor(math.log(10.0)))
        self.log_alpha = nn.Parameter(torch.tensor(math.log(0.5)))

    def decay(self, index: Tensor) -> Tensor:
        """(T,) (1 + n/τ)^−α"""
        return (1 + index / torch.exp(self.log_tau)) ** -torch.exp(self.log_alpha)


class Recommender(nn.Module):
    """θ, φ_0 and what belongs to it. ``training`` mode samples the item posterior, ``eval`` uses its means."""

    def __init__(self, spec: RecommenderSpec) -> None:
        super().__init__()
        learner = spec.learner
        items, width, d, grades = len(spec.item_ids), learner.item_dim, learner.dim, len(spec.grades)
        self.spec = spec
        self.item_embedding = nn.Parameter(torch.randn(items, width) * 0.02)
        self.item_bias = nn.Parameter(torch.zeros(items))
        embedding_log_sigma, bias_log_sigma = NEW_LOG_SIGMA.values()
        self.item_embedding_log_sigma = nn.Parameter(torch.full((items, width), embedding_log_sigma))
        self.item_bias_log_sigma = nn.Parameter(torch.full((items,), bias_log_sigma))
        self.prior_log_scale = nn.Parameter(torch.full((width,), math.log(0.2)))
        self.prior_bias_log_scale = nn.Parameter(torch.tensor(math.log(0.5)))
        self.item_feature_weights = nn.Parameter(torch.randn(spec.item_encoder.width, width) * 0.05)
        self.base = nn.Linear(width, 1)
        self.projection = nn.Linear(width, d - 1)
        self.user_factors = nn.Parameter(torch.randn(spec.user_encoder.width, USER_FEATURE_RANK) * 0.1)
        fields = len(spec.user_encoder.encoded)
        self.user_projection = nn.Parameter(torch.zeros(fields, USER_FEATURE_RANK, d))
        self.head: KalmanStart | GradientStart
        if learner.head == "gradient":
            self.head = GradientStart(d)
        else:
            self.head = KalmanStart(d, learner.head == "full", [0.0] * d, variance=0.3, drift=math.exp(-7))
        self.log_weight = nn.Parameter(torch.zeros(()))
        if learner.second_filter:
            e = learner.second_dim
            self.second = KalmanStart(e, True, [0.0, 2.0] + [0.0] * (e - 2), variance=0.02, drift=math.exp(-8))
            self.second_log_weight = nn.Parameter(torch.zeros(()))
            self.second_projection = nn.Linear(width, e - 2)
            nn.init.normal_(self.second_projection.weight, 0, 0.02)
        if learner.graded_targets and grades:
            self.grade_target = nn.Parameter(_graded_start(spec.like_rate))
            self.grade_log_weight = nn.Parameter(torch.zeros(grades))
        if learner.ordinal_auxiliary > 0 and grades > 1:
            self.ordinal_slope = nn.Parameter(torch.ones(grades - 1))
            self.ordinal_threshold = nn.Parameter(torch.linspace(3, -1.5, grades - 1))
            self.ordinal_item = nn.Parameter(torch.zeros(items, grades - 1))
            self.ordinal_projection = nn.Parameter(torch.zeros(width, grades - 1))
        self.register_item_features(spec)
        field_of = torch.from_numpy(spec.user_encoder.field_of_column())
        self.register_buffer("user_field", field_of, persistent=False)

    # --- the forward pass -------------------------------------------------------------------------------------

    def embeddings(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """e (U, D) and item biases (U,) of the given rows: a sample of the posterior in training, else its mean."""
        e, bias = self.item_embedding.index_select(0, items), self.item_bias.index_select(0, items)
        if self.training:
            sigma, bias_sigma = self.item_embedding_log_sigma, self.item_bias_log_sigma
            e = torch.addcmul(e, torch.exp(sigma.index_select(0, items)), torch.randn_like(e))
            bias = bias + torch.exp(bias_sigma.index_select(0, items)) * torch.randn_like(bias)
        if self.spec.item_encoder.width:
            e = e + self._item_feature_part(items)
        return e, bias

    def register_item_features(self, spec: RecommenderSpec) -> None:
        """Takes in the features of the spec's vocabulary, in place of those it had."""
        self.dense_features = spec.item_encoder.width <= DENSE_FEATURE_COLUMNS
        columns, weights = padded(spec.item_features)
        if self.dense_features:
            dense = torch.zeros(len(spec.item_ids), spec.item_encoder.width)
            if spec.item_encoder.width:
                dense.scatter_add_(1, columns, weights)
            self.register_buffer("item_features", dense, persistent=False)
        else:
            self.register_buffer("item_columns", columns, persistent=False)
            self.register_buffer("item_weights", weights, persistent=False)

    def restricted(self, rows: Tensor) -> Recommender:
        """The same model with a vocabulary of these rows, which has its own copy of their item tables.

        Everything else is shared, gradients too: a step over a few thousand of a million items then touches those.
        """
        part = copy.copy(self)
        part._parameters = {
            name: nn.Parameter(parameter.detach().index_select(0, rows)) if name in ITEM_TABLES else parameter
            for name, parameter in self._parameters.items()
            if parameter is not None
        }
        features = ("item_features",) if self.dense_features else ("item_columns", "item_weights")
        part._buffers = {
            name: None if buffer is None else buffer.index_select(0, rows) if name in features else buffer
            for name, buffer in self._buffers.items()
        }
        return part

    def _item_feature_part(self, items: Tensor) -> Tensor:
        """(U, D) C·features of the given rows."""
        if self.dense_features:
            return self.get_buffer("item_features").index_select(0, items) @ self.item_feature_weights
        columns, weights = self.get_buffer("item_columns")[items], self.get_buffer("item_weights")[items]
        return F.embedding_bag(columns, self.item_feature_weights, per_sample_weights=weights, mode="sum")

    def user_feature_weights(self) -> Tensor:
        """W: (Fu, d)"""
        projections = self.user_projection[self.get_buffer("user_field")]
        return torch.einsum("fk,fkd->fd", self.user_factors, projections)

    def initial_means(self, batch: PackedSequences) -> Tensor:
        """(B, d) φ_0 + W·features"""
        start = self.head.initialization.expand(batch.users, -1)
        if not self.spec.user_encoder.width:
            return start
        table = self.user_feature_weights()
        return start + F.embedding_bag(batch.user_columns, table, per_sample_weights=batch.user_weights, mode="sum")

    def forward(self, batch: PackedSequences) -> Unrolled:
        """Walks every user's sequence: predict, then update."""
        items, position = torch.unique(batch.item, return_inverse=True)
        e, bias = self.embeddings(items)
        base = (self.base(e).squeeze(-1) + bias).index_select(0, position)
        psi = torch.cat([torch.ones_like(e[:, :1]), self.projection(e)], 1).index_select(0, position)
        target, log_weight = self._targets(batch)
        z = self._first_filter(batch, psi, base, target, torch.exp(log_weight))
        if self.spec.learner.second_filter:
            z = self._second_filter(batch, z, self.second_projection(e).index_select(0, position))
        return Unrolled(z, e, position)

    def _targets(self, batch: PackedSequences) -> tuple[Tensor, Tensor]:
        """What an event's update aims at, and the log of how much it weighs, both by grade where there is one."""
        log_weight = self.log_weight.expand(len(batch.label))
        if not hasattr(self, "grade_target"):
            return batch.label, log_weight
        graded = batch.grade < len(self.spec.grades)
        grade = batch.grade.clamp(max=len(self.spec.grades) - 1)
        target = torch.where(graded, torch.sigmoid(self.grade_target)[grade], batch.label)
        return target, log_weight + torch.where(graded, self.grade_log_weight[grade], 0.0)

    def _first_filter(
        self, batch: PackedSequences, psi: Tensor, base: Tensor, target: Tensor, weight: Tensor
    ) -> Tensor:
        means = self.initial_means(batch)
        head = self.head
        if isinstance(head, GradientStart):
            weight = weight * head.decay(batch.index)
            return gradient_scan(psi, base, target, weight, means, torch.exp(head.log_rate), batch.starts)
        return kalman_scan(
            psi, base, target, weight, means, head.covariance(), head.kappa(), head.drift(), batch.starts
        )

    def _second_filter(self, batch: PackedSequences, z: Tensor, features: Tensor) -> Tensor:
        """Learns how far to trust the first filter for this user: ψ2 = [1, z/2, P2·e]."""
        psi = torch.cat([torch.ones_like(z).unsqueeze(1), z.unsqueeze(1) / 2, features], 1)
        second = self.second
        return kalman_scan(
            psi, torch.zeros_like(z), batch.label, torch.exp(self.second_log_weight).expand(len(z)),
            second.initialization.expand(batch.users, -1), second.covariance(), second.kappa(), second.drift(),
            batch.starts,
        )  # fmt: skip

    # --- losses -----------------------------------------------------------------------------------------------

    def kl(self) -> Tensor:
        """KL of the item posterior from its prior, summed over the vocabulary, ()."""
        kl = gaussian_kl(self.item_embedding, self.item_embedding_log_sigma, self.prior_log_scale)
        bias, bias_sigma = self.item_bias.unsqueeze(1), self.item_bias_log_sigma.unsqueeze(1)
        kl = kl + gaussian_kl(bias, bias_sigma, self.prior_bias_log_scale.unsqueeze(0))
        if hasattr(self, "ordinal_item"):
            kl = kl + 2.0 * (self.ordinal_item**2).sum()
        return kl

    def ordinal_loss(self, batch: PackedSequences, unrolled: Unrolled, redundant: Tensor) -> Tensor:
        """Σ over events and thresholds of the log-loss of "value above grade g", from the same logit.

        ``redundant`` (G − 1,) marks thresholds that say the same as the label: they carry no weight.
        """
        above = torch.arange(len(self.spec.grades) - 1, device=batch.grade.device)
        truth = (batch.grade.unsqueeze(1) > above).float()
        logit = unrolled.logit.unsqueeze(1) * self.ordinal_slope + self.ordinal_threshold
        of_item = unrolled.embedding @ self.ordinal_projection
        logit = logit + self.ordinal_item[batch.item] + of_item.index_select(0, unrolled.position)
        loss = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
        graded = (batch.grade < len(self.spec.grades)).float().unsqueeze(1)
        return (loss * graded * (~redundant).float()).sum()

    # --- export -----------------------------------------------------------------------------------------------

    def fixed_part(self) -> FixedPart:
        """θ as plain arrays."""
        spec, width = self.spec, self.spec.learner.item_dim
        second = getattr(self, "second_projection", None)
        return FixedPart(
            item_ids=spec.item_ids,
            item_embedding=_array(self.item_embedding),
            item_bias=_array(self.item_bias),
            item_features=spec.item_features,
            item_feature_weights=_array(self.item_feature_weights),
            base_weight=_array(self.base.weight)[0],
            base_bias=_number(self.base.bias),
            projection=np.ascontiguousarray(_array(self.projection.weight).T),
            projection_bias=_array(self.projection.bias),
            second_projection=np.zeros((width, 0), np.float32)
            if second is None
            else np.ascontiguousarray(_array(second.weight).T),
            second_projection_bias=np.zeros(0, np.float32) if second is None else _array(second.bias),
            user_feature_weights=_array(self.user_feature_weights()),
            item_encoder=spec.item_encoder,
            user_encoder=spec.user_encoder,
            grades=np.asarray(spec.grades if hasattr(self, "grade_target") else (), np.float32),
        )

    def first_filter(self) -> FirstFilter:
        """The first filter's constants as plain arrays."""
        head, d = self.head, self.spec.learner.dim
        graded = hasattr(self, "grade_target")
        target = _array(torch.sigmoid(self.grade_target)) if graded else np.zeros(0, np.float32)
        weight = _array(torch.exp(self.log_weight + (self.grade_log_weight if graded else torch.zeros(0))))
        common = {
            "initialization": _array(head.initialization),
            "target": np.append(target, np.float32(0)),
            "weight": np.append(weight, _array(torch.exp(self.log_weight))),
        }
        if isinstance(head, GradientStart):
            tau, alpha = _number(torch.exp(head.log_tau)), _number(torch.exp(head.log_alpha))
            none = np.zeros(0, np.float32)
            still = np.zeros(d, np.float32)
            return FirstFilter(
                "gradient", covariance=none, kappa=0.0, drift=still, rate=_array(torch.exp(head.log_rate)),
                tau=tau, alpha=alpha, **common,
            )  # fmt: skip
        return FirstFilter(
            self.spec.learner.head, covariance=packed(_array(head.covariance())), kappa=_number(head.kappa()),
            drift=_array(head.drift()), rate=np.zeros(d, np.float32), tau=1.0, alpha=0.0, **common,
        )  # fmt: skip

    def second_filter(self) -> SecondFilter | None:
        """The second filter's constants as plain arrays, None when it is off."""
        if not self.spec.learner.second_filter:
            return None
        second = self.second
        return SecondFilter(
            _array(second.initialization), packed(_array(second.covariance())), _number(second.kappa()),
            _array(second.drift()), _number(torch.exp(self.second_log_weight)),
        )  # fmt: skip


def padded(rows: SparseRows) -> tuple[Tensor, Tensor]:
    """(columns, weights), both (E, K): K is the longest row; padding points at column 0 with weight 0."""
    lengths = np.diff(rows.starts)
    widest = max(1, int(lengths.max(initial=0)))
    columns = np.zeros((len(rows), widest), np.int64)
    weights = np.zeros((len(rows), widest), np.float32)
    filled = np.arange(widest) < lengths[:, None]
    columns[filled], weights[filled] = rows.columns, rows.weights
    return torch.from_numpy(columns), torch.from_numpy(weights)


def packed(covariance: Float) -> Float:
    """The lower triangle of a symmetric (d, d), row by row; a (d,) diagonal stays as it is."""
    return covariance[np.tril_indices(len(covariance))] if covariance.ndim == 2 else covariance


class _GaussianKL(torch.autograd.Function):
    """KL(N(mean, σ²) ‖ N(0, scale²)) summed over rows, with its gradients in closed form: fewer passes over
    the table than autograd makes.

    mean and log_sigma (V, D), log_scale (D,); Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        mean, log_sigma, log_scale = inputs
        precision = torch.exp(-2 * log_scale)
        variance_ratio = torch.exp(2 * log_sigma).mul_(precision)
        ratio = (variance_ratio + mean * mean * precision).sum(0)
        ctx.save_for_backward(mean, precision, variance_ratio, ratio)
        rows = len(mean)
        return 0.5 * (ratio.sum() - mean.numel()) + rows * log_scale.sum() - log_sigma.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (scale,) = grad_outputs
        mean, precision, variance_ratio, ratio = ctx.saved_tensors
        return scale * mean * precision, (variance_ratio - 1).mul_(scale), scale * (len(mean) - ratio)


def gaussian_kl(mean: Tensor, log_sigma: Tensor, log_scale: Tensor) -> Tensor:
    """KL of independent Gaussians (V, D) from a zero-mean prior with one scale per dimension (D,), in nats."""
    return _GaussianKL.apply(mean, log_sigma, log_scale)  # type: ignore[no-any-return]


def _graded_start(like_rate: tuple[float, ...]) -> Tensor:
    """Disliked grades start at logits −3 … −1.5, liked ones at 1 … 3, in rising order."""
    liked = sum(rate >= 0.5 for rate in like_rate)
    return torch.cat([torch.linspace(-3, -1.5, len(like_rate) - liked), torch.linspace(1, 3, liked)])


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float32)


def _number(tensor: Tensor) -> float:
    return float(tensor.detach().item())
