"""The gate's decisions: what is refused and why, how often by chance, and what repeated refusal leads to."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from learner.forgetting import LOGIT_BINS, CohortScores, Column, Scores
from learner.gate import (
    ALL,
    FROZEN_PATIENCES,
    Best,
    Directive,
    Ladder,
    Limits,
    bootstrap,
    judge,
    judge_stream,
)

LIMITS = Limits()
NO_COUNTS = np.zeros((2, 2, LOGIT_BINS), np.int64)


def cohort(k, version, loss, users=None):
    loss = np.asarray(loss, np.float64)
    user = np.arange(len(loss)) + 1_000 * k if users is None else np.array(users)
    return CohortScores(
        Column(f"slice {k} / warm", k, "warm"), version, user.astype(np.uint32), np.stack([loss, loss]),
        np.full(len(loss), 20), (0.7, 0.6), NO_COUNTS, 0,
    )  # fmt: skip


def scores(version, *losses):
    return Scores(version, tuple(cohort(k, version, loss) for k, loss in enumerate(losses)))


def noise(seed, users=64, spread=0.01):
    drawn = np.random.default_rng(seed).normal(0, spread, users)
    return drawn - drawn.mean()


OLD = 0.5 + noise(1, spread=0.1)


def test_no_change_passes_with_its_evidence():
    verdict = judge(scores(2, OLD, OLD), scores(1, OLD, OLD), LIMITS, seed=2)
    assert verdict.accepted
    assert (verdict.stage, verdict.outcome) == ("anchors", "pass")
    assert [e.cohort for e in verdict.evidence] == ["slice 0 / warm", "slice 1 / warm", ALL]
    for evidence in verdict.evidence:
        assert (evidence.finding, evidence.limit) == ("passes", 0.003)
        assert (evidence.rise, evidence.lower, evidence.upper) == (0.0, 0.0, 0.0)
    assert [e.users for e in verdict.evidence] == [64, 64, 128]
    assert [e.reference for e in verdict.evidence] == [1, 1, None]


def test_one_cohort_that_rises_rejects_whatever_the_others_gain():
    candidate = scores(2, OLD + 0.02 + noise(2), OLD - 0.1 + noise(3))
    verdict = judge(candidate, scores(1, OLD, OLD), LIMITS, seed=2)
    assert verdict.outcome == "reject"
    rises, falls, everyone = verdict.evidence
    assert (rises.finding, falls.finding, everyone.finding) == ("rises", "passes", "passes")
    assert rises.rise == pytest.approx(0.02, abs=1e-12)
    # the standard error is 0.01/8; bounds at 1.64 (upper, alone) and about 1.9 (lower, three together) of them
    assert rises.upper == pytest.approx(0.02 + 1.64 * 0.01 / 8, abs=3e-4)
    assert rises.lower == pytest.approx(0.02 - 1.9 * 0.01 / 8, abs=4e-4)
    assert everyone.rise == pytest.approx(-0.04, abs=1e-12)
    assert verdict.reason == (
        f"slice 0 / warm rises by 0.0200 nats over version 1 (bounds {rises.lower:.4f} to {rises.upper:.4f}, "
        "64 users; limit 0.003)"
    )


def test_a_sure_rise_below_the_limit_passes_and_above_it_does_not():
    # every user alike: the bounds are the rise itself
    assert judge(scores(2, OLD + 0.0029), scores(1, OLD), LIMITS, seed=0).accepted
    assert not judge(scores(2, OLD + 0.0031), scores(1, OLD), LIMITS, seed=0).accepted


def test_a_rise_that_may_be_chance_passes():
    # 0.004 with a standard error of 0.05/8: the upper bound is beyond the limit, the lower one below zero
    verdict = judge(scores(2, OLD + 0.004 + noise(2, spread=0.05)), scores(1, OLD), LIMITS, seed=0)
    assert verdict.accepted
    assert verdict.evidence[0].upper > 0.003 > 0 > verdict.evidence[0].lower


def test_the_same_arguments_give_the_same_verdict_and_other_seeds_other_draws():
    candidate, reference = scores(2, OLD + noise(2)), scores(1, OLD)
    one = judge(candidate, reference, LIMITS, seed=4)
    assert one == judge(candidate, reference, LIMITS, seed=4)
    assert one.evidence[0].upper != judge(candidate, reference, LIMITS, seed=5).evidence[0].upper


def test_users_are_paired_by_their_hash():
    reference = Scores(1, (cohort(0, 1, [0.1, 0.5, 0.9] * 10, range(30)),))
    candidate = Scores(2, (cohort(0, 2, [0.5, 0.9] + [0.1, 0.5, 0.9] * 9, range(1, 30)),))
    evidence = judge(candidate, reference, LIMITS, seed=0).evidence[0]
    assert evidence.users == 29
    assert evidence.rise == pytest.approx(0.0, abs=1e-15)


def test_a_user_of_several_cohorts_is_drawn_once():
    two = Scores(2, (cohort(0, 2, OLD + noise(2), range(64)), cohort(1, 2, OLD + noise(2), range(64))))
    before = Scores(1, (cohort(0, 1, OLD, range(64)), cohort(1, 1, OLD, range(64))))
    first, second, everyone = judge(two, before, LIMITS, seed=0).evidence
    assert everyone.users == 64
    # the same users in both: together they are no surer than one of them
    assert (first.upper, everyone.upper) == (second.upper, pytest.approx(first.upper, abs=1e-12))


def test_a_small_cohort_does_not_judge_alone_but_counts_among_all():
    candidate, reference = scores(2, OLD[:15] + 0.1, OLD), scores(1, OLD[:15], OLD)
    small, large, everyone = judge(candidate, reference, LIMITS, seed=0).evidence
    assert (small.finding, large.finding, everyone.finding) == ("few users", "passes", "rises")
    assert everyone.rise == pytest.approx(0.1 * 15 / 79, abs=1e-12)
    assert judge(candidate, reference, replace(LIMITS, min_users=15), seed=0).evidence[0].finding == "rises"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_rejects(bad):
    loss = OLD - 0.1
    loss[3] = bad
    verdict = judge(scores(2, OLD, loss), scores(1, OLD, OLD), LIMITS, seed=0)
    assert verdict.outcome == "reject"
    assert verdict.reason == "slice 1 / warm: not finite over version 1 (64 users)"


def test_a_prediction_that_the_kernel_guarded_rejects():
    guarded = replace(cohort(0, 2, OLD - 0.1), not_finite=1)
    verdict = judge(Scores(2, (guarded,)), scores(1, OLD), LIMITS, seed=0)
    assert (verdict.outcome, verdict.evidence[0].finding) == ("reject", "not finite")


def test_a_cohort_that_was_not_scored_rejects():
    verdict = judge(scores(2, OLD), scores(1, OLD, OLD), LIMITS, seed=0)
    assert verdict.outcome == "reject"
    assert verdict.reason == "slice 1 / warm: not scored over version 1 (0 users)"


def test_a_cohort_without_a_reference_does_not_judge():
    verdict = judge(scores(2, OLD, OLD + 9), scores(1, OLD), LIMITS, seed=0)
    assert verdict.accepted
    assert [(e.cohort, e.finding) for e in verdict.evidence] == [
        ("slice 1 / warm", "no reference"), ("slice 0 / warm", "passes"), (ALL, "passes"),
    ]  # fmt: skip


@pytest.mark.parametrize("reference", [Scores(1, ()), scores(1, [])])
def test_nothing_serves_unmeasured(reference):
    verdict = judge(scores(2, *([OLD] if not reference.cohorts else [[]])), reference, LIMITS, seed=0)
    assert verdict.outcome == "reject"
    assert verdict.reason.startswith("no cohort to judge by")


def test_a_verdict_is_ready_for_json():
    verdict = judge(scores(2, OLD + 0.02, OLD * np.nan), scores(1, OLD, OLD), LIMITS, seed=0)
    found = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
    assert found["outcome"] == "reject"
    assert found["evidence"][0]["finding"] == "not finite"
    assert found["evidence"][0]["rise"] is None
    assert found["evidence"][1]["rise"] == pytest.approx(0.02)
    assert set(found["evidence"][1]) == {"cohort", "finding", "users", "limit", "rise", "lower", "upper", "reference"}


@pytest.mark.parametrize(
    "change", [{"limit": 0.0}, {"confidence": 0.5}, {"confidence": 1.0}, {"bootstrap_samples": 99}, {"min_users": 1}]
)
def test_limits_that_judge_nothing_are_refused(change):
    with pytest.raises(ValueError, match=r"meta\.gate"):
        replace(LIMITS, **change)


def test_bounds_are_those_of_a_normal_mean():
    many = replace(LIMITS, bootstrap_samples=20_000)
    d = noise(5, 400, 0.02)[:, None]
    found = bootstrap(d, np.ones_like(d), many, seed=1)
    error = d.std(ddof=1) / 20
    assert found.rise[0] == pytest.approx(0.0, abs=1e-12)
    assert found.upper[0] == pytest.approx(1.645 * error, rel=0.03)
    assert found.lowest[0] == pytest.approx(-1.645 * error, rel=0.03)
    assert found.highest[0] == pytest.approx(1.645 * error, rel=0.03)


def test_joint_bounds_widen_with_the_cohorts():
    many = replace(LIMITS, bootstrap_samples=4_000)
    rng = np.random.default_rng(6)
    total, weight = np.zeros((640, 10)), np.zeros((640, 10))
    for k in range(10):  # ten cohorts of other users each
        total[64 * k : 64 * k + 64, k], weight[64 * k : 64 * k + 64, k] = rng.normal(0, 0.01, 64), 1
    found = bootstrap(total, weight, many, seed=1)
    error = np.array([total[weight[:, k] > 0, k].std(ddof=1) for k in range(10)]) / 8
    # the 95 % quantile of the largest of ten normals is 2.57, of one 1.64
    np.testing.assert_allclose((found.rise - found.lowest) / error, 2.57, rtol=0.08)
    np.testing.assert_allclose((found.upper - found.rise) / error, 1.645, rtol=0.08)
    alone = bootstrap(total, weight, many, seed=1, family=np.arange(10) == 3)
    assert (alone.rise - alone.lowest)[3] / error[3] == pytest.approx(1.645, rel=0.08)


def test_the_bootstrap_in_pieces_has_all_its_samples(monkeypatch):
    d = noise(5, 64, 0.02)[:, None]
    monkeypatch.setattr("learner.gate._DRAWN_AT_ONCE", 64 * 33)
    found = bootstrap(d, np.ones_like(d), LIMITS, seed=1)
    assert found.upper[0] == pytest.approx(1.645 * d.std(ddof=1) / 8, rel=0.15)


def test_the_best_is_replaced_only_by_what_is_significantly_better():
    best = Best().promoted(scores(1, OLD, OLD), LIMITS, seed=1)
    assert [c.version for c in best.reference.cohorts] == [1, 1]
    # 0.001 better with a standard error of 0.01/8 is no more than luck; 0.01 better is not luck
    best = best.promoted(scores(2, OLD - 0.001 + noise(2), OLD - 0.01 + noise(3)), LIMITS, seed=2)
    assert [c.version for c in best.reference.cohorts] == [1, 2]
    best = best.promoted(scores(3, OLD + 0.001, OLD + 0.001, OLD), LIMITS, seed=3)
    assert [c.version for c in best.reference.cohorts] == [1, 2, 3]
    assert best.reference["slice 1 / warm"].loss[0] == pytest.approx(OLD - 0.01 + noise(3))


def test_what_is_not_finite_is_never_the_best():
    best = Best().promoted(scores(1, OLD), LIMITS, seed=1)
    best = best.promoted(scores(2, OLD * np.nan, OLD * np.nan), LIMITS, seed=2)
    assert [(c.name, c.version) for c in best.reference.cohorts] == [("slice 0 / warm", 1)]


def test_small_steps_do_not_add_up_unseen():
    """Each step is far below the limit; what counts is the way from the best."""
    best, version = Best().promoted(scores(0, OLD), LIMITS, seed=0), 0
    for version in range(1, 20):
        candidate = scores(version, OLD + 0.0004 * version)
        if not judge(candidate, best.reference, LIMITS, seed=version).accepted:
            break
        best = best.promoted(candidate, LIMITS, seed=version)
    assert version == 8  # 0.0032; 0.0028 is still allowed


def test_best_leaves_retired_cohorts_and_comes_back_from_arrays():
    best = Best().promoted(scores(1, OLD, OLD + 1), LIMITS, seed=1).kept(["slice 1 / warm"])
    found = Best.from_arrays(best.as_arrays()).reference
    assert [c.name for c in found.cohorts] == ["slice 1 / warm"]
    np.testing.assert_array_equal(found.cohorts[0].loss[0], OLD + 1)


def rounds(rng, cohorts, users, drift, count, spread=0.02, step=0.01):
    """Share of refused rounds, and the true rise of cohort 0 at the end; losses move by chance and by ``drift``."""
    stay = math.sqrt(1 - 2 * (step / spread) ** 2)
    base, moved, rise = rng.normal(0.55, 0.15, (cohorts, users)), np.zeros((cohorts, users)), np.zeros(cohorts)
    best, refused = Best().promoted(scores(0, *base), LIMITS, seed=0), 0
    for version in range(1, count + 1):
        next_moved, next_rise = stay * moved + rng.normal(0, step, moved.shape), rise + drift
        candidate = scores(version, *(base + next_moved + next_rise[:, None]))
        if judge(candidate, best.reference, LIMITS, seed=version).accepted:
            moved, rise = next_moved, next_rise
            best = best.promoted(candidate, LIMITS, seed=version)
        else:
            refused += 1
    return refused / count, float(rise[0])


def test_one_in_twenty_candidates_that_are_as_good_is_refused_by_chance():
    """Six cohorts of 64 users; the upper bound alone would refuse nearly all of them."""
    rng, quick = np.random.default_rng(9), replace(LIMITS, bootstrap_samples=200)
    base = rng.normal(0.55, 0.15, (6, 64))
    verdicts = [
        judge(scores(2, *(base + rng.normal(0, 0.02, base.shape))), scores(1, *base), quick, seed=trial)
        for trial in range(200)
    ]
    assert np.mean([verdict.outcome == "reject" for verdict in verdicts]) == pytest.approx(0.05, abs=0.03)
    assert np.mean([any(e.upper > 0.003 for e in verdict.evidence) for verdict in verdicts]) > 0.9


def test_few_candidates_are_refused_over_many_rounds():
    """Against the best of all before, which luck helps: the module's table says 7 % and 4 % with 12 cohorts."""
    rng = np.random.default_rng(8)
    assert np.mean([rounds(rng, 6, 64, np.zeros(6), 30)[0] for _ in range(6)]) < 0.15
    assert np.mean([rounds(rng, 6, 64, np.full(6, -0.001), 30)[0] for _ in range(6)]) < 0.05


