"""Backtests from the command line: what they write, what they may not know, and what may not change it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from learner.artifact import read_artifact
from learner.baselines import BASELINES
from learner.user_state import RowLayout
from state.store import RocksUserStore
from tests.models import offset_of

RING = 32
"""The default of state.ring."""


class Run:
    """The files of one backtest."""

    def __init__(self, coldstream, directory: Path, arguments: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.json, self.parquet = directory / "result.json", directory / "predictions.parquet"
        outcome = coldstream(f"backtest {arguments} --json {self.json} --predictions {self.parquet}")
        assert outcome.code == 0, outcome.err
        self.out = outcome.out
        self.result = json.loads(self.json.read_text())
        self.table = pq.read_table(self.parquet).to_pydict()


@pytest.fixture(scope="module")
def events(generated):
    """The rows of events.csv."""
    with (generated / "events.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["event_time_ms"] for row in rows}) == len(rows), "these tests need an order without ties"
    return rows


@pytest.fixture(scope="module")
def cut(events):
    """(T, ids of the online users) by the protocol, counted here anew."""
    first = {}
    for row in sorted(events, key=lambda row: int(row["event_time_ms"])):
        first.setdefault(row["user_id"], int(row["event_time_ms"]))
    arrivals = list(first.items())
    online_from = arrivals[int(len(arrivals) * 0.7)][1]
    return online_from, {user for user, ms in arrivals if ms >= online_from}


@pytest.fixture(scope="module")
def online(events, cut):
    """The rows to stream, in time order."""
    ordered = sorted(events, key=lambda row: int(row["event_time_ms"]))
    return [row for row in ordered if row["user_id"] in cut[1]]


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """Where the rows of ``with_model`` are kept."""
    return tmp_path_factory.mktemp("state") / "state"


@pytest.fixture(scope="module")
def with_model(coldstream, generated, model, small, state, tmp_path_factory):
    """backtest --model with every output."""
    directory = tmp_path_factory.mktemp("with-model")
    files = f"--state {state} --report {directory}/report.html"
    run = Run(coldstream, directory, f"--model {model} --config {generated}/config.yaml {small} {files}")
    assert (directory / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    return run


@pytest.fixture(scope="module")
def whole(coldstream, generated, small, tmp_path_factory):
    """backtest that trains, on the same events."""
    directory = tmp_path_factory.mktemp("whole")
    arguments = f"--config {generated}/config.yaml {small} --save-model {directory}/model"
    return Run(coldstream, directory, arguments)


def auc_by_pairs(label, score):
    """Share of (1, 0) pairs that are in the right order; a tie is half a pair."""
    label, score = np.asarray(label), np.asarray(score)
    difference = score[label == 1][:, None] - score[label == 0][None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


# --- what is written


def test_the_json_has_the_promised_keys(with_model):
    result = with_model.result
    assert set(result) == {
        "protocol", "metrics", "baselines", "speed", "state", "versions", "rejects", "notes", "meta",
    }  # fmt: skip
    assert result["meta"] is None
    assert set(result["protocol"]) == {
        "offline_events", "offline_users", "online_events", "online_users", "cut_time_ms",
    }  # fmt: skip
    assert set(result["metrics"]) == {"auc", "gauc", "log_loss", "calibration_error", "by_index", "ci95"}
    assert set(result["speed"]) == {"train_s", "online_events_per_s"}
    assert set(result["state"]) == {"users", "bytes_per_user"}
    assert result["baselines"] == {}
    assert result["rejects"] == {}
    assert result["notes"] == []


def test_the_counts_are_those_of_the_protocol(with_model, events, cut, online):
    online_from, online_users = cut
    offline = [r for r in events if r["user_id"] not in online_users and int(r["event_time_ms"]) < online_from]
    assert with_model.result["protocol"] == {
        "offline_events": len(offline),
        "offline_users": len({r["user_id"] for r in offline}),
        "online_events": len(online),
        "online_users": len(online_users),
        "cut_time_ms": online_from,
    }


def test_the_predictions_file_has_the_online_events_in_time_order(with_model, online):
    table = with_model.table
    for column in ("user_id", "item_id"):
        assert table[column] == [row[column] for row in online]
    for column in ("label", "event_time_ms"):
        assert table[column] == [int(row[column]) for row in online]
    seen: dict[str, int] = {}
    for user, index in zip(table["user_id"], table["index"], strict=True):
        assert index == seen.get(user, 0)
        seen[user] = index + 1


def test_the_auc_of_the_predictions_file_is_the_reported_one(with_model):
    recomputed = auc_by_pairs(with_model.table["label"], with_model.table["probability"])
    assert with_model.result["metrics"]["auc"] == pytest.approx(recomputed, abs=1e-12)


def test_the_auc_lies_between_chance_and_the_planted_best(with_model, generated):
    best = json.loads((generated / "truth.json").read_text())["online"]
    assert best["events"] == with_model.result["protocol"]["online_events"]
    assert 0.6 < with_model.result["metrics"]["auc"] <= best["best_auc"]


def test_the_state_directory_holds_one_row_per_online_user(with_model, state, model, online, cut):
    serving = read_artifact(model).serving()
    layout = RowLayout.of(serving.first, serving.second, RING)
    with RocksUserStore(state / "partition-0", layout) as store:
        held = {user.decode(): layout.rows(row.reshape(1, -1))[0] for user, row in store.iterate()}
        offset = offset_of(store)
    assert set(held) == cut[1]
    assert with_model.result["state"] == {"users": len(held), "bytes_per_user": layout.row_bytes}
    assert {user: int(row["events"]) for user, row in held.items()} == {
        user: sum(row["user_id"] == user for row in online) for user in held
    }
    assert offset == with_model.table["offset"][-1]


# --- the same run again, in other ways


def test_training_inside_the_backtest_is_training_before_it(whole, with_model):
    assert whole.result["metrics"] == with_model.result["metrics"]
    assert whole.parquet.read_bytes() == with_model.parquet.read_bytes()


def test_the_saved_model_is_the_one_that_was_streamed(whole):
    saved = read_artifact(whole.json.parent / "model")
    assert saved.fingerprint == whole.result["versions"]["artifact"]
    assert saved.metrics["cut_time_ms"] == whole.result["protocol"]["cut_time_ms"]


def test_the_seed_decides_every_bit(coldstream, generated, small, whole, tmp_path):
    same = Run(coldstream, tmp_path / "same", f"--config {generated}/config.yaml {small} --seed 0")
    other = Run(coldstream, tmp_path / "other", f"--config {generated}/config.yaml {small} --seed 1")
    assert same.parquet.read_bytes() == whole.parquet.read_bytes()
    assert other.table["probability"] != whole.table["probability"]
    assert other.table["user_id"] == whole.table["user_id"]


def test_settings_that_a_trained_model_overrules_are_noted(coldstream, generated, model, small, with_model, tmp_path):
    run = Run(coldstream, tmp_path, f"--model {model} --config {generated}/config.yaml {small} --set learner.dim=6")
    assert run.result["metrics"] == with_model.result["metrics"]
    assert run.result["notes"] == [
        f"The learner's settings are those of the model in {model}; the ones given here were not used."
    ]


def test_baselines_are_scored_on_the_same_events(coldstream, generated, small, events, tmp_path):
    write_csv(tmp_path / "events.csv", events[:500])
    arguments = f"--config {generated}/config.yaml {small} --data {tmp_path}/events.csv"
    without = Run(coldstream, tmp_path / "without", arguments)
    run = Run(coldstream, tmp_path / "with", f"{arguments} --baselines")
    assert tuple(run.result["baselines"]) == BASELINES
    assert run.result["metrics"] == without.result["metrics"]
    for name in BASELINES:
        recomputed = auc_by_pairs(run.table["label"], run.table[name])
        assert run.result["baselines"][name]["auc"] == pytest.approx(recomputed, abs=1e-12)
        assert name in run.out


def test_score_last_scores_fewer_users_of_the_same_stream(coldstream, generated, model, small, with_model, tmp_path):
    arguments = f"--model {model} --config {generated}/config.yaml {small} --score-last 0.1"
    run, every = Run(coldstream, tmp_path, arguments), with_model.table
    arrivals = list(dict.fromkeys(every["user_id"]))
    users = run.result["protocol"]["offline_users"] + len(arrivals)
    last = set(arrivals[-(users - int(users * 0.9)) :])
    assert run.result["protocol"] == with_model.result["protocol"]
    assert run.table == {
        name: [value for value, user in zip(column, every["user_id"], strict=True) if user in last]
        for name, column in every.items()
    }
    assert run.result["metrics"]["auc"] == auc_by_pairs(run.table["label"], run.table["probability"])
    assert len(run.result["notes"]) == 1


# --- no leakage


@pytest.mark.parametrize("trained", [True, False], ids=["with the model given", "with training"])
def test_later_labels_change_no_earlier_prediction(
    trained, coldstream, generated, model, small, events, online, with_model, tmp_path
):
    first_flipped = int(len(online) * 0.8)
    flipped = {row["event_time_ms"] for row in online[first_flipped:]}
    rows = [{**row, "label": str(1 - int(row["label"]))} if row["event_time_ms"] in flipped else row for row in events]
    write_csv(tmp_path / "events.csv", rows)
    given = f"--model {model}" if trained else ""
    arguments = f"{given} --config {generated}/config.yaml {small} --data {tmp_path}/events.csv"
    run = Run(coldstream, tmp_path, arguments)
    before, after = with_model.table["probability"], run.table["probability"]
    assert after[: first_flipped + 1] == before[: first_flipped + 1]  # the first flipped event's own label comes late
    assert after[first_flipped + 1 :] != before[first_flipped + 1 :]


# --- files


def write_csv(path: Path, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def shuffled(directory, rows):
    order = np.random.default_rng(1).permutation(len(rows))
    write_csv(directory / "events.csv", [rows[k] for k in order])
    return "delimited"


def three_files(directory, rows):
    for part in range(3):
        write_csv(directory / f"events-{part}.csv", rows[part::3])
    return "delimited"


def json_lines(directory, rows):
    numbers = [{**r, "label": int(r["label"]), "event_time_ms": int(r["event_time_ms"])} for r in rows]
    (directory / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    return "jsonl"


def parquet(directory, rows):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {name: [int(v) for v in columns[name]] for name in ("label", "event_time_ms")}
    pq.write_table(pa.table(columns), directory / "events.parquet")
    return "parquet"


@pytest.mark.parametrize("write", [shuffled, three_files, json_lines, parquet])
def test_how_the_events_are_written_down_changes_nothing(write, coldstream, generated, small, events, whole, tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    kind = write(directory, events)
    arguments = f"--config {generated}/config.yaml {small} --data {directory} --set data.format={kind}"
    run = Run(coldstream, tmp_path, arguments)
    assert run.result["protocol"] == whole.result["protocol"]
    assert run.result["metrics"] == whole.result["metrics"]
    assert run.table == whole.table
