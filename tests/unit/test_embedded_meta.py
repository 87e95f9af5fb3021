"""The online stage in one process: what may not change it, what it may not know, and what it leaves behind."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from structlog.testing import capture_logs

from configs.exceptions import ColdstreamError, SettingsError
from configs.settings import StateSettings
from learner.anchors import held_out
from learner.artifact import Artifact
from learner.drift import DriftAlarm
from learner.meta_model import MetaModel
from learner.metrics import event_index, event_log_loss
from learner.serving import ServingModel
from learner.user_hash import user_crcs
from state.lineage import Lineage
from streams.meta import embedded as module
from streams.meta.contributor import Contributor
from streams.meta.embedded import NO_ANCHORS, EmbeddedMeta
from streams.meta.result import MetaResult
from streams.processor import Processor
from tests.online import (
    CATALOGUE,
    LIMITS,
    TRAINING,
    USERS,
    gradient_of,
    meta_settings,
    offline_of,
    run_settings,
    taste_events,
    trained,
)
from tests.versions import Kept

EVENTS, ROUND = 1_000, 100


def stream():
    """25 new users, and three items that training did not know."""
    return taste_events(range(100, 125), 40, seed=11, items=15)


@dataclass
class Run:
    """What a run left."""

    probability: np.ndarray
    result: MetaResult
    current: ServingModel
    rows: dict[bytes, bytes]
    versions_of_rows: set[int]


def run(events=None, cuts=(), *, artifact: Artifact | None = None, seed=None, **changed) -> Run:
    artifact, opened, events = artifact or trained(), Kept(), stream() if events is None else events
    settings = run_settings(meta_settings(**changed))
    if seed is not None:
        settings = settings.model_copy(update={"training": TRAINING.model_copy(update={"seed": seed})})
    serving = artifact.serving(USERS, CATALOGUE)
    with (
        Processor(serving, opened, StateSettings(ring=32), limits=LIMITS, rebase=settings.meta.rebase) as work,
        EmbeddedMeta(artifact, offline_of(artifact), serving, work, settings, USERS, partition=0) as online,
    ):
        found = [
            online.process(events.take(slice(first, last)).pruned()).probability
            for first, last in pairwise([0, *sorted({*cuts, len(events)})])
        ]
        rows = opened.rows()
        slab = np.frombuffer(b"".join(rows.values()), np.uint8).reshape(len(rows), work.layout.row_bytes)
        stand = set(work.layout.rows(slab)["meta_version"].tolist())
        return Run(np.concatenate(found), online.result(), online.current, rows, stand)


@pytest.fixture(scope="module")
def once():
    return run()


def told(run: Run):
    """Every decision, without the clock."""
    return [
        (v.number, v.record.parent, v.record.round, dict(v.record.metrics), [(d.kind, d.reason) for d in v.decisions])
        for v in run.result.versions
    ]


# --- what it does


def test_versions_come_about_and_serve(once):
    assert once.result.rounds == EVENTS // ROUND
    assert once.result.decided("promoted") > 0
    assert once.current.meta_version == max(v.number for v in once.result.versions if v.stage == "promoted")
    assert [v.number for v in once.result.versions] == list(range(len(once.result.versions)))
    assert once.result.moved["history"] > 0
    assert once.result.moved["ring"] == once.result.moved["closed"] == 0
    assert once.result.notes == ()
    assert once.result.seconds > 0
    assert max(once.versions_of_rows) <= max(v.number for v in once.result.versions)
    frozen = frozen_run(stream())
    assert not np.array_equal(once.probability, frozen)
    # version 1 is a shadow in the second span, and a canary serves some in the third
    np.testing.assert_array_equal(once.probability[: 2 * ROUND], frozen[: 2 * ROUND])


def frozen_run(events):
    with Processor(trained().serving(USERS, CATALOGUE), Kept(), StateSettings(ring=32)) as work:
        return work.process(0, events).probability


def test_the_first_change_of_any_prediction_comes_with_the_first_version_that_serves():
    at_once, events = run(gate={"enabled": False}), stream()
    frozen = frozen_run(events)
    np.testing.assert_array_equal(at_once.probability[:ROUND], frozen[:ROUND])
    assert at_once.probability[ROUND] != frozen[ROUND]


def test_spans_follow_each_other_without_gaps_or_overlaps(once):
    spans = [span for v in once.result.versions[1:] for span in v.record.spans]
    assert [(s.first, s.last) for s in spans] == [(k, k + ROUND - 1) for k in range(0, EVENTS, ROUND)][: len(spans)]


def test_items_of_the_stream_enter_the_vocabulary(once):
    assert set(once.current.fixed.item_ids[-3:]) == {"i12", "i13", "i14"}
    assert len(trained().fixed.item_ids) == 12


def test_the_result_is_ready_for_json(once):
    found = json.loads(json.dumps(once.result.as_dict(), allow_nan=False))
    assert set(found) == {
        "rounds", "seconds", "decisions", "versions", "forgetting", "measures", "drift", "moved", "refused", "notes",
    }  # fmt: skip
    assert found["decisions"]["promoted"] == once.result.decided("promoted")
    assert [v["version"] for v in found["versions"]] == [v.number for v in once.result.versions]
    assert found["versions"][0]["settings"] == {}


def test_an_open_version_knows_the_items_of_the_span_that_it_is_judged_on(monkeypatch):
    seen, plain = [], Contributor.findings

    def findings(self, candidate, current, *more):
        seen.append((set(candidate.fixed.item_ids) | set(candidate.met_items), set(self._seen.items)))
        return plain(self, candidate, current, *more)

    monkeypatch.setattr(Contributor, "findings", findings)
    events = taste_events(range(100, 125), 40, seed=11, items=40)  # a new item in every span
    run(events)
    assert len(seen) > 5
    assert all(of_span <= known for known, of_span in seen)


# --- what may not change it


def test_how_the_stream_comes_in_changes_no_bit(once):
    for cuts in (range(7, EVENTS, 7), (99, 100, 101, 250, 999)):
        again = run(cuts=cuts)
        assert again.probability.tobytes() == once.probability.tobytes()
        assert again.rows == once.rows
        assert told(again) == told(once)
        assert again.current.fixed.item_ids == once.current.fixed.item_ids


def test_a_version_knows_no_item_that_came_after_it_was_made(tmp_path):
    """Not even by its name, though the batch has it."""
    events = taste_events(range(100, 125), 40, seed=11, items=40)
    run(events.take(slice(0, 200)), directory=tmp_path / "versions")
    came = {events.item_ids[k] for k in events.item[:ROUND].tolist()}
    later = {events.item_ids[k] for k in events.item[ROUND : 2 * ROUND].tolist()} - came - set(trained().fixed.item_ids)
    assert later
    assert set(Lineage(tmp_path / "versions").tensors(1).item_ids) == {*trained().fixed.item_ids, *came}


def test_the_seed_decides_every_bit(once):
    same, other = run(seed=TRAINING.seed), run(seed=8)
    assert same.probability.tobytes() == once.probability.tobytes()
    assert told(same) == told(once)
    assert other.probability.tobytes() != once.probability.tobytes()


@pytest.mark.parametrize("rebase", ["history", "ring", "closed"])
@pytest.mark.parametrize("moves", ["initialization", "biases", "everything"])
def test_every_way_of_moving_is_repeatable(moves, rebase):
    one, other = (run(moves=moves, rebase=rebase, gate={"canary_share": 0.3}) for _ in range(2))
    assert one.probability.tobytes() == other.probability.tobytes()
    assert np.isfinite(one.probability).all()
    assert one.result.moved[{"history": "history", "ring": "ring", "closed": "closed"}[rebase]] > 0


# --- what it may not know


@pytest.mark.parametrize("enabled", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("first", [0, 99, 100, 101, 199, 300, 555, 700])
def test_later_labels_change_no_earlier_prediction(first, enabled, once):
    plain = once if enabled else run(gate={"enabled": False})
    events = stream()
    label = events.label.copy()
    label[first:] = 1 - label[first:]
    flipped = run(replace(events, label=label), gate={"enabled": enabled})
    before = slice(0, first + 1)  # the first flipped event's own label comes late
    assert flipped.probability[before].tobytes() == plain.probability[before].tobytes()
    assert not np.array_equal(flipped.probability[first + 1 :], plain.probability[first + 1 :])


def test_labels_of_held_out_users_change_only_their_own_predictions_while_nobody_judges():
    """With the gate off: it is the anchors that hear of them."""
    events = stream()
    out = held_out(user_crcs([u.encode() for u in events.user_ids]), 0.25)[events.user]
    assert 100 < out.sum() < 500
    poisoned = replace(events, label=np.where(out, 1 - events.label, events.label).astype(np.int8))
    plain, other = (run(e, gate={"enabled": False}, kl_weight=0.4) for e in (events, poisoned))
    assert plain.probability[~out].tobytes() == other.probability[~out].tobytes()
    assert not np.array_equal(plain.probability[out], other.probability[out])


# --- what it leaves on disk


def test_the_lineage_on_disk_has_the_tensors_of_the_version_that_serves(tmp_path):
    found = run(directory=tmp_path / "versions", keep_versions=2)
    lineage = Lineage(tmp_path / "versions")
    assert lineage.current == found.current.meta_version > 0
    kept = lineage.tensors(lineage.current)
    model = MetaModel(trained(), offline_of(trained()).item_events)
    model.load(kept.tensors, kept.item_ids)
    fixed, first, second = model.parts()
    read = ServingModel(fixed, first, second, users=USERS, items=CATALOGUE)
    served = found.current
    count = len(fixed.item_ids)
    assert fixed.item_ids == served.fixed.item_ids
    for name in ("psi", "base", "second_psi"):
        assert getattr(read.items, name)[:count].tobytes() == getattr(served.items, name)[:count].tobytes(), name
    assert first.initialization.tobytes() == served.first.initialization.tobytes()
    assert first.covariance.tobytes() == served.first.covariance.tobytes()
    assert second.covariance.tobytes() == served.second.covariance.tobytes()
    assert fixed.user_feature_weights.tobytes() == served.fixed.user_feature_weights.tobytes()
    assert [(v.number, v.stage, v.record.parent) for v in lineage.records()] == [
        (v.number, v.stage, v.record.parent) for v in found.result.versions
    ]
    files = {int(p.stem.split("-")[1]) for p in (tmp_path / "versions").glob("version-*.safetensors")}
    assert found.current.meta_version in files
    assert 0 not in files  # pruned


def test_a_lineage_changes_no_bit(once, tmp_path):
    assert run(directory=tmp_path / "versions").probability.tobytes() == once.probability.tobytes()


# --- alarms, and what cannot be used


def test_alarms_are_logged():
    with capture_logs() as logs:
        found = run(rate=1e40)
    alarm = next(entry for entry in logs if entry["kind"] == "not finite")
    assert alarm["event"] == "alarm: version 1 has a parameter that is not finite"
    assert found.result.decided("rejected") > 0
    assert found.current.meta_version == 0
    assert found.probability.tobytes() == frozen_run(stream()).tobytes()


@pytest.mark.parametrize("broken", ["drift of all", "drift of warm users"])
def test_where_tastes_have_moved_older_anchors_are_retired(broken, monkeypatch):
    channel = "warm" if "warm" in broken else "all"

    class Watch:
        def __init__(self):
            self.events = 0

        def add(self, losses, index):
            assert len(losses) == len(index)
            self.events += len(losses)
            return [DriftAlarm(channel, "adwin", 400, 0.5, 0.75)] if self.events == 400 else []

    monkeypatch.setattr(module, "DriftWatch", Watch)
    with capture_logs() as logs:
        found = run(anchors={"slice_events": 10_000})
    (told,) = [entry for entry in logs if entry["kind"] == "drift"]
    assert told["event"] == f"alarm: log-loss of {channel} users rose from 0.5000 to 0.7500"
    assert [alarm.channel for alarm in found.result.drift] == [channel]
    last = found.result.matrix.as_dict()["log_loss"]["adapted"][-1]
    assert all(value is None for value in last) == (channel == "warm")
    assert found.result.decided("promoted") > 0


def test_the_drift_detectors_hear_every_event_with_its_loss_and_index(monkeypatch):
    heard = []

    class Watch:
        def add(self, losses, index):
            heard.append((losses, index))
            return []

    monkeypatch.setattr(module, "DriftWatch", Watch)
    found, events = run(cuts=(150,)), stream()
    np.testing.assert_array_equal(np.concatenate([index for _, index in heard]), event_index(events.user))
    np.testing.assert_array_equal(
        np.concatenate([losses for losses, _ in heard]), event_log_loss(events.label, found.probability)
    )


def test_a_model_trained_without_held_out_users_learns_blindly_and_says_so():
    found = run(artifact=trained(held_out=0.0), anchors={"slice_events": 10_000})
    assert found.result.notes == (NO_ANCHORS,)
    assert found.result.decided("promoted") > 0
    stages = {v["stage"] for version in found.result.versions[1:] for d in version.decisions
              for v in d.evidence.get("verdicts", ())}  # fmt: skip
    assert stages == {"shadow", "canary"}  # no anchors
    assert found.result.matrix.columns == ()


def test_anchors_come_with_the_first_slice_of_the_stream():
    found = run(artifact=trained(held_out=0.0), anchors={"slice_events": 250})
    assert {column.slice for column in found.result.matrix.columns} >= {1}


def threads():
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("address", ["ftp://example.org/hook", "nonsense", "http://"])
def test_an_alarms_address_that_cannot_be_used_is_named(address):
    with pytest.raises(ColdstreamError, match=r"^meta\.alarms\.webhook: the webhook of alarms is no http or https"):
        run(alarms={"webhook": address})


def test_a_segment_that_users_do_not_have_is_named_with_the_nearest():
    with pytest.raises(SettingsError) as error:
        run(anchors={"segment": "sides"}, alarms={"webhook": "http://127.0.0.1:9/"})
    assert str(error.value) == (
        "meta.anchors.segment: 'sides' is no categorical feature of the users' catalogue, nearest: 'side'; "
        "there are: side"
    )
    assert "alarms" not in threads()  # nothing is left running


def test_a_segments_values_are_cohorts():
    found = run(anchors={"segment": "side", "slice_events": 500, "users": 50})
    assert {column.kind for column in found.result.matrix.columns} >= {"segment=a", "segment=b"}


def test_a_directory_that_has_versions_already_is_refused(tmp_path):
    run(stream().take(slice(0, 100)), directory=tmp_path / "versions")
    with pytest.raises(ColdstreamError, match="version 0 cannot be added"):
        run(directory=tmp_path / "versions", alarms={"webhook": "http://127.0.0.1:9/"})
    assert "alarms" not in threads()


def test_gradients_that_are_refused_are_in_the_result(monkeypatch):
    monkeypatch.setattr(
        Contributor, "gradient", lambda self, model, task, *more: gradient_of(model, task.version, np.nan)
    )
    found = run(stream().take(slice(0, 300)))
    assert found.result.refused == {"not finite": 3}
    assert found.result.as_dict()["refused"] == {"not finite": 3}
    assert [v.number for v in found.result.versions] == [0]


def test_of_no_events_nothing_comes():
    found = run(stream().take(slice(0, 0)), cuts=())
    assert len(found.probability) == 0
    assert (found.result.rounds, len(found.result.versions)) == (0, 1)
