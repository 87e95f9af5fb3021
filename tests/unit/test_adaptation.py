"""The kernel against plain float64 formulas, its limits, and its guard."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from learner.adaptation import Adaptation, Adapted, EventColumns
from learner.serving import FirstFilter, ItemTable, SecondFilter
from learner.user_state import (
    MAX_AGE_S,
    NO_GRADE,
    RowLayout,
    age_code,
    age_of,
    item_hash,
    new_rows,
    recent_events,
    ring_item,
)
from tests.models import GRADES, HEADS, first_filter, second_filter

ITEMS = 9
HOUR = 3_600_000
TOLERANCE = 2e-4
"""Of logits and parameters after a hundred float32 updates, against float64"""


def item_table(dim: int, second_dim: int, seed: int = 3) -> ItemTable:
    rng = np.random.default_rng(seed)
    psi = (rng.normal(size=(ITEMS, dim)) / 2).astype(np.float32)
    psi[:, 0] = 1
    second_psi = rng.normal(size=(ITEMS, max(second_dim - 2, 0))) / 3
    return ItemTable(psi, (rng.normal(size=ITEMS) / 2).astype(np.float32), second_psi.astype(np.float32))


def event_columns(n: int, users: int, grades: int, seed: int = 5) -> EventColumns:
    rng = np.random.default_rng(seed)
    return EventColumns(
        slot=rng.integers(0, users, n).astype(np.int32),
        item=rng.integers(0, ITEMS, n).astype(np.int32),
        label=rng.integers(0, 2, n).astype(np.int8),
        grade=rng.integers(0, grades + 1, n).astype(np.int32),
        event_time_ms=1_000_000 + np.cumsum(rng.integers(0, 3 * HOUR, n)),
        offset=np.cumsum(rng.integers(1, 5, n)),
        item_row=np.arange(ITEMS)[::-1].copy(),
        item_hash=np.array([item_hash(str(k)) for k in range(ITEMS)], np.uint64),
    )


def one_event(label: int = 1, grade: int = 0, item: int = 0, offset: int = 0) -> EventColumns:
    all_items = event_columns(1, 1, 0)
    return replace(
        all_items, slot=np.zeros(1, np.int32), item=np.array([item], np.int32), label=np.array([label], np.int8),
        grade=np.array([grade], np.int32), offset=np.array([offset]), item_row=np.arange(ITEMS),
    )  # fmt: skip


class Learner:
    """Rows of some users, and the kernel that changes them."""

    def __init__(self, first: FirstFilter, second: SecondFilter | None, users: int = 1, ring: int = 4) -> None:
        self.layout = RowLayout.of(first, second, ring)
        self.slab = new_rows(self.layout, first, second, np.tile(first.initialization, (users, 1)), 0)
        self.rows = self.layout.rows(self.slab)
        self.adaptation = Adaptation(self.layout, first, second)
        self.items = item_table(first.dim, self.layout.second_dim)

    def learn(self, events: EventColumns) -> Adapted:
        return self.adaptation.learn(self.slab, events, self.items)

    def predict(self, events: EventColumns) -> Adapted:
        return self.adaptation.predict(self.slab, events, self.items)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def unpacked(packed: np.ndarray, dim: int) -> np.ndarray:
    lower = np.zeros((dim, dim))
    lower[np.tril_indices(dim)] = packed
    return lower + np.tril(lower, -1).T


class PlainKalman:
    """One user's filter after the equations, in float64."""

    def __init__(self, mean: np.ndarray, covariance: np.ndarray, kappa: float, drift: np.ndarray) -> None:
        self.m, self.S, self.kappa, self.drift = mean.astype(float), covariance, kappa, drift.astype(float)

    def step(self, x: np.ndarray, base: float, y: float, r: float) -> float:
        v = x @ self.S @ x
        z = (base + self.m @ x) / math.sqrt(1 + self.kappa * v)
        p = sigmoid(z)
        w = r * p * (1 - p)
        k = 1 / (1 + w * v)
        gain = self.S @ x
        self.m += gain * r * (y - p) * k
        self.S = self.S - w * k * np.outer(gain, gain) + np.diag(self.drift)
        return z


