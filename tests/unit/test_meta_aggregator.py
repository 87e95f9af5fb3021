"""The one that makes versions: what it takes in, when a round is due, what it publishes, and what a crash leaves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from configs.settings import AnchorSettings, GateSettings, MetaSettings
from learner.drift import DriftAlarm
from learner.forgetting import LOGIT_BINS, CohortScores, Column, Scores
from learner.meta_model import MetaModel
from learner.meta_update import GradientSum, gradient_sum
from learner.serving import ServingModel
from state.changelog import Record
from state.lineage import Parameters, Span, WrongStep, serving_sha256
from streams.meta.aggregator import Aggregator, Round
from streams.meta.contributor import Findings, Rises
from streams.meta.messages import Contribution, MessageRefused, chunks, records
from streams.meta.published import Marker
from streams.meta.replica import Replica
from tests.meta_models import VOCABULARY, histories, meta_model
from tests.unit.test_meta_update import assert_same_tensors, spoiled

SEED = 3
ALARMS: list[tuple[str, str]] = []
NEW = {"new1": ("x|y",), "new2": None}
TIMEOUT_S = 30.0


def settings(*, events: int = 20, enabled: bool = True, canary_share: float = 0.2) -> MetaSettings:
    gate = GateSettings(
        enabled=enabled, min_users=2, min_stream_users=2, bootstrap_samples=100, canary_share=canary_share, patience=2
    )
    return MetaSettings(
        moves="everything", every_events=events, users=8, rate=0.02, gate=gate, anchors=AnchorSettings(users=8)
    )


def serving_of(model: MetaModel) -> ServingModel:
    return ServingModel(*model.parts(), fingerprint="f" * 64)


def recovered(log: Iterable[Record] = (), given: MetaSettings | None = None, key: bytes | None = None) -> Aggregator:
    model = meta_model()
    ALARMS.clear()
    return Aggregator.recover(
        model, serving_of(model), given or settings(), log, seed=SEED, round_timeout_s=TIMEOUT_S, key=key,
        alarm=lambda kind, message, _: ALARMS.append((kind.value, message)), now_ms=lambda: 0,
    )  # fmt: skip


def replica(log: Iterable[Record] = (), key: bytes | None = None) -> Replica:
    model = meta_model()
    made = Replica(model, serving_of(model), key)
    made.read(log)
    return made


def scores(version: int, partition: int, rise: float = 0.0, names: Sequence[str] = ("warm",)) -> Scores:
    """Of four users on each cohort, the same for every version but for ``rise``."""
    cohorts = []
    for k, name in enumerate(names):
        rng = np.random.default_rng([partition, k])
        user = np.sort(rng.choice(1 << 20, 4, replace=False)).astype(np.uint32)
        loss = np.tile(rng.uniform(0.4, 0.6, 4), (2, 1)) + rise * np.array([1.0, 1.1, 0.9, 1.0])
        counts = np.zeros((2, 2, LOGIT_BINS), np.int64)
        counts[:, :, 200 + partition % 300] = 5
        column = Column(f"slice 0 / {name}", 0, name)
        cohorts.append(CohortScores(column, version, user, loss, np.full(4, 5), (0.5, 0.5), counts, 0))
    return Scores(version, tuple(cohorts))


def rises(rise: float, users: int = 4) -> Rises:
    return Rises(rise * np.linspace(0.9, 1.1, users) * 3, np.full(users, 3))


def gradient(follower: Replica, seed: int, new: bool = False) -> GradientSum:
    items = (*VOCABULARY, *NEW) if new else VOCABULARY
    given, chosen = histories(follower.model, (5, 3, 4), items, seed=seed)
    summed = gradient_sum(
        follower.model, follower.head, given, "everything", seed=(SEED, seed), seen=dict.fromkeys(chosen, 1)
    )
    return replace(summed, new_items=follower.model.lacks(NEW) if new else {})


def contribution(
    follower: Replica, partition: int, span: tuple[int, int], *, rise: float = 0.0, anchors: bool = False,
    first: bool = False, new: bool = False, seed: int | None = None, learns: bool = True,
) -> Contribution:  # fmt: skip
    """As a partition makes it after the follower's marker; ``rise`` of every open version, in nats an event."""
    assert follower.marker is not None
    findings = tuple(
        Findings(model.meta_version, scores(model.meta_version, partition, rise) if anchors else None, rises(rise))
        for _, model in follower.open_versions
    )
    seed = partition if seed is None else seed
    return Contribution(
        follower.marker.sequence, follower.head, Span(partition, *span), span[1] - span[0] + 1,
        gradient(follower, seed, new) if learns and follower.task is not None else None, findings,
        scores(follower.current.meta_version, partition) if anchors else None,
        scores(0, partition) if first else None,
    )  # fmt: skip


