"""``coldstream backtest --meta``: the online stage from the command line, what it writes, and what it may not know."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from learner.artifact import read_artifact, read_histories, write_artifact
from learner.meta_model import MetaModel
from learner.serving import ServingModel
from state.lineage import Lineage
from state.reading.model_view import ModelView
from streams.meta.embedded import NO_ANCHORS

ROUND = 200
META = (
    f"--set meta.every_events={ROUND} --set meta.users=16 --set meta.anchors.held_out=0.2 --set meta.anchors.users=20 "
    "--set meta.anchors.query=4 --set meta.anchors.slice_events=500 --set meta.gate.min_users=2 "
    "--set meta.gate.min_stream_users=2 --set meta.gate.bootstrap_samples=100"
)
"""Rounds, anchors and a gate for a stream of some hundred events."""


class Run:
    """The files of one backtest with ``--meta``; ``alarms`` are the log's."""

    def __init__(self, coldstream, directory: Path, arguments: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.json, self.parquet = directory / "result.json", directory / "predictions.parquet"
        outcome = coldstream(f"backtest {arguments} --json {self.json} --predictions {self.parquet}")
        assert outcome.code == 0, outcome.err
        self.out, self.err = outcome.out, outcome.err
        self.result = json.loads(self.json.read_text())
        self.table = pq.read_table(self.parquet).to_pydict()

    @property
    def decisions(self):
        """Every version with its path, without the clock."""
        return [
            (v["version"], v["parent"], v["round"], v["metrics"], [(d["kind"], d["reason"]) for d in v["decisions"]])
            for v in self.result["meta"]["versions"]
        ]


@pytest.fixture(scope="module")
def base(generated, small):
    return f"--config {generated}/config.yaml {small} {META}"


@pytest.fixture(scope="module")
def guarded(coldstream, base, tmp_path_factory):
    """A model whose training has held users out."""
    directory = tmp_path_factory.mktemp("guarded") / "model"
    outcome = coldstream(f"train {base} --set meta.moves=everything --out {directory}")
    assert outcome.code == 0, outcome.err
    return directory


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where ``online`` keeps its versions and rows."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def online(coldstream, base, guarded, kept):
    """backtest --meta everything with every output."""
    files = f"--meta-dir {kept}/versions --state {kept}/state --report {kept}/report.html"
    return Run(coldstream, kept, f"{base} --model {guarded} --meta everything {files}")


@pytest.fixture(scope="module")
def plain(coldstream, base, guarded, tmp_path_factory):
    """The same model without the online stage."""
    return Run(coldstream, tmp_path_factory.mktemp("plain"), f"{base} --model {guarded}")


# --- what is written


def test_the_json_says_what_became_of_the_online_stage(online):
    meta = online.result["meta"]
    assert set(meta) == {
        "rounds", "seconds", "decisions", "versions", "forgetting", "measures", "drift", "moved", "refused", "notes",
    }  # fmt: skip
    assert meta["rounds"] == online.result["protocol"]["online_events"] // ROUND
    assert meta["decisions"]["promoted"] > 0
    assert [v["version"] for v in meta["versions"]] == list(range(len(meta["versions"])))
    assert meta["moved"]["history"] > 0
    assert meta["notes"] == []
    evidence = meta["versions"][1]["decisions"][-1]["evidence"]["verdicts"]
    assert {verdict["stage"] for verdict in evidence} <= {"anchors", "shadow", "canary"}
    assert meta["forgetting"]["versions"][0] == 0
    assert "slice 0 / warm" in meta["measures"]["log_loss"]["cohorts"]


def test_the_frozen_baseline_is_the_same_model_without_the_online_stage(online, plain):
    assert online.table["frozen"] == plain.table["probability"]
    assert online.result["baselines"]["frozen"]["auc"] == plain.result["metrics"]["auc"]
    assert online.table["user_id"] == plain.table["user_id"]
    assert "frozen" in online.out
    assert "frozen" not in plain.table
    assert plain.result["meta"] is None
    # nobody is served by another version before the third span
    assert online.table["probability"][: 2 * ROUND] == plain.table["probability"][: 2 * ROUND]
    assert online.table["probability"][2 * ROUND :] != plain.table["probability"][2 * ROUND :]


def test_the_directory_holds_a_lineage_whose_current_version_is_what_serves(online, kept, guarded, coldstream):
    lineage = Lineage(kept / "versions")
    assert [(v.number, v.record.parent, v.stage) for v in lineage.records()] == [
        (v["version"], v["parent"], v["decisions"][-1]["kind"]) for v in online.result["meta"]["versions"]
    ]
    artifact = read_artifact(guarded)
    assert lineage.version(0).record.model == artifact.fingerprint == online.result["versions"]["artifact"]
    version = lineage.tensors(lineage.current)
    model = MetaModel(artifact, read_histories(guarded).item_events)
    model.load(version.tensors, version.item_ids)
    read, view = ServingModel(*model.parts()), ModelView(kept / "state")
    assert view.meta_version == lineage.current > 0
    rows = read.item_rows(version.item_ids, {})
    served = view.items(view.places(version.item_ids))
    for name in ("psi", "base", "second_psi"):
        assert getattr(served, name).tobytes() == getattr(read.items, name)[rows].tobytes(), name
    assert view.first.initialization.tobytes() == read.first.initialization.tobytes()
    assert view.first.covariance.tobytes() == read.first.covariance.tobytes()
    listed = coldstream(f"meta list --meta {kept}/versions")
    assert listed.code == 0, listed.err
    assert all(re.search(rf"^\W*{v['version']}\b", listed.out, re.MULTILINE) for v in online.result["meta"]["versions"])


def test_the_report_is_written_too(online, kept):
    assert (kept / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


# --- what may not change it


def test_the_same_seed_gives_the_same_bits_and_training_inside_the_backtest_too(coldstream, base, online, tmp_path):
    again = Run(coldstream, tmp_path / "again", f"{base} --meta everything")
    assert again.table == online.table
    assert again.decisions == online.decisions
    other = Run(coldstream, tmp_path / "other", f"{base} --meta everything --seed 1")
    assert other.table["probability"] != online.table["probability"]


@pytest.mark.parametrize("moves", ["initialization", "biases"])
def test_less_may_move(moves, coldstream, base, guarded, online, tmp_path):
    run = Run(coldstream, tmp_path, f"{base} --model {guarded} --meta {moves}")
    assert run.result["meta"]["decisions"]["promoted"] > 0
    assert run.table["frozen"] == online.table["frozen"]
    assert run.table["probability"] != online.table["probability"]


def write_csv(path: Path, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("first", [ROUND - 1, 3 * ROUND, 3 * ROUND + 1, 710])
def test_later_labels_change_no_earlier_prediction_with_the_online_stage_on(
    first, coldstream, generated, base, guarded, online, tmp_path
):
    users = set(online.table["user_id"])
    later = set(online.table["event_time_ms"][first:])  # no two events are of one time
    with (generated / "events.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["user_id"] in users and int(row["event_time_ms"]) in later:
            row["label"] = str(1 - int(row["label"]))
    write_csv(tmp_path / "events.csv", rows)
    run = Run(coldstream, tmp_path / "run", f"{base} --model {guarded} --meta everything --data {tmp_path}/events.csv")
    assert run.table["label"][:first] == online.table["label"][:first]
    assert run.table["label"][first:] == [1 - label for label in online.table["label"][first:]]
    before, after = online.table["probability"], run.table["probability"]
    assert after[: first + 1] == before[: first + 1]  # the first flipped event's own label comes late
    assert after[first + 1 :] != before[first + 1 :]


# --- what is refused, before any work


def refused(coldstream, arguments: str) -> str:
    """The one line of an error."""
    outcome = coldstream(f"backtest {arguments}")
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    return line


def test_a_directory_that_is_in_use_is_refused_and_left_alone(coldstream, base, guarded, tmp_path):
    used = tmp_path / "versions"
    used.mkdir()
    (used / "mine").write_text("x")
    line = refused(coldstream, f"{base} --model {guarded} --meta everything --meta-dir {used}")
    assert line == (
        f"error: the directory of versions {used} is not empty: a backtest starts with no users and one version, and "
        "earlier ones may be in there; give a new directory"
    )
    assert [path.name for path in used.iterdir()] == ["mine"]


def test_a_directory_without_an_online_stage_is_refused(coldstream, base, guarded, tmp_path):
    line = refused(coldstream, f"{base} --model {guarded} --meta-dir {tmp_path}/versions")
    assert line == (
        f"error: --meta-dir {tmp_path}/versions: nothing would be written there without an online stage; "
        "add --meta everything"
    )
    assert not (tmp_path / "versions").exists()


def test_an_alarms_address_that_cannot_be_used_is_named_and_not_shown(coldstream, base, guarded):
    line = refused(
        coldstream, f"{base} --model {guarded} --meta everything --set meta.alarms.webhook=ftp://me:secret@host/hook"
    )
    assert line.startswith("error: meta.alarms.webhook: the webhook of alarms is no http or https address")
    assert "secret" not in line


def test_what_can_move_is_told_where_something_else_is_asked_for(coldstream, base, guarded):
    line = refused(coldstream, f"{base} --model {guarded} --meta all")
    assert "meta.moves" in line
    for moves in ("initialization", "biases", "everything"):
        assert moves in line


def test_a_ring_that_is_too_short_for_histories_is_named(coldstream, base, guarded):
    line = refused(coldstream, f"{base} --model {guarded} --meta everything --set state.ring=16")
    assert "set state.ring (now 16) to at least 32" in line


def test_a_segment_that_users_do_not_have_is_named(coldstream, base, guarded):
    line = refused(coldstream, f"{base} --model {guarded} --meta everything --set meta.anchors.segment=nothing")
    assert line.startswith("error: meta.anchors.segment: 'nothing' is no categorical feature of the users' catalogue")


# --- models that were trained for something else


def test_a_model_trained_without_the_online_stage_can_be_used_and_what_it_lacks_is_said(
    coldstream, base, model, tmp_path
):
    run = Run(coldstream, tmp_path, f"{base} --model {model} --meta everything --set meta.anchors.slice_events=100000")
    assert run.result["meta"]["notes"] == [NO_ANCHORS]
    assert f"note: {NO_ANCHORS}" in run.out
    assert run.result["meta"]["forgetting"]["cohorts"] == []
    stages = {verdict["stage"] for version in run.result["meta"]["versions"] for decision in version["decisions"]
              for verdict in decision["evidence"].get("verdicts", ())}  # fmt: skip
    assert stages == {"shadow", "canary"}


def test_a_model_without_histories_is_refused(coldstream, base, guarded, tmp_path):
    write_artifact(tmp_path / "old", replace(read_artifact(guarded), offline=None))
    line = refused(coldstream, f"{base} --model {tmp_path}/old --meta everything")
    assert line == (
        f"error: {tmp_path}/old was written without histories.safetensors, so the online stage has nothing to replay: "
        "train it again"
    )
    assert coldstream(f"backtest {base} --model {tmp_path}/old").code == 0  # it still streams


def test_a_model_whose_histories_are_gone_is_refused(coldstream, base, guarded, tmp_path):
    shutil.copytree(guarded, tmp_path / "torn")
    (tmp_path / "torn" / "histories.safetensors").unlink()
    line = refused(coldstream, f"{base} --model {tmp_path}/torn --meta everything")
    assert "histories.safetensors is missing, or does not match its hash" in line


# --- alarms


def test_alarms_go_to_stderr_and_leave_what_is_printed_alone(coldstream, base, guarded, plain, tmp_path):
    report = tmp_path / "report.html"
    wild = "--meta everything --set meta.rate=1e40"
    run = Run(coldstream, tmp_path, f"{base} --model {guarded} {wild} --report {report}")
    alarms = [json.loads(line) for line in run.err.splitlines()]
    told = next(alarm for alarm in alarms if alarm["kind"] == "not finite")
    assert told["event"] == "alarm: version 1 has a parameter that is not finite"
    assert told["level"] == "error"
    assert "alarm:" not in run.out
    assert "a parameter is not finite" in report.read_text()
    assert run.result["meta"]["versions"][1]["metrics"]["step_length"] == "NaN"
    assert run.table["probability"] == plain.table["probability"]  # nothing was promoted
    assert run.result["meta"]["decisions"]["promoted"] == 0


def test_a_quiet_run_says_nothing_on_stderr(plain):
    assert plain.err == ""
    assert np.isfinite(plain.table["probability"]).all()
