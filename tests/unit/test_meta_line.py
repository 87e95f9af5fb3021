"""What becomes of versions: stage by stage, taken back to the bit, more and more careful, and told."""

from __future__ import annotations

import numpy as np
import pytest

from learner.forgetting import Scores
from learner.gate import DISTILLATION, FROZEN_PATIENCES, RATE_SCALE, RECENT_SCALE
from state.lineage import Lineage, Span
from streams.alarms import Kind
from streams.meta.chronicle import Chronicle
from streams.meta.contributor import Findings, Rises
from streams.meta.line import EARLIER, MAX_OPEN, MetaLine
from tests.online import Heard, gradient_of, meta_model, meta_settings, scores_of, trained

FINE, BAD = 0.5, 0.6
"""Log-loss of a cohort: what version 0 has, and what no gate lets through"""
SPAN = Span(0, 0, 99)


class Line:
    """A line with hand-made gradients and findings; ``chronicle`` and ``heard`` beside it."""

    def __init__(self, *, cohorts: int = 2, lineage=None, **settings) -> None:
        self.settings = meta_settings(**settings)
        self.model, self.heard = meta_model(), Heard()
        self.chronicle = Chronicle(lineage, self.settings.keep_versions, lambda: 1_000)
        self.initial = trained().serving()
        self.line = MetaLine(self.model, self.initial, self.settings, self.chronicle, seed=3, alarm=self.heard)
        self.cohorts = cohorts
        self.line.measured(self.scores(0), self.scores(0))

    def scores(self, version, loss=FINE):
        return scores_of(version, *[loss] * self.cohorts)

    def step(self, value=1.0, **changed):
        gradient = gradient_of(self.model, self.line.head, value, moves=self.settings.moves, **changed)
        self.line.step([gradient], [SPAN], 100 * (self.line.round + 1))

    def finding(self, version, loss=FINE, rise=0.0):
        stage = {model.meta_version: stage for stage, model in self.line.open_versions}[version]
        stream = Rises(np.full(10, rise), np.full(10, 4))
        return Findings(version, self.scores(version, loss) if stage == "shadow" else None, stream)

    def judge(self, *, bad=(), left_out=()):
        self.line.judge([
            self.finding(m.meta_version, BAD if m.meta_version in bad else FINE)
            for _, m in self.line.open_versions
            if m.meta_version not in left_out
        ])  # fmt: skip

    def stages(self):
        return [version.stage for version in self.chronicle.versions]

    def path(self, number):
        return [decision.kind for decision in self.chronicle.versions[number].decisions]


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def served_by(line):
    """Versions of (everybody, the canary, its share)."""
    serving = line.line.serving
    return serving.model.meta_version, serving.canary and serving.canary.meta_version, serving.canary_share


# --- stage by stage


def test_a_version_goes_from_shadow_by_canary_to_everybody():
    line = Line()
    assert served_by(line) == (0, None, 0.0)
    line.step()
    assert [(stage, m.meta_version) for stage, m in line.line.open_versions] == [("shadow", 1)]
    assert served_by(line) == (0, None, 0.0)
    line.judge()
    assert served_by(line) == (0, 1, 0.1)
    line.judge()
    assert served_by(line) == (1, None, 0.0)
    assert line.path(1) == ["candidate", "shadow", "canary", "promoted"]
    assert line.line.serving.earlier == (line.initial,)
    assert line.line.open_versions == ()
    assert line.line.matrix.versions == (0, 1)
    assert line.heard.alarms == []


def test_training_does_not_wait_for_the_gate():
    line = Line()
    for expected in (("shadow",), ("canary", "shadow"), ("canary", "shadow"), ("canary", "shadow")):
        line.judge()
        line.step()
        assert tuple(stage for stage, _ in line.line.open_versions) == expected
    assert line.stages() == ["initial", "promoted", "promoted", "canary", "shadow"]
    assert [v.record.parent for v in line.chronicle.versions] == [None, 0, 1, 2, 3]
    assert [v.record.round for v in line.chronicle.versions] == [0, 1, 2, 3, 4]
    assert served_by(line) == (2, 3, 0.1)


