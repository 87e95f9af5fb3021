"""The online stage's benchmarks measure what they say, on streams of a moment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import structlog

from benchmarks import online_cost, online_guard, online_lift, online_meta, online_rebase, online_shift
from benchmarks.command import Options
from benchmarks.online_events import (
    arrivals_by_rate,
    batches_of,
    catalogues,
    events_of,
    flipped,
    histories_of,
    of_new_users,
    of_users,
    with_other_items,
    write_movielens,
)
from benchmarks.online_run import Goal, World, figures, frozen, lift, stream, train, unalarmed, varied
from configs.settings import Settings
from learner.baselines import build_problem, pooled
from learner.interactions import Interactions
from learner.user_state import item_hash, ring_item
from streams.generation.events import EventStream
from streams.generation.settings import GeneratorSettings
from streams.sources import open_source

SMALL = {
    "learner.dim": 4, "learner.item_dim": 4, "learner.second_filter": False, "training.epochs": 1,
    "meta.moves": "everything", "meta.every_events": 500, "meta.users": 16, "meta.anchors.slice_events": 1000,
    "meta.anchors.held_out": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def settings():
    return varied(Settings(), SMALL)


@pytest.fixture(scope="module")
def world():
    generated = EventStream(GeneratorSettings(users=120, items=30, events=4000, lifetime=0.5))
    past = events_of(generated, 0, 1000)
    return World(past, batches_of(of_new_users(events_of(generated, 1000), past)), *catalogues(generated))


@pytest.fixture(scope="module")
def trained(world, settings):
    return train(world, settings)


def named(chosen):
    return lambda ids: np.array([i in chosen for i in ids], bool)


def columns(events):
    users, items = np.array(events.user_ids)[events.user], np.array(events.item_ids)[events.item]
    return list(zip(users.tolist(), items.tolist(), events.label.tolist(), events.event_time_ms.tolist(), strict=True))


# --- events -------------------------------------------------------------------------------------------------------


def test_users_arrive_in_order_of_their_likes_and_keep_their_own_pace():
    events = Interactions.from_columns(
        ["a", "b", "a", "c", "c", "b"], list("uvwxyz"), [0, 1, 0, 1, 0, 1],
        [1_000_000, 1_010_000, 1_003_000, 1_020_000, 1_027_000, 1_011_000],
    )  # fmt: skip
    assert arrivals_by_rate(events).tolist() == [1020, 1000, 1023, 1010, 1017, 1001]  # b likes all, c half, a nothing


def test_ratings_at_other_times_are_read_back_as_movielens(tmp_path):
    published, written = tmp_path / "published", tmp_path / "written"
    published.mkdir()
    written.mkdir()
    (published / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n", encoding="latin-1")
    (published / "movies.dat").write_text("7::Toy Story (1995)::Comedy\n", encoding="latin-1")
    events = Interactions.from_columns(["1", "2"], ["7", "7"], [1, 0], [5000, 6000], values=[5, 3])
    write_movielens(written, published, events, np.array([90, 80]))
    back = Interactions.concatenate(open_source(varied(Settings(), {"data.paths": (written,)}).data).batches())
    assert columns(back) == [("1", "7", 1, 90_000), ("2", "7", 0, 80_000)]
    assert (written / "users.dat").read_text(encoding="latin-1").startswith("1::F")


def test_only_the_chosen_users_labels_are_flipped(world):
    (batch,) = world.batches
    chosen = batch.user_ids[:3]
    (other,) = flipped([batch], named(chosen))
    of = np.isin(np.array(batch.user_ids)[batch.user], chosen)
    np.testing.assert_array_equal(other.label[of], 1 - batch.label[of])
    np.testing.assert_array_equal(other.label[~of], batch.label[~of])
    assert (of.any(), other.label.dtype) == (True, np.int8)


def test_other_items_change_what_is_liked_and_nothing_else():
    before = EventStream(GeneratorSettings(users=60, items=20, events=500, lifetime=0.5))
    (one,), (two,) = before.batches(), with_other_items(before, seed=1).batches()
    for name in ("user", "item", "event_time_ms"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert abs(np.corrcoef(one.probability, two.probability)[0, 1]) < 0.5
    (again,) = with_other_items(before, seed=1).batches()
    np.testing.assert_array_equal(two.label, again.label)


def test_histories_are_each_users_events_in_their_order(world, trained):
    (batch,) = world.batches
    histories = histories_of(batch, trained.serving())
    assert (len(histories), histories.events) == (len(batch.user_ids), len(batch))
    user = 5
    mine = np.flatnonzero(batch.user == user)
    of = slice(int(histories.starts[user]), int(histories.starts[user + 1]))
    np.testing.assert_array_equal(histories.label[of], batch.label[mine])
    hashes = [ring_item(item_hash(batch.item_ids[item])) for item in batch.item[mine].tolist()]
    assert histories.item[of].tolist() == hashes


# --- runs ---------------------------------------------------------------------------------------------------------


def test_the_stream_of_new_users_knows_nobody_of_the_past(world):
    assert not set(world.past.user_ids) & {user for batch in world.batches for user in batch.user_ids}


def test_judges_are_predicted_as_the_stream_predicts_them(world, trained, settings):
    beside = frozen(trained, settings)
    judges = online_guard.Judges.of(beside.events)
    order = np.argsort(beside.events.user, kind="stable")
    np.testing.assert_allclose(
        judges.predicted(trained.serving(), settings.state.ring), beside.probability[order], rtol=1e-6
    )


def test_the_online_stage_makes_versions_and_frozen_makes_none(trained, settings):
    said, beside = stream(trained, settings), frozen(trained, settings)
    assert beside.meta is None
    assert beside.model.meta_version == 0
    assert (said.meta.rounds, said.model.meta_version > 0) == (len(said.events) // 500, True)
    assert lift(beside, said).auc_difference == pytest.approx(said.auc() - beside.auc())


def test_only_scored_users_count(trained, settings):
    some = frozenset(trained.world.batches[0].user_ids[:40])
    run = frozen(replace(trained, world=replace(trained.world, scored=some)), settings)
    assert {run.events.user_ids[user] for user in run.events.user[run.scored].tolist()} == some
    assert run.auc() != run.auc(np.ones(len(run.events), bool))


def test_alarms_are_silent_for_a_while_only(capsys):
    before = structlog.get_config()
    with unalarmed():
        structlog.get_logger("coldstream").error("nobody hears this")
    assert structlog.get_config() == before
    assert capsys.readouterr() == ("", "")


def test_settings_are_varied_by_their_names_in_the_file(settings):
    changed = varied(settings, {"meta.gate.enabled": False, "training.seed": 5})
    assert (changed.meta.gate.enabled, changed.training.seed, changed.meta.users) == (False, 5, 16)
    assert settings.meta.gate.enabled


def test_a_figure_has_a_value_of_every_run_and_its_goal_at_full_scale_only():
    runs = [{("loss", "nats"): 0.1, ("AUC", ""): 0.7}, {("loss", "nats"): 0.3, ("AUC", ""): 0.8}]
    loss, auc = figures("case", runs, {("loss", "nats"): Goal(0.2, at_most=True)}, Options())
    assert (loss.runs, loss.unit, loss.target, loss.at_most, loss.met) == ((0.1, 0.3), "nats", 0.2, True, True)
    assert (auc.runs, auc.target) == ((0.7, 0.8), None)
    loss, _ = figures("case", runs, {("loss", "nats"): Goal(0.2, at_most=True)}, Options(scale=0.5))
    assert loss.target is None


# --- parts --------------------------------------------------------------------------------------------------------


def test_a_lift_is_in_points_with_its_interval(trained, settings):
    beside, said = frozen(trained, settings), stream(trained, settings)
    found = online_lift.of_run(beside, said)
    assert found[online_lift.LIFT] == pytest.approx(100 * (said.auc() - beside.auc()))
    assert found[("  lower 97.5 %", "points")] < found[online_lift.LIFT] < found[("  upper 97.5 %", "points")]
    assert found[("promoted", "versions")] == said.meta.decided("promoted")


def test_rebasing_by_history_is_the_standard(world, settings):
    found = online_rebase.measured(settings, world)
    assert found[("  rows moved", "")] > 0
    assert found[("ring: AUC lost", "points")] != 0
    assert found[("closed: AUC lost", "points")] != 0


@pytest.mark.parametrize("case", online_shift.SHIFTS)
def test_a_shift_streams_half_of_the_new_users_up_to_the_windows_end(case):
    options = Options(scale=0.01)
    shifting = online_shift.shifting(online_shift.SHIFTS[case], options, seed=0)
    streamed = Interactions.concatenate(shifting.world.batches)
    assert not set(streamed.user_ids) & set(shifting.world.past.user_ids)
    assert not set(streamed.user_ids) & set(shifting.others.user_ids)
    after = shifting.after
    assert len(after) == shifting.window == 500
    assert columns(after) == columns(streamed)[-500:]
    assert after.event_time_ms[0] >= shifting.others.event_time_ms[0] - 10_000_000 > streamed.event_time_ms[0]


def test_what_is_recovered_is_a_share_of_what_retraining_brings(settings):
    shifting = online_shift.shifting(online_shift.items, Options(scale=0.01), seed=0)
    found = online_shift.measured(shifting, settings)
    gained = found[("AUC, online stage", "")] - found[("AUC, frozen", "")]
    possible = found[("AUC, retrained", "")] - found[("AUC, frozen", "")]
    assert found[online_shift.RECOVERED] == pytest.approx(gained / possible)


def test_the_gates_benchmark_measures_judges_whom_nobody_streams(world, settings):
    held_out = online_guard.held_out_by(settings)
    old = of_users(world.past, lambda ids: online_guard.witnesses(ids) | held_out(ids))
    judges, others = online_guard.Judges.of(old), online_guard.without_witnesses(world)
    witnesses = {user for user in world.past.user_ids if online_guard.witnesses([user])[0]}
    assert witnesses
    assert not witnesses & set(others.past.user_ids)
    assert {judges.events.user_ids[u] for u in judges.events.user[judges.unseen].tolist()} == witnesses
    found = online_guard.guarded(settings, others, judges)
    assert found["the gate off"][("rejected", "versions")] == 0
    assert found["the gate off"][online_guard.RISE] != 0
    tuned = online_guard.fine_tuned(others, held_out, judges, seed=0)
    assert tuned[online_guard.RISE] != 0


def test_judges_who_are_predicted_alike_lose_nothing(world):
    judges = online_guard.Judges.of(world.past)
    half = np.linspace(0.1, 0.9, len(world.past)).astype(np.float32)
    found = judges.measured(half, half)
    assert (found[online_guard.RISE], found[online_guard.FALL]) == (0.0, 0.0)
    worse = judges.measured(judges.events.label * 0.5 + 0.25, judges.events.label * 0.25 + 0.375)
    assert worse[online_guard.RISE] == pytest.approx(np.log(0.75 / 0.625))


def test_a_tuned_network_is_the_one_that_fine_tuning_predicts_with(world):
    problem = build_problem(world.past, world.batches[0], world.users, world.items)
    network = pooled.train(problem, online_guard.POOLED, seed=0)
    last = len(problem.online) // pooled.FINE_TUNE_BATCH * pooled.FINE_TUNE_BATCH
    live = online_guard.tuned(network, problem.online.take(slice(last)), rate=0.3)
    predicted = pooled.predict(live, problem.online.take(slice(last, None)))
    np.testing.assert_allclose(predicted, pooled.fine_tune(network, problem.online, 0.3)[last:], rtol=1e-5)


def test_poison_draws_a_tenth_and_a_quarter_of_the_users():
    ids = [str(n) for n in range(6040)]
    shares = [chosen(ids).mean() for chosen in online_guard.POISONS.values()]
    assert shares == pytest.approx([0.1, 0.25], abs=0.01)


def test_the_cost_is_measured_without_changing_what_is_measured():
    before = [getattr(owner, name) for owner, name in online_cost.STAGES]
    found = {figure.name: figure for figure in online_cost.run(Options(scale=2e-3))}
    assert [getattr(owner, name) for owner, name in online_cost.STAGES] == before
    assert found["rounds"].value > 0
    assert found["speed, on against off"].target is None
    assert found["  histories, after it"].value > 0


def test_what_needs_movielens_is_skipped_and_says_so():
    said = []
    assert list(online_meta.run(Options(case="ml-1m", progress=said.append))) == []
    assert list(online_meta.run(Options(case="lift", progress=said.append))) == []
    assert list(online_meta.run(Options(case="drift", progress=said.append))) == []
    assert sum(text.startswith("skipped, needs ml-1m") for text in said) == 2
    assert any(text.startswith("rebase, ml-1m: skipped") for text in said)