class World:
    """An aggregator and a follower of its log; every round is published."""

    def __init__(self, given: MetaSettings | None = None) -> None:
        self.settings = given or settings()
        self.aggregator = recovered((), self.settings)
        self.log: list[Record] = []
        self.follower = replica()
        self.consumed: dict[int, int] = {}
        self.publish(self.aggregator.begin())

    def publish(self, made: Round | None) -> None:
        assert made is not None
        self.log += made.versions
        self.last = made
        self.follower.follow(made.versions)

    def round(self, rise: float = 0.0, partitions: Sequence[int] = (0, 1), **how: bool) -> Round:
        for p in partitions:
            first = self.consumed.get(p, -1) + 1
            span = (first, first + 9)
            made = contribution(self.follower, p, span, rise=rise, seed=17 * p + first, **how)
            assert self.aggregator.take(made, 0.0) is None
            self.consumed[p] = span[1]
        self.publish(self.aggregator.round())
        return self.last

    def stages(self) -> list[str]:
        return [version.stage for version in self.aggregator.versions]


def compacted(log: Sequence[Record]) -> list[Record]:
    """Of each key the latest value, as the broker leaves it; tombstones go too."""
    last = {record.key: k for k, record in enumerate(log)}
    return [record for k, record in enumerate(log) if last[record.key] == k and record.value is not None]


def assert_same_serving(one: ServingModel, other: ServingModel) -> None:
    assert one.meta_version == other.meta_version
    assert one.fixed.item_ids == other.fixed.item_ids
    held = len(one.fixed.item_ids)
    for name in ("psi", "base", "second_psi"):
        np.testing.assert_array_equal(getattr(one.items, name)[:held], getattr(other.items, name)[:held], err_msg=name)
    np.testing.assert_array_equal(one.first.initialization, other.first.initialization)
    np.testing.assert_array_equal(one.first.covariance, other.first.covariance)


def assert_follows(follower: Replica, aggregator: Aggregator) -> None:
    """The replica is, to the bit, where the aggregator is."""
    line = aggregator.line
    assert follower.model.item_ids == line.model.item_ids
    assert_same_tensors(follower.model.tensors(), line.model.tensors())
    assert (follower.head, follower.consumed) == (line.head, aggregator.consumed)
    assert_same_serving(follower.current, line.current)
    assert [s for s, _ in follower.open_versions] == [s for s, _ in line.open_versions]
    for (_, ours), (_, theirs) in zip(follower.open_versions, line.open_versions, strict=True):
        assert_same_serving(ours, theirs)


def assert_same_aggregator(one: Aggregator, other: Aggregator) -> None:
    a, b = one.line.state(), other.line.state()
    assert_same_tensors(one.line.model.tensors(), other.line.model.tensors())
    assert one.line.model.item_ids == other.line.model.item_ids
    assert (one.consumed, one.events, one._sequence, one._task) == (
        other.consumed, other.events, other._sequence, other._task,
    )  # fmt: skip
    assert (a.round, a.ladder, a.blind, a.refused) == (b.round, b.ladder, b.blind, b.refused)
    assert one.versions == other.versions
    assert one._recorder._history.served == other._recorder._history.served
    for left, right in ((a.best.reference, b.best.reference), (a.served, b.served)):
        assert_same_scores(left, right)
    assert a.matrix.as_dict() == b.matrix.as_dict()
    for left, right in zip(a.open, b.open, strict=True):
        assert (left.number, left.stage) == (right.number, right.stage)
        assert_same_serving(left.model, right.model)
        assert (left.scores is None) == (right.scores is None)
        if left.scores is not None and right.scores is not None:
            assert_same_scores(left.scores, right.scores)
    assert_same_serving(a.current, b.current)


def assert_same_scores(one: Scores, other: Scores) -> None:
    ours, theirs = one.as_arrays(), other.as_arrays()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# --- rounds ---------------------------------------------------------------------------------------------------


