"""A row comes onto another version: learned anew from its events, to the stream's own bits, or by another prior."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.adaptation import Adaptation
from learner.features import SparseRows
from learner.histories import Histories, starts_of
from learner.interactions import Interactions
from learner.prior_exchange import Prior, exchange_prior
from learner.rebasing import event_columns, latest_events, put_adaptive, relearn
from learner.serving import ServingModel
from learner.user_state import HEADER_BYTES, NO_GRADE, RowLayout, item_hash, new_rows, recent_events, ring_item
from state.memory_store import MemoryUserStore
from streams.processor import Processor
from tests.models import HEADS, f32, first_filter, packed, random_stream, small_model, spread

RING = 8
WHICH = [(kind, second, graded) for kind in HEADS for second, graded in ((True, True), (False, False))]


def streamed(model: ServingModel, stream: Interactions, cuts: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(rows of all users in the order of ``user_ids``, logits) as the stream makes them."""
    said = []
    with Processor(model, lambda _, layout: MemoryUserStore(layout), StateSettings(ring=RING)) as work:
        for first, last in pairwise((0, *cuts, len(stream))):
            said.append(work.process(0, stream.take(slice(first, last))).logit)
        rows, known = work.store(0).get_many([user.encode() for user in stream.user_ids])
    assert known.all()
    return np.array(rows), np.concatenate(said)


def histories_of(model: ServingModel, stream: Interactions) -> tuple[Histories, np.ndarray]:
    """(every user's whole history, (T,) the place of each of its events in the stream), by plain loops."""
    order = [k for user in range(len(stream.user_ids)) for k in range(len(stream)) if stream.user[k] == user]
    grades = model.grades(stream.value)
    grade = [NO_GRADE if grades[k] == len(model.fixed.grades) else grades[k] for k in order]
    lengths = np.bincount(stream.user[order])
    return Histories(
        starts_of(lengths),
        np.array([ring_item(item_hash(stream.item_ids[stream.item[k]])) for k in order], np.uint64),
        stream.label[order], np.array(grade, np.int32), np.zeros(len(lengths), np.int64),
        model.user_features(stream.user_ids, stream.user_features),
    ), np.array(order)  # fmt: skip


def layout_of(model: ServingModel) -> RowLayout:
    return RowLayout.of(model.first, model.second, RING)


def adapted(model: ServingModel) -> Adaptation:
    return Adaptation(layout_of(model), model.first, model.second)


def adaptive(layout: RowLayout, slab: np.ndarray) -> np.ndarray:
    """(n, bytes) without header and ring."""
    return slab[:, HEADER_BYTES : layout.row_bytes - 8 * layout.ring]


@pytest.mark.parametrize(("kind", "second", "graded"), WHICH)
def test_a_whole_history_gives_the_bits_of_the_stream_however_that_was_cut(kind, second, graded):
    model = small_model(kind, second=second, graded=graded, meta_version=6)
    stream = random_stream(300, 9)
    whole, order = histories_of(model, stream)
    learned = relearn(adapted(model), model, whole, model.means_of(whole.features))
    for cuts in ((), (1, 40, 41, 170)):
        rows, logit = streamed(model, stream, cuts)
        np.testing.assert_array_equal(adaptive(layout_of(model), learned.slab), adaptive(layout_of(model), rows))
        np.testing.assert_array_equal(learned.logit, logit[order])
    assert layout_of(model).rows(learned.slab)["meta_version"].tolist() == [6] * 9


@pytest.mark.parametrize("kind", HEADS)
def test_users_are_learned_alike_alone_and_together(kind):
    model = small_model(kind)
    whole, _ = histories_of(model, random_stream(120, 6))
    together = relearn(adapted(model), model, whole, model.means_of(whole.features))
    for user in (4, 1):
        one = whole.take(np.array([user]))
        alone = relearn(adapted(model), model, one, model.means_of(one.features))
        layout = layout_of(model)
        np.testing.assert_array_equal(adaptive(layout, alone.slab)[0], adaptive(layout, together.slab)[user])
        np.testing.assert_array_equal(alone.logit, together.logit[whole.starts[user] : whole.starts[user + 1]])


def test_no_events_leave_the_start_and_no_users_are_no_rows():
    model = small_model(meta_version=3)
    layout = layout_of(model)
    nothing = histories_of(model, random_stream(60, 4))[0].cut(np.zeros(4, np.int64), np.zeros(4, np.int64))
    means = model.means_of(nothing.features)
    learned = relearn(adapted(model), model, nothing, means)
    np.testing.assert_array_equal(learned.slab, new_rows(layout, model.first, model.second, means, 3))
    empty = relearn(adapted(model), model, Histories.empty(), np.zeros((0, 5), np.float32))
    assert empty.slab.shape == (0, layout.row_bytes)
    assert empty.logit.shape == (0,)