def test_a_cohort_that_creeps_up_alone_is_stopped():
    """It would rise by 0.03; its bound is 4.2 standard errors of 0.02/16, or 0.005."""
    drift = np.zeros(4)
    drift[0] = 0.001
    ends = [rounds(np.random.default_rng(seed), 4, 256, drift, 30)[1] for seed in range(3)]
    assert np.mean(ends) < 0.0075
    assert min(ends) > 0.0015


def test_live_events_are_judged_per_event_and_by_user():
    events = np.tile([1, 9], 32)
    rise = 0.02 * events + noise(2)
    verdict = judge_stream(rise, events, LIMITS, seed=0)
    assert (verdict.stage, verdict.outcome) == ("shadow", "reject")
    assert verdict.evidence[0].rise == pytest.approx(0.02, abs=1e-12)
    assert verdict.evidence[0].users == 64
    assert verdict.reason.startswith("stream rises by 0.0200 nats (bounds 0.0")
    better = judge_stream(-rise, events, LIMITS, seed=0, stage="canary")
    assert (better.stage, better.outcome, better.accepted) == ("canary", "pass", True)


def test_a_stream_with_few_users_waits():
    verdict = judge_stream(np.full(15, 0.5), np.ones(15, np.int64), LIMITS, seed=0)
    assert (verdict.outcome, verdict.accepted) == ("wait", False)
    assert verdict.reason == "15 users so far, 16 are needed to judge"
    assert judge_stream(np.full(16, 0.5), np.ones(16, np.int64), LIMITS, seed=0).outcome == "reject"


