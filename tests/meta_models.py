"""Small models that the online stage may train, with every parameter in use, and histories and gradients for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from configs.settings import LearnerSettings, TrainingSettings
from learner.artifact import Artifact
from learner.features import Catalogue, FeatureField
from learner.histories import Histories, starts_of
from learner.interactions import Interactions
from learner.meta_model import MetaModel
from learner.meta_training import MetaTrainer, prepare
from learner.meta_update import GradientSum
from learner.recommender import ITEM_TABLES
from learner.user_state import NO_GRADE, HeadKind, item_hash, ring_item

ITEM_COUNT, USER_COUNT = 12, 20
USERS = Catalogue((FeatureField("side", "categorical"),), {f"u{k}": ("ab"[k % 2],) for k in range(USER_COUNT)})
ITEMS = Catalogue((FeatureField("tags", "multi"),), {f"i{k}": ("x|y" if k % 2 else "x",) for k in range(ITEM_COUNT)})
TRAINING = TrainingSettings(epochs=1, users_per_batch=8, seed=7)
VOCABULARY = tuple(f"i{k}" for k in range(ITEM_COUNT))
MOSTLY_NEW = {"i0": 1_000}
"""As ``seen``: so many that steps have their full length"""


def taste_events(users: int = USER_COUNT, per_user: int = 15, seed: int = 0) -> Interactions:
    """Even users like even items, odd users odd ones; a value of 1 to 5 in two events of three."""
    rng = np.random.default_rng(seed)
    item = np.concatenate([np.arange(ITEM_COUNT), rng.integers(0, ITEM_COUNT, users * per_user - ITEM_COUNT)])
    user = np.arange(users * per_user) % users
    label = (user % 2 == item % 2).astype(np.int8)
    value = np.where(label > 0, rng.integers(4, 6, len(label)), rng.integers(1, 4, len(label))).astype(np.float32)
    value[rng.random(len(label)) < 1 / 3] = np.nan
    return Interactions.from_columns(
        [f"u{k}" for k in user], [f"i{k}" for k in item], label, np.arange(len(label)), values=value
    )


def settings(head: HeadKind = "full", *, second: bool = True, graded: bool = True) -> LearnerSettings:
    """``graded``: targets by grade, and the ordinal loss."""
    return LearnerSettings(
        head=head, dim=4, item_dim=6, second_filter=second, second_dim=3, graded_targets=graded,
        ordinal_auxiliary=0.5 if graded else 0.0,
    )  # fmt: skip


def artifact(learner: LearnerSettings | None = None, *, silent: bool = False, seed: int = 1) -> Artifact:
    """An untrained model over i0 … i11, no parameter of which stands where it began.

    ``silent``: the posterior of the items has no width, so that training is without noise.
    """
    trainer = MetaTrainer(*prepare(taste_events(), USERS, ITEMS, learner or settings()), TRAINING)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            if silent and "_log_sigma" in name:
                parameter.fill_(-torch.inf)
    return trainer.artifact()


def meta_model(learner: LearnerSettings | None = None, *, silent: bool = False) -> MetaModel:
    """Of ``artifact``; item k had 10 + k events."""
    return MetaModel(artifact(learner, silent=silent), 10 + np.arange(ITEM_COUNT))


def ring_items(items: Sequence[str]) -> NDArray[np.uint64]:
    """(n,) what histories hold of these ids."""
    return np.fromiter((ring_item(item_hash(item)) for item in items), np.uint64, len(items))


def histories(
    model: MetaModel, lengths: Sequence[int], items: Sequence[str] = VOCABULARY, *, first: int = 0, seed: int = 0
) -> tuple[Histories, list[str]]:
    """(random histories, the item of each event); users in turn have side a, b or none, every third event no grade."""
    rng = np.random.default_rng(seed)
    events = sum(lengths)
    chosen = [items[k] for k in rng.integers(0, len(items), events)]
    grade = np.where(np.arange(events) % 3 == 2, NO_GRADE, rng.integers(0, 5, events))
    features = model.recommender.spec.user_encoder.encode([(("a", "b", None)[k % 3],) for k in range(len(lengths))])
    made = Histories(
        starts_of(np.asarray(lengths, np.int64)), ring_items(chosen), rng.integers(0, 2, events).astype(np.int8),
        grade.astype(np.int32), np.full(len(lengths), first, np.int64), features,
    )  # fmt: skip
    return made, chosen


def by_hand(model: MetaModel, items: tuple[str, ...] = VOCABULARY, *, scale: float = 1.0, seed: int = 0) -> GradientSum:
    """A gradient at version 0 of random numbers, of ten users; item k of it has k + 1 events; most events are new."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(scale * rng.normal(size=shape), np.float32)

    shapes = {name: tuple(p.shape) for name, p in model.parameters.items() if not name.startswith("prior_")}
    return GradientSum(
        0, 10, 60, 41.5, {n: normal(s) for n, s in shapes.items() if n not in ITEM_TABLES}, items,
        {n: normal((len(items), *s[1:])) for n, s in shapes.items() if n in ITEM_TABLES}, 1 + np.arange(len(items)),
        MOSTLY_NEW,
    )  # fmt: skip


def assert_same_tensors(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