def test_a_version_goes_from_shadow_to_canary_to_everybody_and_a_replica_goes_along():
    world = World()
    for _ in range(4):
        world.round(new=True)
        assert_follows(world.follower, world.aggregator)
    assert world.stages() == ["initial", "promoted", "promoted", "canary", "shadow"]
    assert world.follower.serving.canary is not None
    assert world.follower.serving.canary.meta_version == 3
    assert world.follower.serving.canary_share == 0.2
    assert world.follower.current.meta_version == 2
    assert [m.meta_version for m in world.follower.serving.earlier] == [0, 1]
    assert world.follower.model.item_ids[12:] == ["new1", "new2"]
    spans = world.aggregator.versions[2].record.spans
    assert spans == (Span(0, 10, 19), Span(1, 10, 19))


def test_a_rejected_version_goes_with_all_that_was_built_on_it_and_its_items_stay():
    world = World()
    world.round()
    world.round(new=True)
    before = serving_sha256(world.follower.model.serving_tensors(12), VOCABULARY)
    world.round(rise=0.5)
    assert world.stages() == ["initial", "rejected", "rejected"]
    assert_follows(world.follower, world.aggregator)
    assert world.follower.head == 0
    assert sorted(world.follower.model.item_ids[12:]) == ["new1", "new2"]
    trained = meta_model()
    found = serving_sha256(world.follower.model.serving_tensors(12), VOCABULARY)
    assert found == serving_sha256(trained.tensors(), VOCABULARY) != before
    world.round()
    assert world.stages() == ["initial", "rejected", "rejected", "shadow"]
    assert_follows(world.follower, world.aggregator)


def test_without_a_gate_a_version_serves_as_it_is_made():
    world = World(settings(enabled=False))
    world.round()
    world.round(new=True)
    assert world.stages() == ["initial", "promoted", "promoted"]
    assert_follows(world.follower, world.aggregator)
    assert_follows(replica(compacted(world.log)), world.aggregator)


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
@pytest.mark.parametrize("compact", [False, True])
def test_it_goes_on_from_its_log_as_if_nothing_had_happened(rounds, compact):
    world = World()
    for k in range(rounds):
        world.round(rise=0.5 if k == 3 else 0.0, anchors=True, first=k == 0, new=k % 2 == 0)
    log = compacted(world.log) if compact else world.log
    again = recovered(log, world.settings)
    assert_same_aggregator(again, world.aggregator)
    assert again.begin() is None
    follower = replica(log)
    assert_follows(follower, again)
    for p in (0, 1):
        first = world.consumed.get(p, -1) + 1
        made = contribution(follower, p, (first, first + 4), anchors=True, rise=0.5)
        assert again.take(made, 0.0) is None
        assert world.aggregator.take(made, 0.0) is None
    assert again.round() == world.aggregator.round()
    assert_same_aggregator(again, world.aggregator)


def test_a_compacted_log_has_one_table_and_the_deltas_of_open_versions():
    world = World()
    for _ in range(5):
        world.round(new=True)
    keys = {record.key.split(b"/")[0] + b"/" for record in compacted(world.log)}
    assert keys == {b"n/", b"d/", b"r/", b"p/", b"v/", b"s/", b"m/"}
    deltas = {int(r.key.split(b"/")[1]) for r in compacted(world.log) if r.key.startswith(b"d/")}
    assert deltas == {o.number for o in world.aggregator.line.state().open} == {4, 5}


def test_what_is_known_of_an_open_version_goes_with_it():
    world = World()
    for k in range(4):
        world.round(anchors=True, first=k == 0)
    known = {int(r.key.split(b"/")[2]) for r in compacted(world.log) if r.key.startswith(b"s/scores/")}
    assert known == {3}  # the canary; 4 is new, and 1 and 2 are promoted
    world.round(anchors=True, rise=0.5)
    assert world.stages() == ["initial", "promoted", "promoted", "rejected", "rejected"]
    assert not [r for r in compacted(world.log) if r.key.startswith((b"s/scores/", b"d/"))]


def test_no_record_is_larger_than_a_broker_takes():
    world = World()
    for k in range(3):
        world.round(anchors=True, first=k == 0, new=True)
    assert all(len(record.value or b"") <= 900_000 for record in world.log)


# --- what is taken --------------------------------------------------------------------------------------------