def test_a_stream_with_a_loss_that_is_not_finite_rejects_at_once():
    verdict = judge_stream(np.array([0.0, np.nan]), np.ones(2, np.int64), LIMITS, seed=0)
    assert (verdict.outcome, verdict.evidence[0].finding) == ("reject", "not finite")


def test_the_ladder_goes_up_by_rejections_in_a_row():
    ladder, seen = Ladder(patience=2), []
    for _ in range(8):
        ladder = ladder.after(False)
        seen.append(ladder.rung)
    assert seen == [0, 1, 1, 2, 2, 3, 3, 4]


def test_each_rung_adds_to_the_one_below():
    assert [Ladder(rung=k).directive for k in range(5)] == [
        Directive(1.0, 1.0, 0.0, False),
        Directive(0.3, 1.0, 0.0, False),
        Directive(0.3, 0.3, 0.0, False),
        Directive(0.3, 0.3, 1.0, False),
        Directive(0.3, 0.3, 1.0, True),
    ]


def test_a_promotion_ends_a_row_of_rejections():
    ladder = Ladder(patience=2)
    for promoted in (False, True, False, True, False):
        ladder = ladder.after(promoted)
    assert ladder.rung == 0
    assert ladder.after(False).rung == 1


def test_the_ladder_goes_down_by_twice_as_many_promotions_in_a_row():
    ladder, seen = Ladder(patience=2, rung=2), []
    for _ in range(9):
        ladder = ladder.after(True)
        seen.append(ladder.rung)
    assert seen == [2, 2, 2, 1, 1, 1, 1, 0, 0]
    interrupted = Ladder(patience=2, rung=2)
    for promoted in (True, True, True, False, True, True, True):
        interrupted = interrupted.after(promoted)
    assert interrupted.rung == 2