def test_the_version_serves_the_parameters_that_the_step_made():
    line = Line(gate={"enabled": False})
    line.step()
    fixed = line.model.parts()[0]
    np.testing.assert_array_equal(line.line.current.fixed.item_embedding, fixed.item_embedding)
    assert not np.array_equal(fixed.item_embedding, line.initial.fixed.item_embedding)
    assert line.line.current.fingerprint == line.initial.fingerprint


def test_without_a_canarys_share_a_shadow_serves_everybody_next():
    line = Line(gate={"canary_share": 0.0})
    line.step()
    line.judge()
    assert line.path(1) == ["candidate", "shadow", "promoted"]
    assert served_by(line) == (1, None, 0.0)


def test_with_the_gate_off_a_candidate_serves_at_once_whatever_it_does():
    line = Line(gate={"enabled": False})
    line.step()
    line.step(-1e3)
    assert line.path(2) == ["candidate", "promoted"]
    assert [d.reason for d in line.chronicle.versions[2].decisions][-1] == "the gate is off"
    assert served_by(line) == (2, None, 0.0)


def test_the_anchors_judge_a_shadow_and_the_stream_a_canary():
    line = Line()
    line.step()
    line.line.judge([line.finding(1, rise=0.0)])
    shadow = line.chronicle.versions[1].decisions[-1].evidence["verdicts"]
    assert [v["stage"] for v in shadow] == ["anchors", "shadow"]
    line.line.judge([line.finding(1, rise=1.0)])
    assert line.path(1) == ["candidate", "shadow", "canary", "rejected"]
    assert [v["stage"] for v in line.chronicle.versions[1].decisions[-1].evidence["verdicts"]] == ["canary"]


@pytest.mark.parametrize("shadow", [True, False])
def test_the_stream_judges_a_shadow_where_it_is_asked_to(shadow):
    line = Line(gate={"shadow": shadow})
    line.step()
    line.line.judge([line.finding(1, rise=1.0)])
    assert line.path(1)[-1] == ("rejected" if shadow else "canary")


def test_without_anchors_the_stream_alone_judges():
    line = Line(cohorts=0, gate={"shadow": False})
    line.step()
    line.line.judge([Findings(1, Scores(1, ()), Rises(np.zeros(10), np.full(10, 4)))])
    assert [v["stage"] for v in line.chronicle.versions[1].decisions[-1].evidence["verdicts"]] == ["shadow"]
    assert line.path(1)[-1] == "canary"
    line.step()
    line.line.judge([Findings(2, Scores(2, ()), Rises(np.ones(10), np.full(10, 4)))])
    assert line.path(2)[-1] == "rejected"


def test_a_span_of_too_few_users_lets_pass_what_anchors_let_pass():
    line = Line(gate={"min_stream_users": 11})
    line.step()
    line.line.judge([line.finding(1, rise=1.0)])  # 10 users
    assert line.path(1)[-1] == "canary"
    verdicts = line.chronicle.versions[1].decisions[-1].evidence["verdicts"]
    assert [v["outcome"] for v in verdicts] == ["pass", "wait"]


def test_a_version_that_nobody_says_anything_of_stays_where_it_is():
    line = Line()
    line.step()
    line.line.judge([])
    assert line.path(1) == ["candidate", "shadow"]


def test_while_one_is_a_canary_the_next_waits_as_a_shadow():
    line = Line()
    line.step()
    line.judge()
    line.step()
    line.judge(left_out=[1])
    assert (line.path(1)[-1], line.path(2)[-1]) == ("canary", "shadow")
    assert served_by(line) == (0, 1, 0.1)
    line.judge()
    assert (line.path(1)[-1], line.path(2)[-1]) == ("promoted", "canary")
    assert served_by(line) == (1, 2, 0.1)


