"""Baselines on small streams: worked-out values, no look ahead, and what is frozen stays frozen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.baselines import BASELINES, build_problem, run_baselines
from learner.baselines.counting import counted
from learner.baselines.non_meta import GRID as FACTORIZATION_GRID
from learner.baselines.non_meta import Prior, fitted_prior, follow
from learner.baselines.non_meta import train as factorize
from learner.baselines.pooled import FINE_TUNE_BATCH, GRID, PooledSettings, fine_tune, predict, train
from learner.features import Catalogue, FeatureField
from learner.interactions import Interactions

USERS = Catalogue((FeatureField("group", "categorical"),), {f"u{k}": ("ab"[k % 2],) for k in range(100)})
ITEMS = Catalogue((FeatureField("kinds", "multi"),), {f"i{k}": ("x|y" if k % 3 else "y",) for k in range(40)})
SMALL = PooledSettings(4, 0, 0.0, 0.1, 5e-3, 1)


def events(first_user, users, events_per_user, seed, items=20):
    """Users arrive one after the other; user u likes the items whose parity is its own."""
    rng = np.random.default_rng(seed)
    n = users * events_per_user
    user = first_user + np.repeat(np.arange(users), events_per_user)
    item = rng.integers(items, size=n)
    label = (rng.random(n) < np.where((user + item) % 2 == 0, 0.8, 0.2)).astype(np.int8)
    times = 1000 * (first_user * events_per_user + np.arange(n))
    return Interactions.from_columns([f"u{u}" for u in user], [f"i{i}" for i in item], label, times)


OFFLINE = events(0, 40, 15, seed=0)
ONLINE = events(40, 25, 14, seed=1, items=24)


def problem(offline=OFFLINE, online=ONLINE):
    return build_problem(offline, online, USERS, ITEMS)


def with_labels(batch, first, past):
    """The batch with the labels of first .. past − 1 turned over."""
    label = batch.label.copy()
    label[first:past] = 1 - label[first:past]
    return replace(batch, label=label)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Steps on a few events are quicker without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def predictions():
    return run_baselines(OFFLINE, ONLINE, USERS, ITEMS, seed=4)


def test_item_mean_counts_offline_events_and_counts_each_online_event_after_it():
    offline = Interactions.from_columns(["u0", "u0", "u1"], ["i0", "i0", "i1"], [1, 0, 1], [1, 2, 3])
    online = Interactions.from_columns(["u2", "u2", "u2"], ["i0", "i0", "i9"], [1, 1, 0], [4, 5, 6])
    overall = (2 + 1) / (3 + 2)
    expected = [(1 + overall) / (2 + 1), (2 + overall) / (3 + 1), overall]
    p = counted(problem(offline, online), 1.0, np.inf)
    assert p.tolist() == pytest.approx(expected, rel=1e-6)


def test_user_bias_moves_by_a_newton_step_after_each_event():
    offline = Interactions.from_columns(["u0", "u0"], ["i0", "i0"], [1, 0], [1, 2])
    online = Interactions.from_columns(["u2", "u2"], ["i8", "i9"], [1, 0], [4, 5])
    # both items are new: their rate is the overall 1/2, and only the bias speaks; its precision 2 grows by 1/4
    bias = 0.5 / 2.25
    p = counted(problem(offline, online), 1.0, 2.0)
    assert p.tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-bias))], rel=1e-6)


def test_ids_are_matched_by_text_across_the_two_dictionaries():
    offline = Interactions.from_columns(["a", "b"], ["x", "y"], [1, 0], [1, 2])
    online = Interactions.from_columns(["c", "a"], ["y", "z"], [1, 0], [3, 4])
    coded = problem(offline, online)
    assert coded.online.item.tolist() == [1, 2]
    assert coded.online.user.tolist() == [2, 0]
    assert (len(coded.users), len(coded.items)) == (3, 3)


def test_the_holdout_streams_the_last_tenth_of_the_offline_users_and_learns_only_from_before():
    trial = problem().holdout()
    assert np.unique(trial.online.user).tolist() == [36, 37, 38, 39]
    assert np.unique(trial.offline.user).tolist() == list(range(36))
    assert trial.offline.time_ms.max() < trial.online.time_ms.min()


def test_the_holdout_leaves_out_late_events_of_early_users():
    offline = Interactions.from_columns(["a", "b", "a"], ["x", "x", "x"], [1, 0, 1], [1, 5, 9])
    trial = problem(offline, ONLINE).holdout()
    assert (trial.offline.time_ms.tolist(), trial.online.time_ms.tolist()) == ([1], [5])


def test_every_baseline_predicts_every_online_event_with_a_probability(predictions):
    assert tuple(predictions) == BASELINES
    for probability in predictions.values():
        assert (probability.shape, probability.dtype) == ((len(ONLINE),), np.float32)
        assert ((probability > 0) & (probability < 1)).all()


def test_the_same_seed_gives_the_same_bits_and_leaves_torchs_state_alone(predictions):
    before = torch.get_rng_state()
    again = run_baselines(OFFLINE, ONLINE, USERS, ITEMS, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    for name in BASELINES:
        np.testing.assert_array_equal(again[name], predictions[name])


def test_labels_from_an_event_on_change_no_prediction_up_to_it(predictions):
    k = FINE_TUNE_BATCH + 10
    flipped = run_baselines(OFFLINE, with_labels(ONLINE, k, len(ONLINE)), USERS, ITEMS, seed=4)
    for name in BASELINES:
        np.testing.assert_array_equal(flipped[name][: k + 1], predictions[name][: k + 1], err_msg=name)


def test_online_baselines_do_learn_from_earlier_labels(predictions):
    flipped = run_baselines(OFFLINE, with_labels(ONLINE, 0, FINE_TUNE_BATCH), USERS, ITEMS, seed=4)
    for name in set(BASELINES) - {"pooled"}:
        assert (flipped[name][FINE_TUNE_BATCH:] != predictions[name][FINE_TUNE_BATCH:]).any(), name


def test_the_pooled_network_is_frozen_whatever_the_stream_says(predictions):
    flipped = run_baselines(OFFLINE, with_labels(ONLINE, 0, len(ONLINE)), USERS, ITEMS, seed=4, names=["pooled"])
    assert list(flipped) == ["pooled"]
    np.testing.assert_array_equal(flipped["pooled"], predictions["pooled"])


def test_users_with_the_same_features_get_the_same_pooled_prediction():
    coded = problem()
    network = train(coded, SMALL, seed=0)
    codes = coded.online.take(np.array([0, 0]))
    two_of_group_a = replace(codes, user=np.array([40, 42]))
    assert USERS.rows["u40"] == USERS.rows["u42"]
    first, second = predict(network, two_of_group_a)
    assert first == second


def test_unseen_items_with_the_same_features_get_the_same_pooled_prediction():
    coded = problem()
    unseen = [k for k, i in enumerate(ONLINE.item) if ONLINE.item_ids[i] in ("i22", "i23")]
    network = train(coded, SMALL, seed=0)
    rows = coded.online.take(np.array(unseen))
    p = predict(network, replace(rows, user=np.zeros(len(unseen), np.int64)))
    assert len(set(rows.item.tolist())) == 2
    assert len(set(p.tolist())) == 1


def test_fine_tuning_predicts_its_first_micro_batch_with_the_network_as_trained_and_leaves_it_so():
    coded = problem()
    network = train(coded, GRID[0], seed=0)
    frozen = predict(network, coded.online)
    tuned = fine_tune(network, coded.online, rate=0.1)
    np.testing.assert_allclose(tuned[:FINE_TUNE_BATCH], frozen[:FINE_TUNE_BATCH], rtol=1e-5)
    assert (tuned[FINE_TUNE_BATCH:] != frozen[FINE_TUNE_BATCH:]).any()
    np.testing.assert_array_equal(predict(network, coded.online), frozen)


def test_the_head_follows_the_filters_equations_event_by_event():
    coded = problem()
    model = factorize(coded, FACTORIZATION_GRID[0], seed=0)
    prior = replace(fitted_prior(model, coded.offline), drift=1e-3)
    interleaved = coded.online.take(np.argsort(event_place(coded.online.user), kind="stable"))
    with torch.no_grad():
        psi, base = (t.double().numpy() for t in model.rows(interleaved.item))
    expected, state = [], {}
    for t, user in enumerate(interleaved.user):
        m, s = state.get(user, (prior.mean, prior.covariance))
        a = s @ psi[t]
        v = a @ psi[t]
        p = 1 / (1 + np.exp(-(base[t] + m @ psi[t]) / np.sqrt(1 + np.pi / 8 * v)))
        w = p * (1 - p)
        gain = 1 / (1 + w * v)
        error = interleaved.label[t] - p
        state[user] = (m + a * error * gain, s - w * gain * np.outer(a, a) + prior.drift * np.eye(len(m)))
        expected.append(p)
    np.testing.assert_allclose(follow(model, prior, interleaved), expected, rtol=1e-4)


def event_place(user):
    return np.array([(user[:k] == u).sum() for k, u in enumerate(user)])


def test_the_prior_is_the_mean_and_covariance_of_the_trained_users_alone():
    coded = problem()
    model = factorize(coded, FACTORIZATION_GRID[0], seed=0)
    trained = model.user.weight.detach().numpy()[:40].astype(np.float64)
    prior = fitted_prior(model, coded.offline)
    np.testing.assert_allclose(prior.mean, trained.mean(0))
    centred = trained - trained.mean(0)
    np.testing.assert_allclose(prior.covariance, centred.T @ centred / 39 + 1e-6 * np.eye(16), rtol=1e-9)


def test_scaling_a_prior_keeps_its_mean():
    prior = Prior(np.ones(2), np.eye(2)).scaled(3.0, 0.1)
    assert (prior.mean.tolist(), prior.covariance.tolist(), prior.drift) == ([1, 1], [[3, 0], [0, 3]], 0.1)


def test_baselines_need_no_features():
    result = run_baselines(OFFLINE, ONLINE, Catalogue(), Catalogue())
    assert all(np.isfinite(p).all() for p in result.values())


def test_baselines_run_with_a_single_offline_user():
    result = run_baselines(events(0, 1, 5, seed=2), ONLINE, USERS, ITEMS)
    assert all(np.isfinite(p).all() for p in result.values())


def test_an_unknown_baseline_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown baseline 'oracle'"):
        run_baselines(OFFLINE, ONLINE, USERS, ITEMS, names=["oracle"])
