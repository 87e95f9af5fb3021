"""What the report says of an online stage: windows, marks, the heat map, and the list of decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
import pytest

from learner.drift import DriftAlarm
from learner.forgetting import Column, ForgettingMatrix
from learner.metrics import auc, event_log_loss
from state.lineage.history import Version
from state.lineage.record import Decision, Kind, Record, Span
from streams.meta.result import FROZEN, MetaResult
from streams.report import decisions, online_numbers
from streams.report.decisions import decision_runs, evidence_lines
from streams.report.heat_map import draw_heat_map, level_step, levels_of
from streams.report.online_numbers import (
    ADAPTED,
    ZERO_SHOT,
    decided_in_round,
    heat_map,
    over_arrivals,
    over_events,
)
from streams.report.online_section import cohort_rows, measure_rows
from streams.results import ScoredStream

EVERY = 100
NONE = float("nan")


def version(number: int, *kinds: Kind, events: int | None = None, evidence: int = 0) -> Version:
    """Made in the round of its number, from the 100 source offsets before offset 10 + 100 · number."""
    rows = [{"cohort": f"c{k}", "finding": "passes", "users": 20} for k in range(evidence)]
    held = {"verdicts": [{"stage": "anchors", "evidence": rows}]} if evidence else {}
    made = [Decision(kind, f"why {kind}", held if k == len(kinds) - 1 else {}) for k, kind in enumerate(kinds)]
    end = 9 + EVERY * number
    record = Record(
        number, number - 1 if number else None, "m", number, made[0],
        (Span(0, end - EVERY + 1, end),) if number else (),
        metrics={"events": EVERY * number if events is None else events} if number else {},
    )  # fmt: skip
    return Version(record, tuple(made))


def online(versions: Sequence[Version], drift: tuple[int, ...] = ()) -> MetaResult:
    alarms = tuple(DriftAlarm("all", "adwin", event, 0.5, 0.6) for event in drift)
    return MetaResult(tuple(versions), ForgettingMatrix(), alarms, 1.0, len(versions) - 1)


def stream(offsets: Sequence[int], users: Sequence[int], frozen: bool = True) -> ScoredStream:
    n = len(offsets)
    rng = np.random.default_rng(3)
    label = (np.arange(n) % 2).astype(np.int8)
    probability = rng.uniform(0.05, 0.95, n).astype(np.float32)
    return ScoredStream(
        tuple(f"u{u}" for u in range(max(users) + 1)), ("i",), np.array(users, np.int32), np.zeros(n, np.int32),
        np.arange(n), np.array(offsets, np.int64), label, np.zeros(n, np.int64), probability,
        {FROZEN: np.full(n, 0.5, np.float32)} if frozen else {},
    )  # fmt: skip


def matrix(log_loss: Sequence[Sequence[float]], columns: Sequence[Column]) -> ForgettingMatrix:
    """Adapted log-loss as given, zero-shot 0.1 above it, AUC = 1 − log-loss; version numbers from 0."""
    loss = np.array(log_loss, np.float64)
    values = np.stack([np.stack([1 - loss, 0.9 - loss], -1), np.stack([loss, loss + 0.1], -1)], -2)
    return ForgettingMatrix(tuple(range(len(loss))), tuple(columns), values, values[0])


COLUMNS = (Column("slice 0 / new", 0, "new"), Column("slice 1 / new", 1, "new"), Column("slice 0 / warm", 0, "warm"))
FELL_ROSE_AND_RETIRED = matrix([[0.6, NONE, 0.5], [0.58, 0.4, 0.53], [0.57, 0.41, NONE]], COLUMNS)


# --- curves -------------------------------------------------------------------------------------------------------


def test_windows_over_the_stream_score_their_own_events_with_and_without() -> None:
    scored = stream(range(10, 1110), [k % 7 for k in range(1100)])
    curve = over_events(scored, online([version(0, "initial")]), EVERY)
    assert curve.edge.tolist() == [0, 550, 1100]
    late = slice(550, 1100)
    assert curve.auc["coldstream"][1] == auc(scored.label[late], scored.probability[late])
    assert curve.log_loss["coldstream"][1] == pytest.approx(
        event_log_loss(scored.label[late], scored.probability[late]).mean()
    )
    assert curve.auc[FROZEN].tolist() == [0.5, 0.5]
    gain = curve.gain("log_loss")
    assert gain is not None
    assert gain[1] == pytest.approx(math.log(2) - curve.log_loss["coldstream"][1])


def test_windows_by_arrival_hold_all_events_of_their_users_in_the_order_they_came() -> None:
    users = [*range(19, -1, -1)] * 50  # user 19 comes first
    scored = stream(range(10, 1010), users)
    curve = over_arrivals(scored, online([version(0, "initial")]), EVERY)
    assert curve.edge.tolist() == [0, 10, 20]
    early = scored.user >= 10
    assert curve.auc["coldstream"][0] == auc(scored.label[early], scored.probability[early])
    assert curve.log_loss["coldstream"][0] == pytest.approx(
        event_log_loss(scored.label[early], scored.probability[early]).mean()
    )


def test_without_the_frozen_model_there_is_no_gain() -> None:
    curve = over_events(stream(range(10), [0] * 10, frozen=False), online([version(0, "initial")]), EVERY)
    assert curve.gain("auc") is None


@pytest.mark.parametrize(
    ("kinds", "made_in_round_3_decided_in"),
    [
        (("candidate", "promoted"), 3),  # the gate is off
        (("rejected",), 3),  # not finite as it was made
        (("candidate", "shadow", "rejected"), 4),
        (("candidate", "shadow", "promoted"), 4),
        (("candidate", "shadow", "canary", "promoted"), 5),
    ],
)
def test_a_version_moves_on_by_one_stage_a_round(kinds: tuple[Kind, ...], made_in_round_3_decided_in: int) -> None:
    assert decided_in_round(version(3, *kinds)) == made_in_round_3_decided_in


def test_marks_stand_where_the_round_of_their_decision_ended() -> None:
    versions = [
        version(0, "initial"),
        version(1, "candidate", "shadow", "canary", "promoted"),  # at the end of round 3, offset 309
        version(2, "candidate", "shadow", "rejected"),  # the same
        version(3, "candidate", "shadow", "canary"),
    ]
    meta = online(versions, drift=(250,))
    whole = stream(range(10, 410), [0] * 400)  # all that was streamed
    marks = over_events(whole, meta, EVERY).marks
    assert (marks.promoted.tolist(), marks.rejected.tolist(), marks.drift.tolist()) == ([300], [300], [250])
    last_users = stream(range(290, 410), [k % 2 for k in range(120)])  # as with --score-last
    marks = over_events(last_users, meta, EVERY).marks
    assert (marks.promoted.tolist(), marks.drift.tolist()) == ([20], [0])
    assert over_arrivals(whole, meta, EVERY).marks.promoted.tolist() == [1]


def test_alarms_of_a_stream_that_made_no_version_stand_at_their_event() -> None:
    marks = over_events(stream(range(10, 410), [0] * 400), online([version(0, "initial")], (250,)), EVERY).marks
    assert marks.drift.tolist() == [250]


# --- forgetting ---------------------------------------------------------------------------------------------------


def test_the_heat_map_shows_changes_since_a_cohorts_first_evaluation_by_slice() -> None:
    heat = heat_map(FELL_ROSE_AND_RETIRED, ADAPTED, 40)
    assert [c.name for c in heat.columns] == ["slice 0 / new", "slice 0 / warm", "slice 1 / new"]
    expected = [[0, 0, NONE], [-0.02, 0.03, 0], [-0.03, NONE, 0.01]]
    np.testing.assert_allclose(heat.change, expected, atol=1e-12)
    assert heat.since == (0, 0, 1)
    zero_shot = heat_map(FELL_ROSE_AND_RETIRED, ZERO_SHOT, 40)
    np.testing.assert_allclose(zero_shot.value, heat.value + 0.1)


def test_many_evaluations_are_sampled_evenly_and_changes_stay_those_since_the_first() -> None:
    long = matrix([[0.5 + 0.001 * t] for t in range(101)], COLUMNS[:1])
    heat = heat_map(long, ADAPTED, 5)
    assert heat.versions == (0, 25, 50, 75, 100)
    np.testing.assert_allclose(heat.change[:, 0], [0, 0.025, 0.05, 0.075, 0.1])


def test_of_too_many_cohorts_whole_slices_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_numbers, "MOST_COLUMNS", 6)
    columns = [Column(f"slice {s} / {kind}", s, kind) for s in range(5) for kind in ("new", "warm")]
    heat = heat_map(matrix([[0.5] * 10], columns), ADAPTED, 40)
    assert [(c.slice, c.kind) for c in heat.columns] == [(s, k) for s in (0, 2, 4) for k in ("new", "warm")]


def test_colours_are_the_same_both_ways_and_the_outermost_hold_all_beyond() -> None:
    change = np.array([-0.5, -0.019, -0.004, 0.0, 0.004, 0.019, 0.5, NONE])
    assert levels_of(change, 0.01).tolist()[:7] == [0, 2, 4, 4, 4, 6, 8]
    assert level_step(np.array([-0.04, 0.01, NONE])) == pytest.approx(0.01)
    assert level_step(np.array([0.0, 0.041])) == pytest.approx(0.02)
    assert level_step(np.array([NONE])) is None


def test_a_cell_tells_its_numbers_and_a_cohort_that_was_not_measured_has_none() -> None:
    drawn = draw_heat_map("map", heat_map(FELL_ROSE_AND_RETIRED, ADAPTED, 40), "the change")
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    cells = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    told = {cell[0].text: cell.get("class") for cell in cells}
    assert len(told) == 7
    assert told["version 2, slice 0 / new: 0.5700, −0.0300 since version 0"] == "h1"
    assert told["version 1, slice 0 / warm: 0.5300, +0.0300 since version 0"] == "h7"
    assert told["version 1, slice 1 / new: 0.4000, +0.0000 since version 1"] == "h4"


def test_the_name_of_a_segment_is_escaped() -> None:
    hostile = Column("slice 0 / segment=<b>", 0, "segment=<b>")
    drawn = draw_heat_map("map", heat_map(matrix([[0.5], [0.6]], [hostile]), ADAPTED, 40), "the change")
    assert drawn is not None
    assert "<b>" not in drawn
    assert "segment=&lt;b&gt;: 0.6000" in drawn


def test_without_an_evaluation_there_is_no_map_and_no_table() -> None:
    nothing = ForgettingMatrix()
    assert draw_heat_map("map", heat_map(nothing, ADAPTED, 40), "the change") is None
    assert measure_rows(nothing) == ()
    assert cohort_rows(nothing) == ()


def test_measures_are_in_points_and_nats_with_the_cohort_they_are_of() -> None:
    rows = {row.name: row for row in measure_rows(FELL_ROSE_AND_RETIRED)}
    assert (rows["Average"].auc, rows["Average"].log_loss) == ("0.5100", "0.4900")
    assert (rows["Backward transfer"].auc, rows["Backward transfer"].log_loss) == ("+1.00", "+0.0100")
    worst = rows["Worst cohort"]
    assert (worst.auc, worst.auc_of) == ("0.4300", "slice 0 / new")
    assert (rows["Largest forgetting"].log_loss, rows["Largest forgetting"].log_loss_of) == ("+0.0100", "slice 1 / new")


def test_every_cohort_is_told_from_its_first_evaluation_to_its_last() -> None:
    rows = {row.name: row for row in cohort_rows(FELL_ROSE_AND_RETIRED)}
    assert rows["slice 0 / new"].versions == "0 to 2"
    assert rows["slice 0 / new"].log_loss == ("0.6000", "0.5700", "−0.0300")
    assert rows["slice 0 / new"].auc == ("0.4000", "0.4300", "+3.00")
    assert rows["slice 0 / warm"].versions == "0 to 1, then retired"
    assert rows["slice 0 / warm"].log_loss == ("0.5000", "0.5300", "+0.0300")


# --- decisions ----------------------------------------------------------------------------------------------------


def promoted(number: int, evidence: int = 0) -> Version:
    return version(number, "candidate", "shadow", "canary", "promoted", evidence=evidence)


def rejected(number: int, evidence: int = 0) -> Version:
    return version(number, "candidate", "shadow", "rejected", evidence=evidence)


def test_the_ends_and_all_rejected_stand_open_and_long_runs_of_others_are_folded() -> None:
    refused = {12, 30, 32}
    versions = [version(0, "initial"), *(rejected(n) if n in refused else promoted(n) for n in range(1, 40))]
    runs = decision_runs(versions)
    assert [(run.folded, run.rows[0].version, run.rows[-1].version) for run in runs] == [
        (False, 0, 3), (True, 4, 11), (False, 12, 12), (True, 13, 29), (False, 30, 39),
    ]  # fmt: skip


def test_a_row_tells_where_a_version_comes_from_its_stages_and_the_last_reason() -> None:
    row = decision_runs([version(0, "initial"), rejected(1)])[0].rows[1]
    assert (row.version, row.parent, row.round, row.events) == (1, "0", 1, "100")
    assert (row.path, row.reason, row.rejected) == ("candidate → shadow → rejected", "why rejected", True)


def test_no_version_is_lost_however_they_are_folded() -> None:
    versions = [version(0, "initial"), *(rejected(n) if n % 9 == 4 else promoted(n) for n in range(1, 100))]
    assert [row.version for run in decision_runs(versions) for row in run.rows] == list(range(100))


def test_a_page_has_bounds_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "MOST_VERSIONS", 20)
    versions = [version(0, "initial"), *(rejected(n) if n == 50 else promoted(n) for n in range(1, 100))]
    runs = decision_runs(versions)
    listed = [row.version for run in runs for row in run.rows]
    assert len(listed) == 20
    assert {0, 1, 2, 3, 50, 96, 97, 98, 99} <= set(listed)
    assert sum(run.left_out for run in runs) == 80


def test_rejected_versions_get_the_room_for_evidence_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "MOST_EVIDENCE", 10)
    versions = [version(0, "initial"), *(promoted(n, evidence=5) for n in range(1, 20)), rejected(20, evidence=5)]
    rows = {row.version: row for run in decision_runs(versions) for row in run.rows}
    assert [n for n, row in rows.items() if any(step.evidence for step in row.steps)] == [1, 20]
    assert [n for n, row in rows.items() if row.evidence_left_out] == list(range(2, 20))


def test_evidence_is_one_line_for_each_cohort_and_verdict() -> None:
    cohort = {"cohort": "slice 6 / new", "finding": "rises", "users": 34, "rise": 0.0087, "lower": -0.001,
              "upper": 0.0134, "reference": 118}  # fmt: skip
    stream_alone = {"cohort": "stream", "finding": "few users", "users": 6, "rise": None, "lower": None, "upper": None,
                    "reference": None}  # fmt: skip
    verdicts = [{"stage": "anchors", "evidence": [cohort]}, {"stage": "canary", "evidence": [stream_alone]}]
    assert evidence_lines({"verdicts": verdicts}) == (
        "anchors · slice 6 / new: rises, +0.0087 (−0.0010 to +0.0134), 34 users, over version 118",
        "canary · stream: few users, 6 users",
    )


def test_other_evidence_is_shown_as_it_is() -> None:
    assert evidence_lines({}) == ()
    assert evidence_lines({"by": "hand", "at": 3}) == ('{"at": 3, "by": "hand"}',)