def test_a_round_makes_no_version_while_as_many_are_open_as_may_be():
    line = Line()
    for _ in range(MAX_OPEN):
        assert line.line.task() is not None
        line.step()
    assert line.line.task() is None
    line.judge(left_out=[2, 3])  # the first becomes a canary, and is still open
    assert line.line.task() is None
    line.judge(left_out=[2, 3])
    assert line.line.task() is not None


def test_some_versions_that_served_are_kept_for_rows_that_exchange_priors():
    line = Line(gate={"enabled": False})
    for _ in range(EARLIER + 2):
        line.step()
    assert [m.meta_version for m in line.line.serving.earlier] == list(range(2, EARLIER + 2))


# --- taken back


def test_a_rejected_version_leaves_no_trace_in_the_parameters():
    line = Line()
    line.step()
    line.judge()
    line.judge()  # version 1 serves: its moments and counts are not zero
    before = line.model.tensors()
    line.step(-2.0, items=("i1", "i2", "i3"), seen={"i7": 4})
    assert not np.array_equal(line.model.tensors()["parameters.item_embedding"], before["parameters.item_embedding"])
    line.judge(bad=[2])
    assert line.path(2) == ["candidate", "shadow", "rejected"]
    same(line.model.tensors(), before)
    assert served_by(line) == (1, None, 0.0)
    assert line.line.head == 1
    ((kind, message, evidence),) = line.heard.alarms
    assert kind == Kind.REJECTED
    assert message.startswith("version 2 was rejected: slice 0 / warm rises by 0.1000 nats over version 0")
    assert evidence["verdicts"][0]["outcome"] == "reject"


def test_what_was_built_on_a_rejected_version_goes_with_it():
    line = Line()
    before = line.model.tensors()
    line.step()
    line.judge()
    line.step(0.5)
    line.line.judge([line.finding(1, rise=1.0), line.finding(2)])  # the canary does harm on the stream
    assert line.stages() == ["initial", "rejected", "rejected"]
    assert line.chronicle.versions[2].decisions[-1].reason == "built on version 1"
    same(line.model.tensors(), before)
    assert served_by(line) == (0, None, 0.0)
    assert line.heard.kinds == [Kind.REJECTED]
    assert line.line.ladder.rejections == 1  # one decision, not two


def test_a_canary_goes_on_when_only_its_child_is_rejected():
    line = Line()
    line.step()
    line.judge()
    parameters = line.model.tensors()
    line.step(0.5)
    line.judge(bad=[2], left_out=[1])
    assert (line.path(1)[-1], line.path(2)[-1]) == ("canary", "rejected")
    same(line.model.tensors(), parameters)
    assert line.line.head == 1
    line.judge()
    assert served_by(line) == (1, None, 0.0)


def test_items_that_a_rejected_version_brought_stay_as_new_ones():
    line = Line()
    line.step(items=("i0", "new"), new_items={"new": None}, seen={"new": 3})
    line.judge(bad=[1])
    assert line.model.item_ids[-1] == "new"
    assert not line.model.tensors()["parameters.item_embedding"][-1].any()
    assert line.model.item_events[-1] == 0
    line.step(items=("i0", "new"))  # and may be learned again
    assert line.stages() == ["initial", "rejected", "shadow"]


def test_numbers_have_no_gaps_whatever_becomes_of_versions(tmp_path):
    line = Line(lineage=Lineage(tmp_path / "lineage", now_ms=lambda: 1_000))
    for bad in ((), (1,), (), (), (3,), ()):
        line.judge(bad=bad)
        line.step()
    numbers = [v.number for v in line.chronicle.versions]
    assert numbers == list(range(7))
    kept = Lineage(tmp_path / "lineage").records()
    assert [(v.number, v.record.parent, v.stage) for v in kept] == [
        (v.number, v.record.parent, v.stage) for v in line.chronicle.versions
    ]
    assert all(v.record.parent < v.number for v in kept[1:])


def test_a_step_that_makes_a_parameter_infinite_is_rejected_as_it_is_made():
    line = Line(rate=1e40)
    before = line.model.tensors()
    line.step()
    assert line.path(1) == ["rejected"]
    assert line.line.open_versions == ()
    same(line.model.tensors(), before)
    assert line.heard.kinds == [Kind.NOT_FINITE]
    assert line.line.ladder.rejections == 1


