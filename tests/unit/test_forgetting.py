"""Measures of forgetting on matrices small enough to work out by hand, and scores that add up."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from learner.forgetting import (
    LOGIT_BINS,
    CohortScores,
    Column,
    ForgettingMatrix,
    Scores,
    count_logits,
    counted_auc,
    json_bytes,
)
from learner.metrics import auc

OLD, NEW = Column("slice 0 / warm", 0, "warm"), Column("slice 1 / warm", 1, "warm")


def cohort(column, version, users, losses, *, aucs=(0.7, 0.6), zero_shot=None, events=5, not_finite=0):
    adapted = np.array(losses, np.float64)
    loss = np.stack([adapted, adapted + 0.1 if zero_shot is None else np.array(zero_shot, np.float64)])
    counts = np.zeros((2, 2, LOGIT_BINS), np.int64)
    counts[:, 0, 10], counts[:, 1, 20] = 1, 2
    return CohortScores(
        column, version, np.array(users, np.uint32), loss, np.full(len(users), events), aucs, counts, not_finite
    )


def one(version, auc_values, losses, zero_shot_aucs, zero_shot_losses, columns=(OLD, NEW)):
    """Scores of one version, a user per cohort."""
    return Scores(
        version,
        tuple(
            cohort(column, version, [1], [loss], aucs=(a, za), zero_shot=[zl])
            for column, a, loss, za, zl in zip(
                columns, auc_values, losses, zero_shot_aucs, zero_shot_losses, strict=False
            )
        ),
    )


def history():
    """Version 0 knows the old cohort only; the new one appears with version 1, and 3 forgets the old."""
    matrix = ForgettingMatrix()
    matrix = matrix.added(one(0, [0.80], [0.50], [0.70], [0.60]))
    base = one(0, [0, 0.66], [0, 0.62], [0, 0.55], [0, 0.70])
    matrix = matrix.added(one(1, [0.84, 0.70], [0.46, 0.58], [0.72, 0.60], [0.58, 0.65]), base)
    matrix = matrix.added(one(2, [0.78, 0.76], [0.53, 0.52], [0.71, 0.64], [0.59, 0.61]))
    return matrix.added(one(3, [0.81, 0.74], [0.49, 0.55], [0.71, 0.63], [0.59, 0.62]))


def test_the_matrix_has_a_row_per_version_and_a_column_per_cohort():
    matrix = history()
    assert matrix.versions == (0, 1, 2, 3)
    assert matrix.columns == (OLD, NEW)
    np.testing.assert_array_equal(matrix.values[:, :, 0, 0], [[0.80, np.nan], [0.84, 0.70], [0.78, 0.76], [0.81, 0.74]])
    np.testing.assert_array_equal(matrix.values[:, :, 1, 1], [[0.60, np.nan], [0.58, 0.65], [0.59, 0.61], [0.59, 0.62]])


def test_measures_of_auc():
    found = history().measures("auc")
    np.testing.assert_allclose(found.now, [0.81, 0.74], atol=1e-15)
    np.testing.assert_allclose(found.backward_transfer, [0.81 - 0.80, 0.74 - 0.70], atol=1e-15)
    np.testing.assert_allclose(found.forward_transfer, [np.nan, 0.60 - 0.55], atol=1e-15)
    np.testing.assert_allclose(found.forgetting, [0.84 - 0.81, 0.76 - 0.74], atol=1e-15)
    np.testing.assert_allclose(found.minimum, [0.78, 0.74], atol=1e-15)
    np.testing.assert_allclose(found.stability_gap, [0.84 - 0.78, 0.76 - 0.74], atol=1e-15)
    assert found.worst == NEW
    assert found.most_forgotten == OLD


def test_measures_of_log_loss_are_turned_so_that_forgetting_is_a_rise():
    found = history().measures("log_loss")
    np.testing.assert_allclose(found.now, [0.49, 0.55], atol=1e-15)
    np.testing.assert_allclose(found.backward_transfer, [0.50 - 0.49, 0.58 - 0.55], atol=1e-15)
    np.testing.assert_allclose(found.forward_transfer, [np.nan, 0.70 - 0.65], atol=1e-15)
    np.testing.assert_allclose(found.forgetting, [0.49 - 0.46, 0.55 - 0.52], atol=1e-15)
    np.testing.assert_allclose(found.minimum, [0.53, 0.55], atol=1e-15)
    np.testing.assert_allclose(found.stability_gap, [0.53 - 0.46, 0.55 - 0.52], atol=1e-15)
    assert found.worst == NEW


def test_the_summary_averages_over_cohorts():
    found = history().measures("auc").summary()
    assert found["average"] == pytest.approx((0.81 + 0.74) / 2, abs=1e-15)
    assert found["backward_transfer"] == pytest.approx((0.01 + 0.04) / 2, abs=1e-15)
    assert found["forward_transfer"] == pytest.approx(0.05, abs=1e-15)
    assert found["forgetting"] == pytest.approx((0.03 + 0.02) / 2, abs=1e-15)
    assert found["largest_forgetting"] == pytest.approx(0.03, abs=1e-15)
    assert found["most_forgotten"] == OLD.name
    assert found["worst"] == pytest.approx(0.74, abs=1e-15)
    assert found["worst_cohort"] == NEW.name
    assert found["average_minimum"] == pytest.approx((0.78 + 0.74) / 2, abs=1e-15)
    assert found["stability_gap"] == pytest.approx(0.06, abs=1e-15)


def test_what_only_became_better_has_negative_forgetting_and_gap():
    matrix = ForgettingMatrix()
    for version, value in enumerate([0.70, 0.72, 0.75]):
        matrix = matrix.added(one(version, [value], [0.5], [0.6], [0.6]))
    found = matrix.measures("auc")
    assert found.forgetting[0] == pytest.approx(-0.03, abs=1e-15)
    assert found.stability_gap[0] == pytest.approx(-0.02, abs=1e-15)


def test_a_cohort_at_its_first_evaluation_has_nothing_to_forget():
    matrix = ForgettingMatrix().added(one(0, [0.8], [0.5], [0.7], [0.6]))
    found = matrix.measures("auc")
    for term in (found.backward_transfer, found.forward_transfer, found.forgetting, found.minimum, found.stability_gap):
        assert np.isnan(term).all()
    assert found.most_forgotten is None
    assert matrix.added(one(1, [0.8, 0.7], [0.5, 0.6], [0.7, 0.6], [0.6, 0.7])).measures("auc").summary()[
        "backward_transfer"
    ] == pytest.approx(0.0, abs=1e-15)


def test_a_retired_cohort_counts_no_more_and_stays_on_the_map():
    matrix = history().added(Scores(4, (cohort(NEW, 4, [1], [0.5], aucs=(0.77, 0.6)),)))
    found = matrix.measures("auc")
    assert matrix.columns == (OLD, NEW)
    assert np.isnan(found.forgetting[0])
    assert found.summary()["forgetting"] == pytest.approx(0.76 - 0.77, abs=1e-15)
    assert [record["cohort"] for record in matrix.monitoring()[:-1]] == [NEW.name]


def test_an_evaluation_of_another_version_is_no_base():
    later = one(1, [0.8], [0.5], [0.7], [0.6])
    assert np.isnan(ForgettingMatrix().added(later).base).all()
    np.testing.assert_array_equal(ForgettingMatrix().added(one(0, [0.8], [0.5], [0.7], [0.6])).base[0],
                                  [[0.8, 0.7], [0.5, 0.6]])  # fmt: skip


def test_before_the_first_evaluation_there_is_nothing_to_say():
    empty = ForgettingMatrix()
    assert empty.monitoring() == []
    assert empty.measures("auc").summary()["average"] is None
    assert ForgettingMatrix.from_dict(empty.as_dict()).versions == ()


def test_json_brings_the_matrix_back():
    matrix = history()
    found = ForgettingMatrix.from_dict(json.loads(json.dumps(matrix.as_dict(), allow_nan=False)))
    assert found.versions == matrix.versions
    assert found.columns == matrix.columns
    np.testing.assert_array_equal(found.values, matrix.values)
    np.testing.assert_array_equal(found.base, matrix.base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format 2"),
        (lambda d: d["versions"].append(4), "5 versions of 2 cohorts"),
        (lambda d: d.pop("auc"), "'auc'"),
    ],
)
def test_json_of_something_else_is_refused(change, message):
    found = history().as_dict()
    change(found)
    with pytest.raises(ValueError, match=message):
        ForgettingMatrix.from_dict(found)


def test_monitoring_records_are_of_the_latest_evaluation():
    first, second, last = history().monitoring()
    assert first["record"] == second["record"] == "cohort"
    assert (first["version"], first["cohort"], first["slice"], first["kind"]) == (3, OLD.name, 0, "warm")
    assert (first["auc"], first["zero_shot_auc"], first["log_loss"], first["zero_shot_log_loss"]) == (
        0.81, 0.71, 0.49, 0.59,
    )  # fmt: skip
    assert first["log_loss_forgetting"] == pytest.approx(0.03, abs=1e-15)
    assert first["auc_forward_transfer"] is None
    assert last["record"] == "all"
    assert last["auc_most_forgotten"] == OLD.name
    json.dumps([first, second, last], allow_nan=False)


def test_a_cohorts_loss_counts_each_user_once():
    assert cohort(OLD, 0, [1, 2], [0.2, 0.6]).log_loss == pytest.approx((0.4, 0.5), abs=1e-15)
    assert math.isnan(cohort(OLD, 0, [], []).log_loss[0])


def test_scores_of_two_workers_add_up_in_the_order_of_the_users():
    here = Scores(3, (cohort(OLD, 3, [5, 9], [0.5, 0.9], not_finite=1),))
    there = Scores(3, (cohort(OLD, 3, [2, 7], [0.2, 0.7], not_finite=2), cohort(NEW, 3, [1], [0.1])))
    both = here + there
    assert both[OLD.name].user.tolist() == [2, 5, 7, 9]
    assert both[OLD.name].loss[0].tolist() == [0.2, 0.5, 0.7, 0.9]
    assert both[OLD.name].not_finite == 3
    assert both[OLD.name].counts[0, 1, 20] == 4
    assert both[OLD.name].auc == (1.0, 1.0)
    assert both[NEW.name].log_loss[0] == 0.1
    assert (there + here)[OLD.name].user.tolist() == [2, 5, 7, 9]


def test_scores_of_two_versions_do_not_add():
    with pytest.raises(ValueError, match="version 2 do not add to those of version 1"):
        Scores(1, ()) + Scores(2, ())
    with pytest.raises(ValueError, match="version 2 on 'slice 0 / warm'"):
        cohort(OLD, 1, [1], [0.1]) + cohort(OLD, 2, [2], [0.1])


def test_counts_give_the_auc_to_four_digits():
    rng = np.random.default_rng(4)
    label = rng.integers(0, 2, 20_000).astype(np.int8)
    logit = (rng.normal(size=20_000) * 1.5 + label).astype(np.float32)
    assert counted_auc(count_logits(logit, label)) == pytest.approx(auc(label, logit), abs=1e-4)


def test_logits_beyond_the_bins_and_nan_are_counted():
    logit = np.array([-100, 100, np.inf, np.nan], np.float32)
    counts = count_logits(logit, np.array([0, 1, 1, 0], np.int8))
    assert counts[0, 0] == 1
    assert counts[1, -1] == 2
    assert counts[0, LOGIT_BINS // 2] == 1
    assert counts.sum() == 4


def test_counts_of_one_class_have_no_auc():
    assert math.isnan(counted_auc(count_logits(np.zeros(3, np.float32), np.ones(3, np.int8))))


def test_arrays_bring_scores_back():
    scores = Scores(
        3, (cohort(OLD, 2, [5, 9], [0.5, np.nan], aucs=(math.nan, 0.6), not_finite=1), cohort(NEW, 3, [1], [0.1]))
    )
    found = Scores.from_arrays(scores.as_arrays())
    assert found.version == 3
    assert [c.column for c in found.cohorts] == [OLD, NEW]
    assert [c.version for c in found.cohorts] == [2, 3]
    for mine, theirs in zip(found.cohorts, scores.cohorts, strict=True):
        for name in ("user", "loss", "events", "counts", "auc"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        assert mine.not_finite == theirs.not_finite
    assert Scores.from_arrays(Scores(0, ()).as_arrays()) == Scores(0, ())


@pytest.mark.parametrize("name", ["user", "loss", "events", "counts"])
def test_arrays_that_are_not_the_headers_are_refused(name):
    arrays = Scores(3, (cohort(OLD, 3, [5, 9], [0.5, 0.9]),)).as_arrays()
    with pytest.raises(ValueError, match=f"as '{name}'"):
        Scores.from_arrays({**arrays, name: arrays[name][..., :1]})
    with pytest.raises(ValueError, match=f"nothing as '{name}'"):
        Scores.from_arrays({key: value for key, value in arrays.items() if key != name})


@pytest.mark.parametrize(
    "header", [np.frombuffer(b"{", np.uint8), json_bytes({"format": 2}), np.frombuffer(b"[]", np.uint8)]
)
def test_a_header_of_something_else_is_refused(header):
    with pytest.raises(ValueError, match="scores"):
        Scores.from_arrays({"header": header})