def test_steps_of_the_gradient_head_shrink_with_events_that_were_dropped():
    model = small_model("gradient", second=False, graded=False)
    whole, _ = histories_of(model, random_stream(90, 3))
    dropped = np.array([0, 5, 17])
    kept = whole.cut(dropped, whole.lengths)
    means = model.means_of(kept.features)
    found = layout_of(model).rows(relearn(adapted(model), model, kept, means).slab)["mean"]
    first, rows = model.first, model.rows_of(kept.item)
    for user in range(3):
        m = means[user].astype(float)
        for n, k in enumerate(range(kept.starts[user], kept.starts[user + 1])):
            psi = model.items.psi[rows[k]].astype(float)
            p = 1 / (1 + np.exp(-(model.items.base[rows[k]] + m @ psi)))
            decay = (1 + (dropped[user] + n) / first.tau) ** -first.alpha
            m = m + first.rate * first.weight[0] * psi * (kept.label[k] - p) * decay
        np.testing.assert_allclose(found[user], m, rtol=1e-4, atol=1e-5)


def test_unknown_items_and_grades_reach_the_kernel_as_what_they_are():
    model = small_model(graded=True)
    items = ["i3", "never", "i3"]
    given = Histories(
        np.array([0, 2, 3]), np.array([ring_item(item_hash(i)) for i in items], np.uint64),
        np.array([1, 0, 1], np.int8), np.array([4, NO_GRADE, 0], np.int32), np.zeros(2, np.int64),
        model.user_features(["a", "b"], {}),
    )  # fmt: skip
    columns = event_columns(model, given)
    assert columns.slot.tolist() == [0, 0, 1]
    assert columns.grade.tolist() == [4, 5, 0]
    assert columns.item_row[columns.item].tolist() == [3, model.rows_of(given.item[1:2])[0], 3]
    assert columns.item_hash[columns.item].tolist() == [(item_hash(i) >> 24) << 24 for i in items]
    plain = small_model(graded=False)
    assert event_columns(plain, given).grade.tolist() == [0, 0, 0]


# --- the latest events ----------------------------------------------------------------------------------------


def test_what_rings_hold_is_what_each_says_alone():
    model = small_model()
    layout = layout_of(model)
    stream = random_stream(60, 12)
    rows, _ = streamed(model, stream)
    found = latest_events(layout, rows)
    counts = np.bincount(stream.user)
    assert counts.min() < RING < counts.max()  # some are whole, of others the oldest are gone
    assert found.lengths.tolist() == np.minimum(counts, RING).tolist()
    assert found.first.tolist() == np.maximum(counts - RING, 0).tolist()
    assert len(found.features) == 12
    for user, row in enumerate(layout.rows(rows)):
        expected = recent_events(layout, row)
        one = found.take(np.array([user]))
        np.testing.assert_array_equal(one.item, expected.item)
        np.testing.assert_array_equal(one.label, expected.label)
        np.testing.assert_array_equal(one.grade, expected.grade)


def test_the_ring_of_a_user_with_few_events_is_the_whole_history():
    model = small_model()
    rows, _ = streamed(model, stream := random_stream(60, 12))
    whole, _ = histories_of(model, stream)
    few = np.flatnonzero(whole.lengths <= RING)
    assert len(few)
    events = latest_events(layout_of(model), rows[few])
    learned = relearn(adapted(model), model, events, model.means_of(whole.features)[few])
    np.testing.assert_array_equal(adaptive(layout_of(model), learned.slab), adaptive(layout_of(model), rows[few]))


def test_rows_without_a_ring_or_without_events_have_no_latest_ones():
    model = small_model()
    for ring in (0, RING):
        layout = RowLayout.of(model.first, model.second, ring)
        slab = new_rows(layout, model.first, model.second, np.zeros((3, 5), np.float32), 0)
        if not ring:
            layout.rows(slab)["events"] = 4
        found = latest_events(layout, slab)
        assert found.lengths.tolist() == [0, 0, 0]
        assert found.first.tolist() == [4 if not ring else 0] * 3
    none = np.zeros((0, layout.row_bytes), np.uint8)
    assert len(latest_events(layout, none)) == 0


def test_adaptive_parts_are_put_where_they_belong_and_nothing_else_is_touched():
    model = small_model(meta_version=9)
    layout = layout_of(model)
    rows, _ = streamed(model, random_stream(60, 4))
    learned = new_rows(layout, model.first, model.second, np.arange(10, dtype=np.float32).reshape(2, 5), 9)
    before = rows.copy()
    put_adaptive(layout, rows, np.array([3, 1]), learned, 11)
    np.testing.assert_array_equal(rows[[0, 2]], before[[0, 2]])
    np.testing.assert_array_equal(adaptive(layout, rows[[3, 1]]), adaptive(layout, learned))
    end = layout.row_bytes - 8 * RING
    np.testing.assert_array_equal(rows[:, end:], before[:, end:])
    was, now = layout.rows(before), layout.rows(rows)
    assert now["meta_version"].tolist() == [9, 11, 9, 11]
    for name in ("layout_version", "events", "last_offset", "first_time_ms", "last_time_ms", "ledger", "guarded"):
        np.testing.assert_array_equal(now[name], was[name], err_msg=name)