# --- the ladder


def test_rejections_in_a_row_climb_the_ladder_until_it_freezes_and_it_thaws_by_itself():
    line = Line(gate={"patience": 1}, recent_share=0.5)
    expected = [(1.0, 0.5, 0.0), (RATE_SCALE, 0.5, 0.0), (RATE_SCALE, 0.5 * RECENT_SCALE, 0.0),
                (RATE_SCALE, 0.5 * RECENT_SCALE, DISTILLATION)]  # fmt: skip
    for number, (rate, recent, distillation) in enumerate(expected, 1):
        task = line.line.task()
        assert (task.version, task.recent_share, task.distillation) == (0, pytest.approx(recent), distillation)
        line.step()
        told = line.chronicle.versions[number].record
        assert told.settings["rate"] == pytest.approx(line.settings.rate * rate)
        assert told.metrics["rung"] == number - 1
        line.judge(bad=[number])
    assert line.heard.kinds == [Kind.REJECTED] * 4 + [Kind.FROZEN]
    assert line.line.ladder.directive.frozen
    for _ in range(FROZEN_PATIENCES):
        assert line.line.task() is None
        line.line.step([], [SPAN], 1)
    task = line.line.task()
    assert (task.number, task.distillation) == (4 + FROZEN_PATIENCES, DISTILLATION)
    assert line.line.ladder.rung == 3
    assert len(line.chronicle.versions) == 5  # rounds left out make no versions


@pytest.mark.parametrize("rise", [0.0, 1.0], ids=["passes", "fails"])
def test_a_version_from_before_the_freeze_is_decided_on_and_stays_frozen(rise):
    """Only where findings come late: the canary's, after its child was rejected."""
    line = Line(gate={"patience": 1})
    for number in (1, 2, 3):
        line.step()
        line.judge(bad=[number])
    line.step()
    line.judge()
    line.step()
    line.judge(bad=[5], left_out=[4])
    assert line.line.ladder.directive.frozen
    line.line.judge([line.finding(4, rise=rise)])
    assert line.path(4)[-1] == ("rejected" if rise else "promoted")
    assert line.line.ladder.directive.frozen
    assert line.heard.kinds.count(Kind.FROZEN) == 1


def test_promotions_in_a_row_make_it_less_careful_again():
    line = Line(gate={"patience": 1})
    line.step()
    line.judge(bad=[1])
    assert line.line.ladder.rung == 1
    for _ in range(4):
        line.judge()
        line.step()
    assert line.stages().count("promoted") == 2
    assert line.line.ladder.rung == 0


@pytest.mark.parametrize(("moves", "rate"), [("everything", 0.02), ("biases", 0.04), ("initialization", 0.04)])
def test_where_less_moves_it_has_a_rate_of_its_own(moves, rate):
    line = Line(moves=moves, rate=0.02, narrow_rate=0.04)
    line.step()
    assert line.chronicle.versions[1].record.settings["rate"] == rate


# --- gradients


def test_gradients_that_cannot_be_used_are_counted_by_reason_and_told():
    line = Line()
    before = line.model.tensors()
    fits = gradient_of(line.model, 0)
    wrong = [
        gradient_of(line.model, 7),
        gradient_of(line.model, 0, dense={**fits.dense, "base_weight": np.zeros(1, np.float32)}),
        gradient_of(line.model, 0, np.nan),
        gradient_of(line.model, 0, np.inf),
        gradient_of(line.model, 0, users=0),
        gradient_of(line.model, 0, items=("i0", "nothing")),
    ]
    line.line.step(wrong, [SPAN], 100)
    assert line.line.refused == {"version": 1, "shape": 1, "not finite": 2, "counts": 1, "items": 1}
    assert line.heard.kinds == [Kind.REFUSED] * 6
    assert [evidence["reason"] for _, _, evidence in line.heard.alarms][:2] == ["version", "shape"]
    same(line.model.tensors(), before)
    assert (line.line.round, line.stages()) == (1, ["initial"])