def test_a_span_counts_once_and_none_is_left_out():
    world = World()
    made = contribution(world.follower, 0, (0, 9))
    assert world.aggregator.take(made, 0.0) is None
    assert world.aggregator.take(made, 0.0) == "span"
    assert world.aggregator.take(contribution(world.follower, 0, (10, 19)), 0.0) == "span"
    assert world.aggregator.take(contribution(world.follower, 1, (3, 9)), 0.0) == "span"
    world.publish(world.aggregator.round())
    assert world.aggregator.take(made, 0.0) == "span"
    assert world.aggregator.take(contribution(world.follower, 0, (9, 12)), 0.0) == "span"
    assert world.aggregator.take(contribution(world.follower, 0, (11, 12)), 0.0) == "span"
    assert world.aggregator.take(contribution(world.follower, 0, (10, 12)), 0.0) is None
    assert world.aggregator.consumed == {0: 9}
    assert world.aggregator.line.refused == {"span": 6}


def test_what_was_made_after_another_marker_is_to_be_made_again():
    world = World()
    late = contribution(world.follower, 1, (0, 9))
    world.round(partitions=[0])
    assert world.aggregator.take(late, 0.0) == "version"
    assert world.aggregator.take(replace(contribution(world.follower, 1, (0, 9)), version=0), 0.0) == "version"
    wrong = replace(contribution(world.follower, 1, (0, 9)), current=scores(1, 1))
    assert world.aggregator.take(wrong, 0.0) == "version"
    assert world.aggregator.take(contribution(world.follower, 1, (0, 9)), 0.0) is None
    assert world.aggregator.line.refused == {"version": 3}


def test_findings_of_an_earlier_marker_are_stale_even_where_the_head_is_the_same():
    world = World()
    world.round()
    late = contribution(world.follower, 1, (10, 19), learns=False)
    world.round(partitions=[0], learns=False)
    assert world.stages() == ["initial", "canary"]
    assert world.follower.head == late.version
    assert world.aggregator.take(late, 0.0) == "version"


def test_a_round_is_due_with_enough_events_or_when_one_has_waited_long_enough():
    world = World(settings(events=20))
    aggregator = world.aggregator
    assert not aggregator.due(1e9)
    aggregator.take(contribution(world.follower, 0, (0, 9)), 100.0)
    assert not aggregator.due(100.0 + TIMEOUT_S - 1)
    assert aggregator.due(100.0 + TIMEOUT_S)
    aggregator.take(contribution(world.follower, 1, (0, 9)), 101.0)
    assert aggregator.due(101.0)
    with pytest.raises(ValueError, match="due"):
        recovered().round()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_refused_by_name_and_the_others_make_the_version(value):
    world = World()
    bad = contribution(world.follower, 0, (0, 9))
    assert bad.gradient is not None
    bad = replace(bad, gradient=spoiled(bad.gradient, "head.initialization", value))
    assert world.aggregator.take(bad, 0.0) is None
    assert world.aggregator.take(contribution(world.follower, 1, (0, 9)), 0.0) is None
    world.publish(world.aggregator.round())
    assert world.aggregator.line.refused == {"not finite": 1}
    assert [kind for kind, _ in ALARMS] == ["refused gradient"]
    assert world.aggregator.consumed == {0: 9, 1: 9}
    assert world.stages() == ["initial", "shadow"]
    alone = World()
    alone.aggregator.take(contribution(alone.follower, 1, (0, 9)), 0.0)
    alone.publish(alone.aggregator.round())
    assert_same_tensors(alone.aggregator.line.model.tensors(), world.aggregator.line.model.tensors())


def test_a_parameter_of_which_only_one_partition_has_a_gradient_counts_for_that_one():
    slope = {"ordinal_slope": np.full((4,), 0.5, np.float32)}
    zero = {"ordinal_slope": np.zeros((4,), np.float32)}
    found = []
    for given in ({}, zero):
        world = World()
        for p, more in enumerate((given, slope)):
            made = contribution(world.follower, p, (0, 9))
            assert made.gradient is not None
            assert "ordinal_slope" not in made.gradient.dense
            summed = replace(made.gradient, dense={**made.gradient.dense, **more})
            assert world.aggregator.take(replace(made, gradient=summed), 0.0) is None
        world.publish(world.aggregator.round())
        assert world.aggregator.line.refused == {}
        found.append(world.aggregator.line.model.tensors())
    assert_same_tensors(*found)
    assert found[0]["moments.first.ordinal_slope"].all()


def test_it_reads_on_after_what_it_has_taken_in_and_from_the_start_of_what_is_not_whole():
    world = World()
    whole, part = (records(contribution(world.follower, p, (0, 9))) for p in (0, 1))
    assert len(whole) == len(part) == 1
    for offset, (key, value) in enumerate([*whole, (b"x", b"damage")], start=7):
        world.aggregator.receive(offset, key, value, 0.0)
    made = world.aggregator.round()
    assert made.position == 9
    assert world.aggregator.line.refused == {"damaged": 1}
    assert world.aggregator.consumed == {0: 9}
    assert [kind for kind, _ in ALARMS] == ["refused gradient"]


