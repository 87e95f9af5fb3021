"""Metrics against values worked out by hand and against the slowest correct way to compute them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from learner.metrics import auc, calibration_error, evaluate, event_index, event_log_loss, paired_difference


def pairwise_auc(label, score):
    wins = [(p > n) + (p == n) / 2 for p in score[label == 1] for n in score[label == 0]]
    return float(np.mean(wins)) if wins else math.nan


def stream(n=400, users=12, seed=3):
    rng = np.random.default_rng(seed)
    label = rng.integers(2, size=n).astype(np.int8)
    probability = np.clip(np.round(0.5 + 0.2 * (label - 0.5) + 0.2 * rng.standard_normal(n), 2), 0, 1)
    user = rng.integers(users, size=n)
    return label, probability, user, event_index(user)


def test_auc_is_the_share_of_pairs_in_order():
    # positives .4 and .9 against negatives .1 and .5: three of four pairs are in order
    assert auc([0, 1, 0, 1], [0.1, 0.4, 0.5, 0.9]) == 0.75


def test_a_tie_counts_half():
    assert auc([0, 1, 1], [0.5, 0.5, 0.7]) == 0.75
    assert auc([0, 1, 0, 1], [0.5] * 4) == 0.5


def test_auc_of_one_class_is_undefined():
    assert math.isnan(auc([1, 1], [0.1, 0.2]))
    assert math.isnan(auc([], []))


def test_auc_with_many_ties_equals_counting_all_pairs():
    label, probability, _, _ = stream()
    assert auc(label, probability) == pytest.approx(pairwise_auc(label, probability), abs=1e-15)


def test_gauc_weights_users_by_events_and_leaves_out_users_with_one_label():
    label = [0, 1, 0, 1, 1, 1, 1]
    probability = [0.2, 0.8, 0.7, 0.6, 0.9, 0.1, 0.3]
    user = [5, 5, 9, 9, 9, 2, 2]
    # user 5: AUC 1, two events; user 9: .6 and .9 against .7, AUC 1/2, three events; user 2 has clicks only
    metrics = evaluate(label, probability, user, event_index(user), bootstrap_samples=0)
    assert metrics.gauc == pytest.approx((1 * 2 + 0.5 * 3) / 5, abs=1e-15)


def test_gauc_is_undefined_where_no_user_has_both_labels():
    metrics = evaluate([0, 1], [0.2, 0.8], [0, 1], [0, 0], bootstrap_samples=0)
    assert math.isnan(metrics.gauc)
    assert metrics.as_dict()["gauc"] is None


def test_log_loss_is_the_mean_of_minus_log_probability_and_is_clipped():
    metrics = evaluate([1, 0, 1], [0.5, 0.25, 0.0], [0, 0, 0], [0, 1, 2], bootstrap_samples=0)
    assert metrics.log_loss == pytest.approx((math.log(2) - math.log(0.75) - math.log(1e-6)) / 3, rel=1e-12)
    assert event_log_loss([0], [1.0])[0] == pytest.approx(-math.log(1e-6), rel=1e-9)


def test_calibration_error_is_the_gap_averaged_over_bins_of_equal_mass():
    # two bins: means .15 and .8 against click rates .5 and 1
    assert calibration_error([0, 1, 1, 1], [0.1, 0.2, 0.7, 0.9], bins=2) == pytest.approx((0.35 + 0.2) / 2)


def test_calibration_error_of_ties_does_not_depend_on_the_order_of_events():
    label = np.array([0, 1, 1, 0, 1, 1])
    probability = np.array([0.5] * 4 + [0.6] * 2)
    shuffled = np.array([5, 1, 0, 3, 4, 2])
    expected = calibration_error(label, probability, bins=3)
    assert expected == pytest.approx(2 * 0.4 / 6)
    assert calibration_error(label[shuffled], probability[shuffled], bins=3) == pytest.approx(expected, abs=1e-15)


def test_event_index_counts_earlier_events_of_the_same_user():
    assert event_index([7, 7, 3, 7, 3, 8]).tolist() == [0, 1, 0, 2, 1, 0]
    assert event_index(np.empty(0, np.int32)).tolist() == []


def test_auc_by_index_takes_each_slice_at_its_bounds():
    index = np.array([0, 1, 4, 5, 9, 10, 19, 20, 49, 50, 51])
    label = np.array([1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1])
    probability = np.linspace(0.05, 0.95, 11)
    metrics = evaluate(label, probability, np.arange(11), index, bootstrap_samples=0)
    assert metrics.by_index == {"1": None, "2-5": 1.0, "6-10": 1.0, "11-20": 1.0, "21-50": 0.0, "51+": None}


def test_the_bootstrap_equals_drawing_users_and_repeating_their_events():
    label, probability, user, index = stream(n=150, users=7)
    metrics = evaluate(label, probability, user, index, bootstrap_samples=40, seed=11)
    rng = np.random.default_rng(11)
    aucs, gaucs, losses = [], [], []
    for _ in range(40):
        copies = [np.flatnonzero(user == u) for u in rng.integers(7, size=7)]
        rows = np.concatenate(copies)
        aucs.append(pairwise_auc(label[rows], probability[rows]))
        of_user = [(pairwise_auc(label[r], probability[r]), len(r)) for r in copies]
        gaucs.append(sum(a * n for a, n in of_user) / sum(n for _, n in of_user))
        losses.append(event_log_loss(label[rows], probability[rows]).mean())
    for name, drawn in (("auc", aucs), ("gauc", gaucs), ("log_loss", losses)):
        assert metrics.ci95[name] == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=1e-12)


def test_the_bootstrap_is_settled_by_its_seed():
    events = stream()
    first = evaluate(*events, bootstrap_samples=20, seed=1)
    assert evaluate(*events, bootstrap_samples=20, seed=1) == first
    assert evaluate(*events, bootstrap_samples=20, seed=2).ci95["auc"] != first.ci95["auc"]


def test_without_samples_intervals_are_null_in_json():
    metrics = evaluate([0, 1], [0.2, 0.8], [0, 0], [0, 1], bootstrap_samples=0)
    assert json.loads(json.dumps(metrics.as_dict(), allow_nan=False)) == {
        "auc": 1.0,
        "gauc": 1.0,
        "log_loss": pytest.approx(-math.log(0.8)),
        "calibration_error": pytest.approx(0.2),
        "by_index": {"1": None, "2-5": None, "6-10": None, "11-20": None, "21-50": None, "51+": None},
        "ci95": {"auc": [None, None], "gauc": [None, None], "log_loss": [None, None]},
    }


def test_paired_difference_of_a_prediction_with_itself_is_zero_in_every_sample():
    label, probability, user, _ = stream()
    same = paired_difference(label, probability, probability, user, bootstrap_samples=30)
    assert (same.auc_difference, same.ci95) == (0.0, (0.0, 0.0))


def test_paired_difference_is_second_minus_first():
    # the first has every pair wrong, the second every pair right, whichever users are drawn
    label, user = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    difference = paired_difference(label, 1.0 - label, 1.0 * label, user, bootstrap_samples=10)
    assert (difference.auc_difference, difference.ci95) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize(
    ("label", "probability", "message"),
    [
        ([], [], "no events"),
        ([1, 1], [0.1, 0.2], "all 2 labels are 1"),
        ([0, 2], [0.1, 0.2], "labels must be 0 or 1"),
        ([0, 1], [0.1, math.nan], "probabilities must lie"),
        ([0, 1], [0.1, 3.0], "probabilities must lie"),
        ([0, 1], [0.1], "probability has shape"),
    ],
)
def test_unusable_events_are_refused_with_the_reason(label, probability, message):
    with pytest.raises(ValueError, match=message):
        evaluate(label, probability, np.zeros(len(label), int), np.arange(len(label)))
