"""What tests of the online stage share: a small trained model, a stream of new users, and settings that fit both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from configs.settings import (
    AnchorSettings,
    GateSettings,
    LearnerSettings,
    MetaSettings,
    Settings,
    StateSettings,
    TrainingSettings,
)
from learner.artifact import Artifact
from learner.features import Catalogue, FeatureField
from learner.forgetting import LOGIT_BINS, CohortScores, Column, Scores
from learner.interactions import Interactions
from learner.meta_model import MetaModel
from learner.meta_training import meta_train
from learner.meta_update import GradientSum, Moves, moves_with
from learner.offline_histories import OfflineHistories
from learner.recommender import ITEM_TABLES
from state.histories import HistoryLimits
from streams.alarms import Kind

LEARNER = LearnerSettings(dim=4, item_dim=6, second_dim=3)
TRAINING = TrainingSettings(epochs=2, users_per_batch=4, seed=7)
USERS = Catalogue((FeatureField("side", "categorical"),), {f"u{k}": ("ab"[k % 2],) for k in range(400)})
CATALOGUE = Catalogue(
    (FeatureField("kind", "categorical"),), {f"i{k}": ("xyz"[k % 3],) for k in range(40)}
)  # fmt: skip
"""Of items, those too that nobody has met in training"""
LIMITS = HistoryLimits(1 << 30, 1 << 20)
ITEMS = 12
HELD_OUT = 0.25


def taste_events(users: Sequence[int], per_user: int, *, seed: int = 0, items: int = ITEMS) -> Interactions:
    """Even users like even items, odd users odd ones, nine times in ten; users' events are mixed, offsets rise."""
    rng = np.random.default_rng(seed)
    who = rng.permutation(np.repeat(np.asarray(users), per_user))
    what = rng.integers(0, items, len(who))
    liked = (who % 2 == what % 2) ^ (rng.random(len(who)) < 0.1)
    return Interactions.from_columns(
        [f"u{u}" for u in who], [f"i{i}" for i in what], liked.astype(np.int8), 1_000 * np.arange(len(who)),
        values=np.where(liked, 5.0, 2.0),
    )  # fmt: skip


@cache
def trained(held_out: float = HELD_OUT) -> Artifact:
    """On users 0 to 39. Do not change it."""
    artifact = meta_train(taste_events(range(40), 30), USERS, CATALOGUE, LEARNER, TRAINING, held_out=held_out)
    return replace(artifact, fingerprint="f" * 64)


def offline_of(artifact: Artifact) -> OfflineHistories:
    assert artifact.offline is not None
    return artifact.offline


def meta_model(artifact: Artifact | None = None) -> MetaModel:
    artifact = artifact or trained()
    return MetaModel(artifact, offline_of(artifact).item_events)


def meta_settings(*, gate: Mapping[str, Any] | None = None, anchors: Mapping[str, Any] | None = None,
                  **changed: Any) -> MetaSettings:  # fmt: skip
    """Rounds of 100 events over 16 users, anchors of 8, a gate that judges few."""
    return MetaSettings(
        **{
            "moves": "everything", "every_events": 100, "users": 16,
            "anchors": AnchorSettings(**{
                "held_out": HELD_OUT, "users": 8, "slice_events": 250, "query": 4, **(anchors or {}),
            }),
            "gate": GateSettings(**{
                "min_users": 2, "min_stream_users": 2, "bootstrap_samples": 100, **(gate or {}),
            }),
            **changed,
        }
    )  # fmt: skip


def run_settings(meta: MetaSettings, ring: int = 32) -> Settings:
    return Settings(meta=meta, learner=LEARNER, training=TRAINING, state=StateSettings(ring=ring))


def gradient_of(
    model: MetaModel,
    version: int,
    value: float = 1.0,
    *,
    moves: Moves = "everything",
    items: Sequence[str] = ("i0", "i3"),
    **changed: Any,
) -> GradientSum:
    """A sum that fits, of four users: ``value`` everywhere."""
    shapes = {n: tuple(p.shape) for n, p in model.parameters.items() if moves_with(n, moves)}
    held = GradientSum(
        version, 4, 40, 20.0,
        {n: np.full(s, value, np.float32) for n, s in shapes.items() if n not in ITEM_TABLES}, tuple(items),
        {n: np.full((len(items), *s[1:]), value, np.float32) for n, s in shapes.items() if n in ITEM_TABLES},
        np.full(len(items), 5, np.int64), {"i0": 3, "i5": 2},
    )  # fmt: skip
    return replace(held, **changed)


def scores_of(version: int, *losses: float, users: int = 30) -> Scores:
    """One cohort for each loss, of users that spread a little around it, alike for every version."""
    spread = np.random.default_rng(5).normal(0, 0.001, users)
    return Scores(
        version,
        tuple(
            CohortScores(
                Column(f"slice {k} / warm", k, "warm"), version, np.arange(users, dtype=np.uint32) + 1_000 * k,
                np.stack([loss + spread] * 2), np.full(users, 4), (0.7, 0.6), np.zeros((2, 2, LOGIT_BINS), np.int64), 0,
            )
            for k, loss in enumerate(losses)
        ),
    )  # fmt: skip


@dataclass
class Heard:
    """Takes alarms in."""

    alarms: list[tuple[Kind, str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, kind: Kind, message: str, evidence: Mapping[str, Any]) -> None:
        self.alarms.append((kind, message, dict(evidence)))

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind, _, _ in self.alarms]