def test_a_contribution_of_which_a_part_is_missing_is_read_again_from_its_first_record(monkeypatch):
    monkeypatch.setattr(chunks, "PIECE", 1_000)
    world = World()
    long, other = (records(contribution(world.follower, p, (0, 9))) for p in (0, 1))
    assert len(long) > 2
    half = len(long) // 2
    for offset, (key, value) in enumerate([*long[:half], *other], start=5):
        world.aggregator.receive(offset, key, value, 0.0)
    made = world.aggregator.round()
    assert made.position == 5
    assert world.aggregator.consumed == {1: 9}
    again = recovered([*world.log, *made.versions], world.settings)
    follower = replica([*world.log, *made.versions])
    fresh = records(contribution(follower, 0, (0, 9)))
    for offset, (key, value) in enumerate([*long[:half], *other, *fresh], start=5):
        again.receive(offset, key, value, 0.0)
    assert again.waiting_events == 10
    assert again.line.refused == {"span": 1, "incomplete": 1}
    assert again.round().position == 5 + half + len(other) + len(fresh)


# --- anchors --------------------------------------------------------------------------------------------------


def test_a_silent_partition_is_not_measured_and_its_best_is_kept():
    world = World()
    world.round(anchors=True, first=True)
    assert len(world.aggregator.line.state().best.reference["slice 0 / warm"].user) == 8
    world.round(anchors=True, partitions=[0])
    assert world.stages() == ["initial", "canary", "shadow"]
    assert len(world.aggregator.line.state().best.reference["slice 0 / warm"].user) == 8


def test_a_cohort_that_only_a_silent_partition_has_does_not_judge_and_is_kept():
    world = World()
    a, b = (contribution(world.follower, p, (0, 9)) for p in (0, 1))
    names = [("warm",), ("heavy",)]
    for made, own in zip((a, b), names, strict=True):
        p = made.partition
        world.aggregator.take(replace(made, current=scores(0, p, names=own), base=scores(0, p, names=own)), 0.0)
    world.publish(world.aggregator.round())
    world.consumed = {0: 9, 1: 9}
    world.round(anchors=True, partitions=[0])
    assert world.stages() == ["initial", "canary", "shadow"]
    held = [cohort.name for cohort in world.aggregator.line.state().best.reference.cohorts]
    assert sorted(held) == ["slice 0 / heavy", "slice 0 / warm"]
    world.round(anchors=True, first=True, partitions=[0])  # other anchors: the silent one's are still its own
    held = [cohort.name for cohort in world.aggregator.line.state().best.reference.cohorts]
    assert sorted(held) == ["slice 0 / heavy", "slice 0 / warm"]


def test_users_of_a_partition_that_begins_later_are_judged_from_then_on():
    world = World()
    world.round(anchors=True, first=True, partitions=[0])
    world.round(anchors=True, first=True, partitions=[1])
    reference = world.aggregator.line.state().best.reference["slice 0 / warm"]
    users = np.sort(np.concatenate([scores(0, p)["slice 0 / warm"].user for p in (0, 1)]))
    np.testing.assert_array_equal(reference.user, users)


# --- monitoring -----------------------------------------------------------------------------------------------


def test_a_round_tells_its_decisions_its_row_of_the_matrix_drift_and_refusals():
    world = World()
    world.round(anchors=True, first=True)
    found = [json.loads(record.value or b"") for record in world.last.monitoring]
    decisions = [(f["version"], f["kind"]) for f in found if f["record"] == "decision"]
    assert decisions == [(1, "candidate"), (1, "shadow")]
    assert [f["cohort"] for f in found if f["record"] == "cohort"] == ["slice 0 / warm"]
    world.aggregator.take(contribution(world.follower, 0, (0, 3)), 0.0)
    alarm = DriftAlarm("warm", "adwin", 400, 0.5, 0.6)
    world.aggregator.take(replace(contribution(world.follower, 0, (10, 19), anchors=True), drift=(alarm,)), 0.0)
    found = [json.loads(record.value or b"") for record in world.aggregator.round().monitoring]
    assert {"format": 1, "record": "drift", **alarm.as_dict()} in found
    assert {"format": 1, "record": "refused", "round": 2, "by_reason": {"span": 1}} in found
    moved = [f for f in found if f["record"] == "decision" and f["version"] == 1]
    assert [f["kind"] for f in moved] == ["canary"]
    assert moved[0]["evidence"]["verdicts"][0]["stage"] == "anchors"