class PlainDiagonal(PlainKalman):
    def step(self, x: np.ndarray, base: float, y: float, r: float) -> float:
        z = super().step(x, base, y, r)
        self.S = np.diag(np.diag(self.S))
        return z


class PlainGradient:
    def __init__(self, mean: np.ndarray, rate: np.ndarray, tau: float, alpha: float) -> None:
        self.m, self.rate, self.tau, self.alpha, self.n = mean.astype(float), rate.astype(float), tau, alpha, 0

    def step(self, x: np.ndarray, base: float, y: float, r: float) -> float:
        z = base + self.m @ x
        self.m += self.rate * r * x * (y - sigmoid(z)) * (1 + self.n / self.tau) ** -self.alpha
        self.n += 1
        return z


def plain_first(f: FirstFilter) -> PlainKalman | PlainGradient:
    if f.kind == "gradient":
        return PlainGradient(f.initialization, f.rate, f.tau, f.alpha)
    if f.kind == "diagonal":
        return PlainDiagonal(f.initialization, np.diag(f.covariance.astype(float)), f.kappa, f.drift)
    return PlainKalman(f.initialization, unpacked(f.covariance, f.dim), f.kappa, f.drift)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("with_second", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_predictions_and_parameters_follow_the_equations(kind, with_second, graded):
    first, users, n = first_filter(kind, 5, graded=graded), 3, 300
    second = second_filter(4) if with_second else None
    learner = Learner(first, second, users)
    events = event_columns(n, users, len(GRADES) if graded else 0)

    found = learner.learn(events)

    firsts = [plain_first(first) for _ in range(users)]
    seconds = [second and PlainKalman(second.initialization, unpacked(second.covariance, 4), second.kappa, second.drift)
               for _ in range(users)]  # fmt: skip
    expected = np.empty(n)
    for k in range(n):
        row, grade, label = events.item_row[events.item[k]], events.grade[k], float(events.label[k])
        y = label if grade == len(first.target) - 1 else float(first.target[grade])
        x = learner.items.psi[row].astype(float)
        z = firsts[events.slot[k]].step(x, float(learner.items.base[row]), y, float(first.weight[grade]))
        if second is not None:
            x2 = np.concatenate([[1, z / 2], learner.items.second_psi[row]])
            z = seconds[events.slot[k]].step(x2, 0.0, label, second.weight)
        expected[k] = z
    np.testing.assert_allclose(found.logit, expected, atol=TOLERANCE)
    np.testing.assert_allclose(found.probability, 1 / (1 + np.exp(-expected)), atol=TOLERANCE)
    for user in range(users):
        np.testing.assert_allclose(learner.rows["mean"][user], firsts[user].m, atol=TOLERANCE)
        if kind == "full":
            np.testing.assert_allclose(unpacked(learner.rows["covariance"][user], 5), firsts[user].S, atol=TOLERANCE)
        if kind == "diagonal":
            np.testing.assert_allclose(learner.rows["covariance"][user], np.diag(firsts[user].S), atol=TOLERANCE)
        if second is not None:
            np.testing.assert_allclose(learner.rows["second_mean"][user], seconds[user].m, atol=TOLERANCE)
            np.testing.assert_allclose(
                unpacked(learner.rows["second_covariance"][user], 4), seconds[user].S, atol=TOLERANCE
            )
    assert found.applied.all()
    assert found.guarded == 0


def test_the_first_event_moves_the_prior_as_the_closed_form_says():
    first = first_filter("full", 2)
    first = replace(first, initialization=np.zeros(2, np.float32), covariance=np.array([1, 0.5, 2], np.float32),
                    drift=np.zeros(2, np.float32), kappa=0.0, weight=np.ones(1, np.float32))  # fmt: skip
    learner = Learner(first, None)
    learner.items.psi[0], learner.items.base[0] = [1, 1], 0

    found = learner.learn(one_event(label=1))

    # Sψ = [1.5, 2.5]; v = 4; p = 1/2; w = 1/4; k = 1/2
    assert found.logit.tolist() == [0.0]
    assert found.probability.tolist() == [0.5]
    assert learner.rows["mean"][0].tolist() == [1.5 / 4, 2.5 / 4]
    assert learner.rows["covariance"][0].tolist() == [1 - 1.5**2 / 8, 0.5 - 1.5 * 2.5 / 8, 2 - 2.5**2 / 8]


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_without_variance_and_drift_nothing_is_learned(kind):
    first = first_filter(kind, 5)
    first = replace(first, covariance=np.zeros_like(first.covariance), drift=np.zeros(5, np.float32))
    check_that_predictions_stay_at_the_start(first)


def test_a_gradient_head_with_rate_zero_learns_nothing():
    check_that_predictions_stay_at_the_start(replace(first_filter("gradient", 5), rate=np.zeros(5, np.float32)))


def check_that_predictions_stay_at_the_start(first: FirstFilter) -> None:
    learner, events = Learner(first, None), event_columns(50, 1, 0)
    found = learner.learn(events)
    rows = events.item_row[events.item]
    np.testing.assert_allclose(
        found.logit, learner.items.base[rows] + learner.items.psi[rows] @ first.initialization, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(learner.rows["mean"][0], first.initialization)


def test_the_diagonal_head_is_the_full_one_where_items_are_axes():
    diagonal = first_filter("diagonal", 5)
    full = replace(diagonal, kind="full", covariance=np.diag(diagonal.covariance)[np.tril_indices(5)].copy())
    events = event_columns(200, 1, 0)
    logits = []
    for first in (diagonal, full):
        learner = Learner(first, None)
        learner.items.psi[:] = np.eye(5, dtype=np.float32)[np.arange(ITEMS) % 5]
        logits.append(learner.learn(events).logit)
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("dim", [2, 3, 8, 13, 16, 32])
def test_packing_holds_at_every_width(dim):
    first = first_filter("full", dim)
    learner, events = Learner(first, None, users=2, ring=0), event_columns(60, 1, 0)
    learner.learn(events)
    plain = plain_first(first)
    for k in range(60):
        row = events.item_row[events.item[k]]
        plain.step(learner.items.psi[row].astype(float), float(learner.items.base[row]), float(events.label[k]),
                   float(first.weight[0]))  # fmt: skip
    np.testing.assert_allclose(unpacked(learner.rows["covariance"][0], dim), plain.S, atol=TOLERANCE)
    np.testing.assert_array_equal(learner.rows["covariance"][1], first.covariance)


# --- what one event may see and touch ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_a_later_label_never_changes_an_earlier_prediction(kind):
    events = event_columns(80, 2, len(GRADES))
    original = Learner(first_filter(kind, graded=True), second_filter(), 2).learn(events)
    for k in (0, 17, 79):
        label, grade = events.label.copy(), events.grade.copy()
        label[k], grade[k] = 1 - label[k], (grade[k] + 1) % 5
        changed = Learner(first_filter(kind, graded=True), second_filter(), 2)
        found = changed.learn(replace(events, label=label, grade=grade))
        np.testing.assert_array_equal(found.logit[: k + 1], original.logit[: k + 1])
        later = np.flatnonzero(events.slot[k + 1 :] == events.slot[k])
        assert (found.logit[k + 1 :][later] != original.logit[k + 1 :][later]).all()


@pytest.mark.parametrize("kind", HEADS)
def test_interleaved_users_do_not_touch_each_other(kind):
    events = event_columns(120, 2, 0)
    both = Learner(first_filter(kind), second_filter(), 2)
    found = both.learn(events)
    for user in (0, 1):
        mine = events.slot == user
        alone = Learner(first_filter(kind), second_filter(), 2)
        columns = {name: getattr(events, name)[mine] for name in ("slot", "item", "label", "grade", "event_time_ms", "offset")}  # fmt: skip # noqa: E501
        np.testing.assert_array_equal(alone.learn(replace(events, **columns)).logit, found.logit[mine])
        np.testing.assert_array_equal(alone.slab[user], both.slab[user])


def test_predicting_writes_nothing_and_agrees_with_learning():
    learner = Learner(first_filter(), second_filter())
    learner.learn(event_columns(20, 1, 0))
    before = learner.slab.copy()
    asked = learner.predict(one_event(offset=10_000))
    np.testing.assert_array_equal(learner.slab, before)
    assert asked.applied.tolist() == [False]
    np.testing.assert_array_equal(asked.logit, learner.learn(one_event(offset=10_000)).logit)


def test_events_that_a_row_has_applied_are_skipped():
    learner, events = Learner(first_filter(), second_filter(), 3), event_columns(60, 3, 0)
    learner.learn(events)
    before = learner.slab.copy()
    again = learner.learn(events)
    assert not again.applied.any()
    assert np.isnan(again.logit).all()
    assert np.isnan(again.probability).all()
    np.testing.assert_array_equal(learner.slab, before)


def test_a_new_row_applies_offset_zero():
    assert Learner(first_filter(), None).learn(one_event(offset=0)).applied.tolist() == [True]


# --- the row's memory ---------------------------------------------------------------------------------------------


def test_the_header_and_the_ring_keep_what_was_applied():
    learner, events = Learner(first_filter(graded=True), None, ring=4), event_columns(10, 1, len(GRADES))
    learner.learn(events)
    row = learner.rows[0]
    assert row["events"] == 10
    assert row["last_offset"] == events.offset[-1]
    assert row["first_time_ms"] == events.event_time_ms[0]
    assert row["last_time_ms"] == events.event_time_ms[-1]
    recent = recent_events(learner.layout, row)
    assert recent.item.tolist() == [ring_item(item_hash(str(k))) for k in events.item[-4:]]
    assert recent.label.tolist() == events.label[-4:].tolist()
    assert recent.grade.tolist() == [NO_GRADE if g == len(GRADES) else g for g in events.grade[-4:]]
    age = (events.event_time_ms[-4:] - events.event_time_ms[0]) // 1000
    assert recent.time_ms.tolist() == (events.event_time_ms[0] + 1000 * age_of(age_code(age))).tolist()


def test_ledgers_agree_only_for_the_same_events_in_the_same_order():
    def ledger(events: EventColumns) -> int:
        learner = Learner(first_filter(), None)
        learner.learn(events)
        return int(learner.rows["ledger"][0])

    events = event_columns(10, 1, 0)
    swapped = events.item.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert swapped[3] != swapped[4]
    doubled = replace(events, **{n: np.append(getattr(events, n), getattr(events, n)[-1:]) for n in
                                 ("slot", "item", "label", "grade", "event_time_ms")},
                      offset=np.append(events.offset, events.offset[-1] + 1))  # fmt: skip
    assert ledger(events) == ledger(event_columns(10, 1, 0))
    assert ledger(replace(events, item=swapped)) != ledger(events)
    assert ledger(replace(events, label=1 - events.label)) != ledger(events)
    assert ledger(replace(events, event_time_ms=events.event_time_ms + 1)) != ledger(events)
    assert ledger(replace(events, offset=events.offset + 1)) != ledger(events)
    assert ledger(doubled) != ledger(events)


@pytest.mark.parametrize("age_s", [0, 1, 4095, 4096, 8191, 8192, 86_399, 31_536_000, MAX_AGE_S - 1])
def test_the_kernel_writes_ages_as_they_are_documented(age_s):
    learner, first = Learner(first_filter(), None, ring=4), one_event(offset=0)
    learner.learn(first)
    learner.learn(replace(one_event(offset=1), event_time_ms=first.event_time_ms + 1000 * age_s + 999))
    code = learner.rows["ring"][0, 1] & np.uint64(0x1FFFF)
    assert code == age_code(np.array([age_s]))[0]


def test_ages_in_the_ring_stop_at_their_limits():
    learner = Learner(first_filter(), None, ring=4)
    learner.learn(one_event(offset=0))
    late = one_event(offset=1)
    learner.learn(replace(late, event_time_ms=late.event_time_ms + 2000 * MAX_AGE_S))
    learner.learn(replace(one_event(offset=2), event_time_ms=np.array([0])))
    start = int(learner.rows["first_time_ms"][0])
    assert [(t - start) // 1000 for t in recent_events(learner.layout, learner.rows[0]).time_ms] == [0, MAX_AGE_S, 0]


# --- the guard ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("kind", HEADS)
def test_an_item_that_is_not_finite_leaves_the_parameters_and_predicts_the_base_rate(kind, poison):
    learner = Learner(first_filter(kind), second_filter())
    learner.learn(event_columns(20, 1, 0))
    before = learner.rows.copy()
    learner.items.psi[0, 1] = poison

    found = learner.learn(one_event(offset=10_000))

    assert found.guarded == 1
    assert found.applied.tolist() == [True]
    assert found.logit.tolist() == [learner.items.base[0]]
    for name in ("mean", "covariance", "second_mean", "second_covariance"):
        np.testing.assert_array_equal(learner.rows[name], before[name])
    assert learner.rows["guarded"].tolist() == [1]
    assert learner.rows["events"].tolist() == [21]
    assert learner.rows["last_offset"].tolist() == [10_000]
    assert learner.rows["ledger"][0] != before["ledger"][0]


@pytest.mark.parametrize("field", ["mean", "covariance", "second_mean", "second_covariance"])
def test_a_damaged_row_predicts_the_base_rate_and_is_not_updated(field):
    learner = Learner(first_filter(), second_filter())
    learner.rows[field][0, 1] = np.nan
    before = learner.rows.copy()
    found = learner.learn(one_event())
    assert found.logit.tolist() == [learner.items.base[0]]
    assert found.guarded == 1
    np.testing.assert_array_equal(learner.rows[field], before[field])


def test_a_base_rate_that_is_not_finite_predicts_one_half():
    learner = Learner(first_filter(), None)
    learner.items.base[0] = np.nan
    assert learner.learn(one_event()).probability.tolist() == [0.5]


def test_a_covariance_that_rounding_made_indefinite_counts_as_no_variance():
    first = replace(first_filter("full", 2), covariance=np.array([1, 0, -3], np.float32))
    learner = Learner(first, None)
    learner.items.psi[0], learner.items.base[0] = [1, 1], 0.25
    found = learner.predict(one_event())
    np.testing.assert_array_equal(found.logit, np.float32(0.25) + first.initialization.sum(dtype=np.float32))


@pytest.mark.parametrize("kind", HEADS)
def test_two_hundred_thousand_events_on_one_item_stay_finite(kind):
    n = 200_000
    learner, many = Learner(first_filter(kind), second_filter()), event_columns(1, 1, 0)
    same = {name: np.repeat(getattr(many, name), n) for name in ("slot", "item", "label", "grade", "event_time_ms")}
    found = learner.learn(replace(many, **same, offset=np.arange(n)))
    assert np.isfinite(found.logit).all()
    assert found.guarded == 0
    assert all(np.isfinite(learner.rows[name]).all() for name in ("mean", "covariance", "second_covariance"))


# --- wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "bound"), [("slot", 1, 0), ("item", ITEMS, ITEMS - 1), ("grade", 1, 0),
                                                      ("slot", -1, 0)])  # fmt: skip
def test_an_index_out_of_range_is_refused(name, value, bound):
    learner, event = Learner(first_filter(), None), one_event()
    wrong = replace(event, **{name: np.array([value], np.int32)})
    with pytest.raises(ValueError, match=f"{name} is outside 0 … {bound}"):
        learner.learn(wrong)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="event columns differ in length"):
        Learner(first_filter(), None).learn(replace(one_event(), label=np.zeros(2, np.int8)))


def test_a_model_with_a_constant_that_is_not_finite_is_refused():
    first = replace(first_filter(), drift=np.full(5, np.nan, np.float32))
    with pytest.raises(ValueError, match="drift is not finite"):
        Learner(first, None)


def test_rows_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"the rows are row-v2 head=full .* but the model needs row-v2 head=diagonal"):
        Adaptation(RowLayout.of(first_filter("full"), None, 4), first_filter("diagonal"), None)