@pytest.mark.parametrize("promoted", [True, False])
def test_a_frozen_ladder_stays_so_whatever_becomes_of_candidates_from_before(promoted):
    frozen = Ladder(patience=1, rung=4, left_out=2)
    assert frozen.after(promoted) == frozen


def test_a_frozen_ladder_thaws_on_demand():
    assert Ladder(patience=3, rung=4, left_out=2).thaw() == Ladder(patience=3, rung=3)
    assert Ladder(rung=1, rejections=2).thaw() == Ladder(rung=1, rejections=2)


def test_a_frozen_ladder_tries_again_after_eight_patiences():
    ladder = Ladder(patience=3, rung=4)
    for _ in range(FROZEN_PATIENCES * 3 - 1):
        ladder = ladder.round_left_out()
        assert ladder.directive.frozen
    assert ladder.round_left_out() == Ladder(patience=3, rung=3)
    assert Ladder(rung=2, promotions=1).round_left_out() == Ladder(rung=2, promotions=1)


def test_json_brings_a_ladder_back():
    ladder = Ladder(patience=3, rung=4, left_out=5)
    assert Ladder.from_dict(json.loads(json.dumps(ladder.as_dict()))) == ladder


@pytest.mark.parametrize(
    "found", [{}, {"patience": 3}, {**Ladder().as_dict(), "rung": 1.0}, {**Ladder().as_dict(), "rung": 5},
              {**Ladder().as_dict(), "more": 1}, {**Ladder().as_dict(), "patience": 0},
              {**Ladder().as_dict(), "promotions": -1}]
)  # fmt: skip
def test_a_ladder_of_something_else_is_refused(found):
    with pytest.raises(ValueError, match=r"[lL]adder"):
        Ladder.from_dict(found)