def test_the_others_still_make_the_version_as_if_the_refused_had_not_come():
    alone, beside = Line(), Line()
    alone.step()
    beside.line.step([gradient_of(beside.model, 0, np.nan), gradient_of(beside.model, 0)], [SPAN], 100)
    same(alone.model.tensors(), beside.model.tensors())
    assert beside.stages() == ["initial", "shadow"]


def test_a_round_without_gradients_makes_no_version():
    line = Line()
    line.line.step([], [SPAN], 100)
    assert (line.line.round, line.stages()) == (1, ["initial"])


def test_the_record_says_what_the_version_was_made_of():
    line = Line()
    line.step()
    line.step()
    record = line.chronicle.versions[2].record
    assert (record.parent, record.round, record.spans, record.model) == (1, 2, (SPAN,), "f" * 64)
    assert (record.metrics["events"], record.metrics["users"], record.metrics["log_loss"]) == (200, 4, 0.5)
    assert record.metrics["step_length"] > 0
    assert record.decision.reason == "4 histories of 40 events"


def test_an_alarms_address_is_a_secret_and_stays_out_of_the_lineage():
    line = Line(alarms={"webhook": "https://hook.example/secret-path"})
    settings = line.chronicle.versions[0].record.settings
    assert settings["every_events"] == 100
    assert "secret-path" not in str(settings)


# --- where who serves stands above the limit itself


def worse(line, served, candidate):
    """Version 0 was at 0.5; the one that serves is at ``served``; version 1 at ``candidate``."""
    line.line.measured(line.scores(0, served), line.scores(0))
    line.step()
    line.line.judge([line.finding(1, candidate)])
    return line.chronicle.versions[1].decisions[-1]


def test_a_candidate_that_is_no_worse_than_who_serves_passes_above_the_limit():
    decision = worse(Line(), 0.56, 0.55)
    assert decision.kind == "canary"
    assert "; but it is no worse there than version 0, which serves" in decision.reason


def test_one_that_is_worse_than_who_serves_does_not():
    assert worse(Line(), 0.55, 0.551).kind == "rejected"


def test_one_that_is_worse_on_a_single_cohort_that_has_risen_does_not():
    line = Line()
    line.line.measured(scores_of(0, 0.56, 0.56), line.scores(0))
    line.step()
    stream = Rises(np.zeros(10), np.full(10, 4))
    line.line.judge([Findings(1, scores_of(1, 0.50, 0.57), stream)])
    assert line.path(1)[-1] == "rejected"


def test_a_loss_that_is_not_finite_never_recovers():
    line = Line()
    line.line.measured(line.scores(0, 0.6), line.scores(0))
    line.step()
    line.line.judge([Findings(1, scores_of(1, np.nan, 0.55), Rises(np.zeros(10), np.full(10, 4)))])
    assert line.path(1)[-1] == "rejected"


def test_cohorts_that_were_retired_do_not_judge():
    line = Line()
    line.line.measured(scores_of(0, FINE), scores_of(0, FINE))  # slice 1 is gone
    line.step()
    line.line.judge([Findings(1, scores_of(1, FINE), Rises(np.zeros(10), np.full(10, 4)))])
    assert line.path(1)[-1] == "canary"


def test_what_was_said_of_retired_cohorts_is_forgotten_with_them():
    """They may be retired while a version that was scored on them is a canary."""
    line = Line()
    line.step()
    line.judge()
    line.line.measured(scores_of(0, FINE), scores_of(0, FINE))
    line.judge()
    assert line.path(1)[-1] == "promoted"
    assert line.line.matrix.versions == (0, 0, 1)
    assert np.isnan(line.line.matrix.values[-1, 1]).all()
    line.step()
    line.line.judge([Findings(2, scores_of(2, FINE), Rises(np.zeros(10), np.full(10, 4)))])
    assert line.path(2)[-1] == "canary"  # not refused for a cohort that nobody scores