# --- the prior exchanged --------------------------------------------------------------------------------------


def priors(model: ServingModel, features: SparseRows) -> list[Prior]:
    found = [Prior(model.means_of(features), model.first.covariance)]
    if model.second is not None:
        second = np.tile(model.second.initialization, (len(features), 1))
        found.append(Prior(second, model.second.covariance))
    return found


def other_priors(model: ServingModel, users: int, seed: int = 5) -> list[Prior]:
    """Of another version: means and covariances have moved a little."""
    rng = np.random.default_rng(seed)
    found = []
    for filter_, full in ((model.first, model.first.kind == "full"), (model.second, True)):
        if filter_ is None:
            continue
        dim = filter_.dim
        covariance = f32(np.zeros(0))
        if filter_.covariance.size:
            covariance = packed(spread(rng, dim, 0.3)) if full else f32(rng.uniform(0.2, 0.6, dim))
        found.append(Prior(f32(rng.normal(size=(users, dim)) / 3), covariance))
    return found


@pytest.mark.parametrize(("kind", "second", "graded"), WHICH)
def test_from_a_version_to_itself_nothing_changes_but_the_number(kind, second, graded):
    model = small_model(kind, second=second, graded=graded)
    layout = layout_of(model)
    stream = random_stream(200, 7)
    rows, _ = streamed(model, stream)
    before = rows.copy()
    own = priors(model, model.user_features(stream.user_ids, stream.user_features))
    exchange_prior(layout, rows, own, own, 4)
    was, now = layout.rows(before), layout.rows(rows)
    assert now["meta_version"].tolist() == [4] * 7
    for name in ("mean", "covariance", "second_mean", "second_covariance"):
        np.testing.assert_allclose(now[name], was[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name in ("events", "ledger", "last_offset", "ring", "guarded"):
        np.testing.assert_array_equal(now[name], was[name], err_msg=name)


@pytest.mark.parametrize(("kind", "second", "graded"), WHICH)
def test_who_has_no_event_gets_the_new_prior(kind, second, graded):
    model = small_model(kind, second=second, graded=graded)
    layout, features = layout_of(model), model.user_features(["a", "b"], {"plan": ("free", "paid")})
    old, new = priors(model, features), other_priors(model, 2)
    slab = new_rows(layout, model.first, model.second, old[0].mean, 0)
    exchange_prior(layout, slab, old, new, 1)
    rows = layout.rows(slab)
    for names, prior in zip((("mean", "covariance"), ("second_mean", "second_covariance")), new, strict=False):
        np.testing.assert_allclose(rows[names[0]], prior.mean, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(rows[names[1]], np.tile(prior.covariance, (2, 1)), rtol=2e-6, atol=1e-7)


def symmetric(packed_rows: np.ndarray, dim: int) -> np.ndarray:
    lower = np.zeros((dim, dim))
    lower[np.tril_indices(dim)] = packed_rows
    return lower + np.tril(lower, -1).T


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_what_the_events_said_stays_and_is_added_to_the_new_prior(kind):
    """Of a linear model with Gaussian noise the exchange is exact: that is where Λ' and η' come from."""
    model = small_model(kind, second=False)
    layout, rng = layout_of(model), np.random.default_rng(0)
    old, new = other_priors(model, 3, seed=1), other_priors(model, 3, seed=2)

    def matrix(packed_row: np.ndarray) -> np.ndarray:
        return symmetric(packed_row, 5) if kind == "full" else np.diag(packed_row.astype(float))

    evidence = [np.diag(rng.uniform(0, 9, 5)) if kind == "diagonal" else spread(rng, 5, 4.0) for _ in range(3)]
    said = rng.normal(size=(3, 5)) * 3

    def posterior(prior: Prior) -> tuple[np.ndarray, np.ndarray]:
        start = np.linalg.inv(matrix(prior.covariance))
        S = np.linalg.inv(start + np.array(evidence))
        return np.einsum("nij,nj->ni", S, prior.mean @ start + said), S

    slab = new_rows(layout, model.first, None, old[0].mean, 0)
    m, S = posterior(old[0])
    rows = layout.rows(slab)
    rows["mean"] = m
    rows["covariance"] = [packed(s) if kind == "full" else np.diag(s) for s in S]
    exchange_prior(layout, slab, old, new, 1)
    m, S = posterior(new[0])
    np.testing.assert_allclose(rows["mean"], m, rtol=1e-4, atol=1e-5)
    expected = [packed(s) if kind == "full" else np.diag(s) for s in S]
    np.testing.assert_allclose(rows["covariance"], expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_head_moves_with_the_start_and_keeps_the_rest():
    model = small_model("gradient", second=False)
    layout = layout_of(model)
    rows, _ = streamed(model, random_stream(90, 5))
    mean = layout.rows(rows)["mean"].copy()
    old, new = other_priors(model, 5, seed=1), other_priors(model, 5, seed=2)
    exchange_prior(layout, rows, old, new, 8)
    np.testing.assert_array_equal(layout.rows(rows)["mean"], mean + (new[0].mean - old[0].mean))
    assert layout.rows(rows)["meta_version"].tolist() == [8] * 5


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_where_nothing_positive_is_left_the_mean_moves_with_the_prior_and_the_others_are_exchanged(kind):
    # the second user's drift has made the posterior wider than its prior, and the new prior is wider still
    model = small_model(kind, second=False)
    layout, dim = layout_of(model), 5

    def covariance(variance: float) -> np.ndarray:
        return packed(np.eye(dim) * variance) if kind == "full" else f32(np.full(dim, variance))

    old = [Prior(f32(np.full((3, dim), 0.5)), covariance(0.5))]
    new = [Prior(f32(np.full((3, dim), 0.7)), covariance(4.0))]
    slab = new_rows(layout, first_filter(kind, dim), None, f32(np.full((3, dim), 1.0)), 0)
    rows = layout.rows(slab)
    rows["covariance"] = [covariance(v) for v in (0.25, 2.0, 0.1)]
    exchange_prior(layout, slab, old, new, 1)
    # precisions: 4 − 2 + 1/4, 1/2 − 2 + 1/4 < 0, 10 − 2 + 1/4
    np.testing.assert_allclose(rows["covariance"], [covariance(v) for v in (1 / 2.25, 2.0, 1 / 8.25)], rtol=1e-6)
    np.testing.assert_array_equal(rows["covariance"][1], covariance(2.0))
    expected = [(4 * 1 - 2 * 0.5 + 0.25 * 0.7) / 2.25, 1 + 0.7 - 0.5, (10 * 1 - 2 * 0.5 + 0.25 * 0.7) / 8.25]
    np.testing.assert_allclose(rows["mean"], np.tile(np.array(expected)[:, None], dim), rtol=1e-6)


def test_a_posterior_that_would_be_all_but_infinite_is_not_believed():
    # precisions 1/2 − 2 + 1.5000001: the variance would be 10⁷, and the mean as far away
    model = small_model("diagonal", second=False)
    layout = layout_of(model)
    old = [Prior(f32(np.full((2, 5), 0.5)), f32(np.full(5, 0.5)))]
    new = [Prior(f32(np.full((2, 5), 0.7)), f32(np.full(5, 1 / 1.5000001)))]
    slab = new_rows(layout, model.first, None, f32(np.full((2, 5), 1.0)), 0)
    rows = layout.rows(slab)
    rows["covariance"] = [np.full(5, 2.0), np.full(5, 0.6)]
    exchange_prior(layout, slab, old, new, 1)
    np.testing.assert_array_equal(rows["covariance"][0], np.full(5, 2.0, np.float32))
    np.testing.assert_allclose(rows["mean"][0], np.full(5, 1.2), rtol=1e-6)
    # 1/0.6 − 2 + 1.5 is less than the new prior's precision, but a covariance
    np.testing.assert_allclose(rows["covariance"][1], np.full(5, 1 / (1 / 0.6 - 0.5)), rtol=1e-5)


@pytest.mark.parametrize("damage", ["nan", "singular", "indefinite"])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_a_damaged_row_takes_no_other_with_it(kind, damage):
    model = small_model(kind, second=False)
    layout = layout_of(model)
    rows, _ = streamed(model, random_stream(200, 7))
    alone = rows.copy()
    bad = layout.rows(rows)["covariance"][2].copy()
    bad[...] = {"nan": np.nan, "singular": 0.0, "indefinite": -0.1 - 0.1 * np.arange(len(bad))}[damage]
    layout.rows(rows)["covariance"][2] = bad
    old, new = other_priors(model, 7, seed=1), other_priors(model, 7, seed=2)
    mean = layout.rows(rows)["mean"][2].copy()
    exchange_prior(layout, rows, old, new, 1)
    exchange_prior(layout, alone, old, new, 1)
    others = [0, 1, 3, 4, 5, 6]
    np.testing.assert_array_equal(rows[others], alone[others])
    np.testing.assert_array_equal(layout.rows(rows)["covariance"][2], bad)
    np.testing.assert_allclose(layout.rows(rows)["mean"][2], mean + new[0].mean[2] - old[0].mean[2], rtol=1e-6)