# --- by hand --------------------------------------------------------------------------------------------------


def test_a_rollback_restores_a_version_to_the_bit_and_the_line_goes_on():
    world = World()
    world.round(new=True)
    world.round()
    model = world.follower.model
    first = Parameters(meta_model().tensors(), VOCABULARY)
    world.round()
    assert world.follower.current.meta_version == 1
    world.publish(world.aggregator.rollback(0, first))
    assert world.stages() == ["initial", "promoted", "rejected", "rejected", "rollback"]
    assert_follows(world.follower, world.aggregator)
    assert world.follower.current.meta_version == world.follower.head == 4
    marker = world.follower.marker
    assert marker is not None
    assert marker.current.sha256 == serving_sha256(first.tensors, first.item_ids)
    assert world.follower.current.fixed.item_ids == VOCABULARY
    assert len(model.item_ids) == 14
    assert world.aggregator.versions[1].undone_by == 4
    assert_follows(replica(compacted(world.log)), world.aggregator)
    assert_same_aggregator(recovered(compacted(world.log), world.settings), world.aggregator)
    world.round()
    world.round()
    assert world.stages()[-2:] == ["canary", "shadow"]
    assert_follows(world.follower, world.aggregator)
    assert_follows(replica(compacted(world.log)), world.aggregator)


def test_a_rollback_to_other_tensors_or_to_what_never_served_is_refused_and_changes_nothing():
    world = World()
    for _ in range(3):
        world.round()
    before = world.aggregator.line.model.tensors()
    model = meta_model()
    model.steps = 9
    model.parameters["log_weight"].data += 1
    with pytest.raises(WrongStep, match="not the tensors of version 0"):
        world.aggregator.rollback(0, Parameters(model.tensors(), VOCABULARY))
    with pytest.raises(WrongStep, match="never served"):
        world.aggregator.rollback(2, Parameters(model.tensors(), VOCABULARY))
    assert_same_tensors(world.aggregator.line.model.tensors(), before)
    assert world.stages() == ["initial", "promoted", "canary", "shadow"]
    assert_follows(world.follower, world.aggregator)


def test_an_open_version_is_promoted_by_hand_with_those_it_is_built_on():
    world = World()
    for _ in range(3):
        world.round()
    assert world.stages() == ["initial", "promoted", "canary", "shadow"]
    world.publish(world.aggregator.promote(3))
    assert world.stages() == ["initial", "promoted", "promoted by hand", "promoted by hand"]
    assert world.follower.current.meta_version == world.follower.head == 3
    assert_follows(world.follower, world.aggregator)
    assert_follows(replica(compacted(world.log)), world.aggregator)
    with pytest.raises(WrongStep, match="not open"):
        world.aggregator.promote(2)


def test_what_waits_when_somebody_decides_by_hand_is_made_again():
    world = World()
    world.round()
    assert world.aggregator.take(contribution(world.follower, 0, (10, 19)), 0.0) is None
    world.publish(world.aggregator.promote(1))
    assert world.aggregator.consumed == {0: 9, 1: 9}
    assert world.aggregator.line.refused == {"version": 1}
    assert world.aggregator.take(contribution(world.follower, 0, (10, 19)), 0.0) is None


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_log_of_another_model_of_other_moves_or_without_its_signature_is_refused():
    world = World()
    world.round()
    model = meta_model()
    other = ServingModel(*model.parts(), fingerprint="0" * 64)
    with pytest.raises(MessageRefused, match="newly trained model") as refused:
        Replica(model, other).read(world.log)
    assert refused.value.reason == "model"
    with pytest.raises(MessageRefused, match=r"meta\.moves"):
        recovered(world.log, world.settings.model_copy(update={"moves": "biases"}))
    with pytest.raises(MessageRefused, match="not signed") as refused:
        recovered(world.log, world.settings, key=b"secret")
    assert refused.value.reason == "signature"
    signed = recovered((), world.settings, key=b"secret").begin()
    assert signed is not None
    assert Marker.decode(signed.versions[-1].value or b"", b"secret").sequence == 0
    with pytest.raises(MessageRefused, match="not signed"):
        replica(signed.versions, key=b"another")
