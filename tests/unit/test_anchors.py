"""Who is an anchor, and that scoring them is what the stream would do: user by user, event by event."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from learner.anchors import (
    HEAVY_SUPPORT,
    MAX_SEGMENTS,
    MIN_QUERY,
    NEW_SUPPORT,
    WARM_SUPPORT,
    AnchorSet,
    held_out,
    score,
)
from learner.features import SparseRows
from learner.forgetting import json_bytes
from learner.histories import Histories
from learner.metrics import auc, event_log_loss
from learner.retrace import Retrace
from learner.serving import ItemTable
from learner.user_hash import held_out_users, mixed
from learner.user_state import NO_GRADE, RowLayout, item_hash, ring_item
from tests.models import GRADES, HEADS, ITEMS, small_model


def crc32s(names):
    return np.array([zlib.crc32(name.encode()) for name in names], np.uint32)


def histories(lengths, *, seed=0, first=None):
    """Random events over known and unknown items; user k has plan ``free``, ``paid`` or none."""
    rng = np.random.default_rng(seed)
    events, users = sum(lengths), len(lengths)
    items = np.array([ring_item(item_hash(f"i{k}")) for k in range(ITEMS + 2)], np.uint64)
    grades = rng.integers(0, len(GRADES) + 1, events).astype(np.int32)
    grades[grades == len(GRADES)] = NO_GRADE
    plan = np.arange(users) % 3
    return Histories(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items[rng.integers(0, len(items), events)],
        rng.integers(0, 2, events).astype(np.int8),
        grades,
        np.zeros(users, np.int64) if first is None else np.array(first, np.int64),
        SparseRows(
            np.concatenate([[0], np.cumsum(plan < 2)]).astype(np.int64), plan[plan < 2],
            np.ones(int((plan < 2).sum()), np.float32),
        ),
    )  # fmt: skip


def anchors(lengths=(30, 130, 8, 120, 25, 11), *, users=64, query=10, seed=0, **more):
    names = [f"u{k}" for k in range(len(lengths))]
    return AnchorSet(users, query, seed).with_slice(0, histories(lengths), crc32s(names), **more)


def test_a_cohort_has_the_users_with_enough_events():
    found = {cohort.kind: cohort for cohort in anchors().cohorts}
    hashes = crc32s([f"u{k}" for k in range(6)])
    assert list(found) == ["new", "warm", "heavy"]
    assert found["new"].crc32.tolist() == sorted(hashes.tolist())
    assert found["warm"].crc32.tolist() == sorted(hashes[[0, 1, 3, 4]].tolist())
    assert found["heavy"].crc32.tolist() == sorted(hashes[[1, 3]].tolist())
    assert set(found["warm"].support) == {WARM_SUPPORT}
    assert set(found["heavy"].support) == {HEAVY_SUPPORT}
    assert found["warm"].column == ("slice 0 / warm", 0, "warm")


def test_a_users_history_ends_with_the_query():
    whole, found = histories((30, 130, 8, 120, 25, 11)), anchors()
    hashes = crc32s([f"u{k}" for k in range(6)]).tolist()
    for cohort in found.cohorts:
        for k, crc32 in enumerate(cohort.crc32.tolist()):
            user = hashes.index(crc32)
            expected = min(int(whole.lengths[user]), int(cohort.support[k]) + found.query)
            first, mine = int(whole.starts[user]), cohort.histories.take(np.array([k]))
            assert mine.events == expected >= cohort.support[k] + MIN_QUERY
            np.testing.assert_array_equal(mine.item, whole.item[first : first + expected])
            np.testing.assert_array_equal(mine.label, whole.label[first : first + expected])


def test_new_users_have_seen_none_to_four_events():
    found = anchors((20,) * 400, users=400).cohorts[0]
    assert found.kind == "new"
    assert np.bincount(found.support).tolist() == pytest.approx([400 / (NEW_SUPPORT + 1)] * (NEW_SUPPORT + 1), abs=25)


def test_a_user_whose_first_events_are_gone_is_not_new():
    whole = histories((30, 30), first=[0, 64])
    found = AnchorSet(8, 10).with_slice(0, whole, crc32s(["a", "b"]))
    assert [(c.kind, c.crc32.tolist()) for c in found.cohorts] == [
        ("new", crc32s(["a"]).tolist()), ("warm", sorted(crc32s(["a", "b"]).tolist()))
    ]  # fmt: skip


def test_the_draw_depends_on_the_users_alone():
    lengths, names = [30] * 50, [f"u{k}" for k in range(50)]
    whole = histories(lengths)
    there = np.random.default_rng(1).permutation(50)
    one = AnchorSet(8, 10).with_slice(1, whole, crc32s(names))
    other = AnchorSet(8, 10).with_slice(1, whole.take(there), crc32s([names[k] for k in there]))
    for mine, theirs in zip(one.cohorts, other.cohorts, strict=True):
        assert len(mine.crc32) == 8
        np.testing.assert_array_equal(mine.crc32, theirs.crc32)
        np.testing.assert_array_equal(mine.histories.item, theirs.histories.item)


def test_two_workers_draw_of_their_users_what_one_would_draw_of_all():
    names = [f"u{k}" for k in range(60)]
    whole = histories([30] * 60)
    everyone = AnchorSet(8, 10).with_slice(1, whole, crc32s(names)).cohorts[0]
    halves = [
        AnchorSet(8, 10).with_slice(1, whole.take(half), crc32s([names[k] for k in half])).cohorts[0]
        for half in (np.arange(30), np.arange(30, 60))
    ]
    assert set(everyone.crc32) <= set(halves[0].crc32) | set(halves[1].crc32)


def test_slices_and_seeds_draw_other_users():
    names, whole = [f"u{k}" for k in range(500)], histories([30] * 500)
    drawn = [
        set(AnchorSet(50, 10, seed).with_slice(slice, whole, crc32s(names)).cohorts[1].crc32.tolist())
        for seed, slice in ((0, 0), (0, 1), (1 << 40 | 1, 0))
    ]
    # 50 of 500: by chance two draws share 5
    assert len(drawn[0] & drawn[1]) < 15
    assert len(drawn[0] & drawn[2]) < 15


def test_segments_are_cohorts_of_the_most_frequent_values():
    lengths = [30] * 40
    values = [""] * 4 + ["b"] * 20 + ["a"] * 16
    found = anchors(lengths, segments=values)
    assert [c.kind for c in found.cohorts] == ["new", "warm", "segment=b", "segment=a"]
    assert len(found.cohorts[2].crc32) == 20
    assert set(found.cohorts[3].crc32) == set(crc32s([f"u{k}" for k in range(24, 40)]))
    assert set(found.cohorts[3].support) == {WARM_SUPPORT}
    many = anchors([30] * 40, segments=[f"s{k:02}" for k in range(40)])
    assert [c.kind for c in many.cohorts[2:]] == [f"segment=s{k:02}" for k in range(MAX_SEGMENTS)]


def test_slices_come_and_are_retired():
    both = anchors().with_slice(3, histories((30,)), crc32s(["z"]))
    assert both.slices == (0, 3)
    assert both.retired({0}).slices == (3,)
    assert [c.column.name for c in both.retired([0]).cohorts] == ["slice 3 / new", "slice 3 / warm"]
    with pytest.raises(ValueError, match="slice 3 has its cohorts already"):
        both.with_slice(3, histories((30,)), crc32s(["y"]))


def test_what_cannot_be_anchors_is_refused():
    with pytest.raises(ValueError, match=r"meta\.anchors"):
        AnchorSet(0, 10)
    with pytest.raises(ValueError, match=r"meta\.anchors"):
        AnchorSet(10, MIN_QUERY - 1)
    with pytest.raises(ValueError, match="2 histories, but 1 hashes"):
        AnchorSet(10, 10).with_slice(0, histories((30, 30)), crc32s(["a"]))
    with pytest.raises(ValueError, match="not as many segments"):
        AnchorSet(10, 10).with_slice(0, histories((30,)), crc32s(["a"]), ["x", "y"])


def test_held_out_is_a_share_that_no_other_hash_tells():
    hashes = crc32s([f"user-{k:06}" for k in range(100_000)])
    out = held_out(hashes, 0.1)
    assert out.mean() == pytest.approx(0.1, abs=0.003)
    # of the users that a reservoir keeps (the smallest hashes) and of those that a cohort would draw, as many
    assert out[np.argsort(hashes)[:20_000]].mean() == pytest.approx(0.1, abs=0.007)
    assert out[np.argsort(mixed(hashes, 12345))[:20_000]].mean() == pytest.approx(0.1, abs=0.007)
    np.testing.assert_array_equal(out, held_out(hashes, 0.2) & out)
    np.testing.assert_array_equal(out[:100], held_out_users([b"user-%06d" % k for k in range(100)], 0.1))
    assert not held_out(hashes, 0.0).any()
    assert held_out(hashes, 1.0).all()


def test_the_mix_is_murmurs_finalizer():
    # fmix32 of MurmurHash3 (public domain, A. Appleby): known values
    assert mixed(np.array([0, 1, 0xFFFFFFFF], np.uint32), 0).tolist() == [0, 0x514E28B7, 0x81F16F39]
    assert mixed(np.array([5], np.uint32), 4).tolist() == [0x514E28B7]


def slow_scores(cohort, model):
    """(adapted, zero-shot) logits of the query and its labels, one user and one event after the other."""
    retrace = Retrace(model.first, model.second)
    adapted, zero_shot, labels, users = [], [], [], []
    for k in range(len(cohort.crc32)):
        one = cohort.histories.take(np.array([k]))
        part = start = retrace.start(model.means_of(one.features)[0])
        for n in range(one.events):
            row = model.rows_of(one.item[n : n + 1])
            item = ItemTable(model.items.psi[row], model.items.base[row], model.items.second_psi[row])
            grade = len(model.first.target) - 1 if one.grade[n] == NO_GRADE else int(one.grade[n])
            if n < cohort.support[k]:
                part = retrace.learn(part, item, int(one.label[n]), grade).after
                continue
            adapted.append(retrace.predict(part, item)[0][0])
            zero_shot.append(retrace.predict(start, item)[0][0])
            labels.append(one.label[n])
            users.append(k)
    return np.array(adapted), np.array(zero_shot), np.array(labels), np.array(users)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_scores_are_what_the_filters_say_user_by_user(kind, second):
    model = small_model(kind, second=second, meta_version=7)
    found = score(anchors(query=6), model, RowLayout.of(model.first, model.second, 32))
    assert found.version == 7
    for cohort in anchors(query=6).cohorts:
        mine = found[cohort.column.name]
        adapted, zero_shot, label, user = slow_scores(cohort, model)
        for s, logit in enumerate((adapted, zero_shot)):
            loss = event_log_loss(label, 1 / (1 + np.exp(-logit.astype(np.float64))))
            expected = np.bincount(user, loss) / np.bincount(user)
            np.testing.assert_allclose(mine.loss[s], expected, atol=1e-6)
            assert mine.auc[s] == pytest.approx(auc(label, logit), abs=1e-12)
            assert mine.counts[s].sum(axis=1).tolist() == [(label == 0).sum(), (label == 1).sum()]
        np.testing.assert_array_equal(mine.user, cohort.crc32)
        np.testing.assert_array_equal(mine.events, np.bincount(user))
        assert mine.not_finite == 0
        assert mine.finite


def test_scores_of_two_workers_are_those_of_one():
    model = small_model()
    layout = RowLayout.of(model.first, model.second, 32)
    lengths, names = [30] * 30, [f"u{k}" for k in range(30)]
    whole = histories(lengths)
    together = score(AnchorSet(64, 10).with_slice(0, whole, crc32s(names)), model, layout)
    apart = [
        score(AnchorSet(64, 10).with_slice(0, whole.take(half), crc32s([names[k] for k in half])), model, layout)
        for half in (np.arange(17), np.arange(17, 30))
    ]
    merged = apart[0] + apart[1]
    for cohort in together.cohorts:
        mine = merged[cohort.name]
        np.testing.assert_array_equal(mine.user, cohort.user)
        np.testing.assert_array_equal(mine.loss, cohort.loss)
        np.testing.assert_array_equal(mine.counts, cohort.counts)
        assert mine.auc == pytest.approx(cohort.auc, abs=4e-3)  # a tie among 300 events counts


def test_scoring_changes_no_anchor_and_is_repeatable():
    model, some = small_model(), anchors()
    layout = RowLayout.of(model.first, model.second, 32)
    before = {name: array.copy() for name, array in some.as_arrays().items()}
    one, other = score(some, model, layout).as_arrays(), score(some, model, layout).as_arrays()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    for name, array in some.as_arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_without_anchors_there_are_no_scores():
    model = small_model(meta_version=3)
    found = score(AnchorSet(8, 10), model, RowLayout.of(model.first, model.second, 32))
    assert (found.version, found.cohorts) == (3, ())


def test_a_constant_that_is_not_finite_spoils_every_score():
    model = small_model()
    model.first = replace(model.first, kappa=float("nan"))
    found = score(anchors(), model, RowLayout.of(model.first, model.second, 32))
    for cohort in found.cohorts:
        assert np.isnan(cohort.loss).all()
        assert np.isnan(cohort.auc).all()
        assert cohort.not_finite == cohort.events.sum() > 0
        assert cohort.counts.sum() == 0
        assert not cohort.finite


def test_predictions_that_the_kernel_guarded_are_counted_where_they_were_made():
    model = small_model()
    weights = model.fixed.user_feature_weights.copy()
    weights[1] = np.nan  # whoever has the plan "paid": users 1, 4, … of the histories
    model.fixed = replace(model.fixed, user_feature_weights=weights)
    some = anchors((30, 130, 8, 30, 8, 11), query=6)
    found = score(some, model, RowLayout.of(model.first, model.second, 32))
    hashes = crc32s([f"u{k}" for k in range(6)])
    for cohort, mine in zip(some.cohorts, found.cohorts, strict=True):
        paid = np.isin(cohort.crc32, hashes[[1, 4]])
        assert mine.not_finite == (2 * mine.events + cohort.support)[paid].sum() > 0
        assert np.isfinite(mine.loss).all()
        assert not mine.finite


def test_arrays_bring_anchors_back():
    some = anchors(segments=["x", "y", "x", "x", "y", ""]).with_slice(4, histories((30,)), crc32s(["z"]))
    found = AnchorSet.from_arrays(some.as_arrays())
    assert (found.users, found.query, found.seed, found.slices) == (64, 10, 0, (0, 4))
    assert [c.column for c in found.cohorts] == [c.column for c in some.cohorts]
    for name, array in some.as_arrays().items():
        np.testing.assert_array_equal(found.as_arrays()[name], array)
    empty = AnchorSet.from_arrays(AnchorSet(5, 6, 7).as_arrays())
    assert (empty.users, empty.query, empty.seed, empty.cohorts) == (5, 6, 7, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("item"), "without 'item'"),
        (lambda a: a.update(crc32=a["crc32"][1:]), "the arrays hold"),
        (lambda a: a.update(support=a["support"] + 100), "fewer than 4 query events"),
        (lambda a: a.update(header=np.zeros(3, np.uint8)), "a header that is JSON"),
        (lambda a: a.update(header=json_bytes({"format": 9})), "does not read"),
        (lambda a: a.update(starts=a["starts"][:-1]), "histories of"),
    ],
)
def test_arrays_of_something_else_are_refused(change, message):
    arrays = anchors().as_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=message):
        AnchorSet.from_arrays(arrays)
