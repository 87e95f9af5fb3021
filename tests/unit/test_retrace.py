"""The walk in numpy gives the kernel's bits: predictions, adaptive parts, and the guard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from learner.adaptation import Adaptation, EventColumns
from learner.filters import ItemTable
from learner.retrace import LIMIT, AdaptivePart, Retrace
from learner.user_state import RowLayout, new_rows
from tests.models import GRADES, HEADS, first_filter, second_filter, small_model


def item_table(rng, items, dim, second_dim, scale=1.0):
    psi = rng.normal(size=(items, dim)).astype(np.float32) * np.float32(scale)
    psi[:, 0] = 1
    return ItemTable(
        psi,
        rng.normal(size=items).astype(np.float32),
        rng.normal(size=(items, max(second_dim - 2, 0))).astype(np.float32),
    )


def one(table, k):
    return ItemTable(table.psi[k : k + 1], table.base[k : k + 1], table.second_psi[k : k + 1])


class Walk:
    """A user who meets random items, by the kernel one event at a time and by the retrace."""

    def __init__(self, first, second, *, seed=0, events=60, scale=1.0):
        self.rng = np.random.default_rng(seed)
        self.layout = RowLayout.of(first, second, 8)
        self.table = item_table(self.rng, 20, first.dim, 0 if second is None else second.dim, scale)
        self.adaptation = Adaptation(self.layout, first, second)
        self.retrace = Retrace(first, second)
        self.items = self.rng.integers(0, 20, events)
        self.labels = self.rng.integers(0, 2, events)
        self.grades = self.rng.integers(0, len(first.target), events)
        self.slab = new_rows(self.layout, first, second, first.initialization[None], 0)
        self.row = self.layout.rows(self.slab)[0]

    def columns(self, items, labels, grades, at):
        n = len(items)
        return EventColumns(
            np.zeros(n, np.int32), np.array(items, np.int32), np.array(labels, np.int8), np.array(grades, np.int32),
            np.full(n, 1_000 * at, np.int64), np.arange(at, at + n, dtype=np.int64), np.arange(20),
            np.arange(20, dtype=np.uint64),
        )  # fmt: skip

    def agree(self):
        """Walks all events and holds every number of both sides together; returns the refused updates."""
        part, guarded = self.retrace.start(self.retrace.first.initialization), 0
        assert part.same_bits(AdaptivePart.of(self.row))
        for at, (k, label, grade) in enumerate(zip(self.items, self.labels, self.grades, strict=True)):
            said = self.adaptation.learn(self.slab, self.columns([k], [label], [grade], at), self.table)
            step = self.retrace.learn(part, one(self.table, k), int(label), int(grade))
            assert step.logit.tobytes() == said.logit.tobytes()
            assert step.probability.tobytes() == said.probability.tobytes()
            assert step.guarded == bool(said.guarded)
            part, guarded = step.after, guarded + said.guarded
            assert part.same_bits(AdaptivePart.of(self.row))
        return guarded

    def agree_on_all_items(self):
        n = len(self.table.base)
        said = self.adaptation.predict(
            self.slab, self.columns(range(n), [0] * n, [len(self.retrace.first.target) - 1] * n, 0), self.table
        )
        logit, probability = self.retrace.predict(AdaptivePart.of(self.row), self.table)
        assert logit.tobytes() == said.logit.tobytes()
        assert probability.tobytes() == said.probability.tobytes()


@pytest.mark.parametrize("graded", [False, True], ids=["clicks", "grades"])
@pytest.mark.parametrize("second", [False, True], ids=["one filter", "two filters"])
@pytest.mark.parametrize("kind", HEADS)
def test_every_step_and_prediction_has_the_kernels_bits(kind, second, graded):
    walk = Walk(first_filter(kind, graded=graded), second_filter() if second else None)
    assert walk.agree() == 0
    walk.agree_on_all_items()


def test_the_widths_of_the_default_model_agree_too():
    walk = Walk(first_filter("full", 16), second_filter(8), events=150)
    assert walk.agree() == 0
    walk.agree_on_all_items()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("second", [False, True], ids=["one filter", "two filters"])
def test_refused_updates_are_refused_alike(kind, second):
    walk = Walk(first_filter(kind), second_filter() if second else None)
    walk.table.psi[3, 1] = np.nan
    walk.table.base[4] = np.inf
    walk.table.psi[5, 2] = 3e19
    walk.table.base[6] = np.nan
    walk.table.base[7] = -1e14
    walk.items[:12] = [3, 4, 5, 6, 7, 0, 3, 4, 5, 6, 7, 1]
    assert walk.agree() >= 8
    walk.agree_on_all_items()


@pytest.mark.parametrize("kind", HEADS)
def test_large_numbers_saturate_alike(kind):
    walk = Walk(first_filter(kind), second_filter(), scale=1e4)
    walk.agree()
    walk.agree_on_all_items()
    assert walk.retrace.predict(AdaptivePart.of(walk.row), walk.table)[1].max() <= 1


@pytest.mark.parametrize("kind", HEADS)
def test_many_items_at_once_have_the_same_bits_as_each_alone(kind):
    walk = Walk(first_filter(kind, 16), second_filter(8))
    walk.agree()
    part, many = AdaptivePart.of(walk.row), item_table(walk.rng, 3_000, 16, 8)
    logit, probability = walk.retrace.predict(part, many)
    for k in range(0, 3_000, 101):
        alone = walk.retrace.predict(part, one(many, k))
        assert (alone[0][0], alone[1][0]) == (logit[k], probability[k])


def test_probabilities_by_numpys_exponential_differ_by_a_rounding_at_most():
    walk = Walk(first_filter(), second_filter())
    walk.agree()
    part = AdaptivePart.of(walk.row)
    exact, fast = walk.retrace.predict(part, walk.table), walk.retrace.predict(part, walk.table, exact=False)
    assert exact[0].tobytes() == fast[0].tobytes()
    np.testing.assert_allclose(exact[1], fast[1], rtol=2e-7)


def test_a_part_goes_back_into_a_row_as_it_came():
    walk = Walk(first_filter(), second_filter())
    walk.agree()
    other = np.zeros_like(walk.slab)
    part = AdaptivePart.of(walk.row)
    part.put(walk.layout.rows(other)[0])
    again = AdaptivePart.of(walk.layout.rows(other)[0])
    assert again.same_bits(part)
    again.mean[0] = np.nextafter(again.mean[0], np.float32(9), dtype=np.float32)
    assert not again.same_bits(part)
    assert not part._replace(events=part.events + 1).same_bits(part)


def test_influence_is_the_leave_one_out_step_of_a_logistic_posterior():
    """A user whose posterior is a mode with its curvature: what is left when one event goes is the next mode."""
    walk = Walk(replace(first_filter(graded=False), kappa=0.0, drift=np.zeros(5, np.float32)), None, events=12)
    walk.agree()
    part = AdaptivePart.of(walk.row)
    found, expected = [], []
    for out in range(12):
        item = one(walk.table, walk.items[out])
        found.append(walk.retrace.influence(part, item, int(walk.labels[out]), 0, out))
        without = walk.retrace.start(walk.retrace.first.initialization)
        for k, label in zip(np.delete(walk.items, out), np.delete(walk.labels, out), strict=True):
            without = walk.retrace.learn(without, one(walk.table, k), int(label), 0).after
        expected.append(part.mean - without.mean)
    found, expected = np.array(found), np.array(expected)
    similar = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(similar) > 0.95
    order = np.argsort(np.linalg.norm(expected, axis=1))
    assert np.linalg.norm(found, axis=1)[order[-3:]].min() > np.linalg.norm(found, axis=1)[order[:3]].max()


def test_influence_of_the_gradient_head_is_its_own_step_at_its_own_number():
    walk = Walk(first_filter("gradient"), None, events=5)
    walk.agree()
    part, first = AdaptivePart.of(walk.row), walk.retrace.first
    item = one(walk.table, 2)
    p = 1 / (1 + np.exp(-float(item.base[0] + part.mean @ item.psi[0])))
    expected = first.rate * first.weight[0] * item.psi[0] * (1 - p) * (1 + 3 / first.tau) ** -first.alpha
    np.testing.assert_allclose(walk.retrace.influence(part, item, 1, 0, 3), expected, rtol=1e-5)


def test_the_limit_is_the_kernels():
    from learner import kernel

    assert float(LIMIT) == np.float32(kernel.LIMIT)


def test_named_items_are_the_rows_that_the_stream_uses_and_asking_settles_nothing():
    model = small_model()
    ids, table = model.named_items()
    assert ids == tuple(f"i{k}" for k in range(12))
    assert table.psi.shape == (13, 5)
    np.testing.assert_array_equal(table.psi[:12], model.items.psi[:12])
    stranger = model.item_rows(["stranger"], {})
    np.testing.assert_array_equal(table.psi[12], model.items.psi[stranger[0]])
    assert "stranger" in model.named_items()[0]
    assert len(GRADES) == len(model.first.target) - 1
