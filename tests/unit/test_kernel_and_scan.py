"""Training and stream are one model: the unrolled scan of the offline stage gives the logits of the online kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.settings import StateSettings
from learner.adaptation import Adaptation, EventColumns
from learner.scan import gradient_scan, kalman_scan
from learner.serving import FirstFilter, ItemTable
from learner.user_state import RowLayout, new_rows
from state.memory_store import MemoryUserStore
from streams.processor import Processor
from tests.models import GRADES, HEADS, first_filter, random_stream, small_model


def symmetric(packed: np.ndarray, dim: int) -> np.ndarray:
    lower = np.zeros((dim, dim), np.float32)
    lower[np.tril_indices(dim)] = packed
    return lower + np.tril(lower, -1).T


def scanned(
    first: FirstFilter, means: np.ndarray, psi: np.ndarray, base: np.ndarray, label: np.ndarray, grade: np.ndarray,
    starts: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Logits of ``learner.scan`` for users' packed sequences."""
    target = np.where(grade == len(first.target) - 1, label, first.target[grade]).astype(np.float32)
    weight = first.weight[grade]
    if first.kind == "gradient":
        n = np.concatenate([np.arange(k) for k in np.diff(starts)])
        weight = (weight * (1 + n / first.tau) ** -first.alpha).astype(np.float32)
    common = [torch.from_numpy(a) for a in (psi, base, target, weight, means)]
    ends = torch.from_numpy(starts)
    if first.kind == "gradient":
        return gradient_scan(*common, torch.from_numpy(first.rate), ends).numpy()
    covariance = symmetric(first.covariance, first.dim) if first.kind == "full" else first.covariance
    kappa, drift = torch.tensor(first.kappa), torch.from_numpy(first.drift)
    return kalman_scan(*common, torch.from_numpy(covariance), kappa, drift, ends).numpy()


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_the_stream_predicts_what_the_training_scan_predicts(kind, graded):
    model, stream = small_model(kind, second=False, graded=graded), random_stream(400, 12)
    with Processor(model, lambda _, layout: MemoryUserStore(layout), StateSettings(ring=2)) as work:
        found = work.process(0, stream).logit
    order = np.argsort(stream.user, kind="stable")
    rows = model.item_rows(stream.item_ids, {})[stream.item[order]]
    means = model.initial_means(stream.user_ids, stream.user_features)
    grade = model.grades(stream.value[order]) if graded else np.zeros(len(stream), np.int32)
    starts = np.append(0, np.cumsum(np.bincount(stream.user)))
    expected = scanned(model.first, means, model.items.psi[rows], model.items.base[rows], stream.label[order],
                       grade, starts)  # fmt: skip
    np.testing.assert_allclose(found[order], expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_a_users_first_logit_shrinks_with_the_variance_of_the_prior(kind):
    first = first_filter(kind, graded=True)
    layout, base = RowLayout.of(first, None, 0), np.float32(0.4)
    psi = np.array([[1, -0.5, 0.25, 2, 0]], np.float32)
    slab = new_rows(layout, first, None, first.initialization[None], 0)
    event = EventColumns(
        np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.int8), np.array([len(GRADES)], np.int32),
        np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.uint64),
    )  # fmt: skip
    items = ItemTable(psi, np.array([base]), np.zeros((1, 0), np.float32))
    found = Adaptation(layout, first, None).learn(slab, event, items)
    x = psi[0].astype(float)
    S = symmetric(first.covariance, 5) if kind == "full" else np.diag(first.covariance)
    expected = (base + first.initialization @ x) / np.sqrt(1 + first.kappa * (x @ S @ x))
    np.testing.assert_allclose(found.logit, [expected], rtol=1e-6)


def test_a_read_only_slab_is_refused_and_its_bytes_are_left_alone():
    first = first_filter()
    layout = RowLayout.of(first, None, 0)
    stored = new_rows(layout, first, None, first.initialization[None], 0).tobytes()
    kept = bytes(bytearray(stored))
    slab = np.frombuffer(stored, np.uint8).reshape(1, -1)
    event = EventColumns(
        np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.int8), np.zeros(1, np.int32),
        np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.uint64),
    )  # fmt: skip
    items = ItemTable(np.ones((1, 5), np.float32), np.zeros(1, np.float32), np.zeros((1, 0), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        Adaptation(layout, first, None).learn(slab, event, items)
    assert stored == kept
