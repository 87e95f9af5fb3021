"""``coldstream query`` on the state of a small run, as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.loading import load_settings
from configs.settings import StateSettings
from learner.artifact import read_artifact
from learner.interactions import Interactions
from state.reading.model_view import FILE
from state.store import RocksReader
from streams.processor import Processor
from streams.replay import rocks_stores
from streams.sources import load_catalogues
from tests.integration.conftest import SMALL

BACKTEST = "backtest --config {generated}/config.yaml " + SMALL + " --model {model} --state {state}"


@pytest.fixture(scope="module")
def state(coldstream, generated, model, tmp_path_factory):
    """The state directory of a backtest."""
    directory = tmp_path_factory.mktemp("kept") / "state"
    outcome = coldstream(BACKTEST.format(generated=generated, model=model, state=directory))
    assert outcome.code == 0, outcome.err
    return directory


@pytest.fixture(scope="module")
def users(state):
    """Events by user id, as the rows have them."""
    with RocksReader(state / "partition-0") as store:
        layout = store.layout
        return {user.decode(): int(layout.rows(row.reshape(1, -1))[0]["events"]) for user, row in store.iterate()}


@pytest.fixture(scope="module")
def light(users):
    """A user all of whose events are in the ring."""
    return max((user for user, events in users.items() if events <= 32), key=users.__getitem__)


@pytest.fixture(scope="module")
def heavy(users):
    """A user with more events than the ring holds."""
    return max(users, key=users.__getitem__)


@pytest.fixture
def query(coldstream, state):
    """Runs a query on the state; returns its output."""

    def run(line, code=0):
        outcome = coldstream(f"query {line} --state {state}")
        assert outcome.code == code, outcome.err
        return outcome.out

    return run


def test_a_run_leaves_the_model_beside_the_rows(state):
    assert sorted(path.name for path in state.iterdir()) == [FILE, "partition-0"]


def test_scores_are_those_of_the_stream_with_the_runs_own_model(query, state, generated, model, light, tmp_path):
    settings = load_settings(f"{generated}/config.yaml")
    serving = read_artifact(model).serving(*load_catalogues(settings.data))
    copy = tmp_path / "state"
    shutil.copytree(state, copy)
    items = [f"i{k}" for k in range(12)] + ["never-seen"]
    with Processor(serving, rocks_stores(copy, StateSettings()), StateSettings()) as processor:
        for user in (light, "nobody"):
            records = Interactions.from_columns([user] * 13, items, [0] * 13, [0] * 13, offsets=10**9 + np.arange(13))
            said = processor.predict(0, records)
            shown = json.loads(query(f"{user} --json --items {','.join(items)}"))["scores"]
            assert [score["item_id"] for score in shown] == items
            assert np.array([s["probability"] for s in shown], np.float32).tobytes() == said.probability.tobytes()
            assert np.array([s["logit"] for s in shown], np.float32).tobytes() == said.logit.tobytes()


def test_text_is_a_few_aligned_lines(query, light, users):
    lines = query(f"{light} --items i1,never-seen --top 3").splitlines()
    assert lines[0].startswith(f"user {light}: {users[light]} events from 20")
    assert lines[1].startswith("last offset ")
    assert [line.split()[0] for line in lines[2:6]] == ["adaptive", "variance", "second", "latest"]
    assert any("from the shared initialization" in line and "deviations of the prior" in line for line in lines)
    (title,) = (line for line in lines if line.startswith("the latest"))
    assert title.endswith("(replayed from the start: what each did when it came)")
    header = lines.index(title) + 1
    assert lines[header].split() == ["moved", "event", "item", "label", "grade", "time", "probability", "method"]
    moved = [float(line.split()[0]) for line in lines[header + 1 : header + 1 + min(10, users[light])]]
    assert moved == sorted(moved, reverse=True)
    asked = next(k for k, line in enumerate(lines) if line.startswith("asked for"))
    assert lines[asked + 2].startswith("never-seen")
    assert lines[asked + 2].endswith("unknown item")
    best = next(k for k, line in enumerate(lines) if line.startswith("best for this user"))
    chances = [float(line.split()[1]) for line in lines[best + 1 :]]
    assert len(chances) == 3
    assert chances == sorted(chances, reverse=True)


def test_json_is_complete(query, heavy, users):
    shown = json.loads(query(f"{heavy} --json --top 2"))
    assert list(shown) == [
        "user_id", "known", "partition", "at", "events", "first_event_ms", "last_event_ms", "last_offset", "ledger",
        "meta_version", "guarded", "expired", "mean", "variance", "covariance", "second_mean", "second_covariance",
        "recent_labels", "distance", "explanation", "scores", "top", "model", "stream_offset",
    ]  # fmt: skip
    assert (shown["user_id"], shown["known"], shown["partition"], shown["events"]) == (heavy, True, 0, users[heavy])
    assert shown["at"] == {"asked": "now", "source": "the live row", "exact": True, "note": "", "moved": None}
    assert (len(shown["mean"]), len(shown["covariance"]), len(shown["variance"])) == (4, 10, 4)
    assert shown["explanation"]["replayed_from"] is None
    events = shown["explanation"]["events"]
    assert [event["number"] for event in events] == list(range(users[heavy] - 32, users[heavy]))
    assert all(event["item"].startswith("i") and event["method"] == "influence" for event in events)
    assert shown["model"]["items"] >= 60
    assert [score["known"] for score in shown["top"]] == [True, True]


def test_the_past_and_what_changed_since(query, light, users):
    now = json.loads(query(f"{light} --json"))
    middle = now["explanation"]["events"][users[light] // 2]
    then = json.loads(query(f"{light} --json --at {middle['latest_ms']}ms"))
    assert (then["events"], then["at"]["exact"]) == (middle["number"] + 1, True)
    assert then["explanation"]["events"] == now["explanation"]["events"][: then["events"]]
    change = json.loads(query(f"{light} --json --diff {middle['latest_ms']}ms now"))
    assert (change["events_before"], change["events_after"]) == (then["events"], now["events"])
    np.testing.assert_allclose(change["change"]["mean"], np.subtract(now["mean"], then["mean"]))
    text = query(f"{light} --diff {middle['latest_ms']}ms now")
    assert text.startswith(f"user {light} from {middle['latest_ms']}ms to now\n")
    for title, moved in (("rose most", change["risen"]), ("fell most", change["fallen"])):
        assert (title in text) == bool(moved)
        assert all(f"{item['item_id']} " in text for item in moved)
    assert change["risen"] or change["fallen"]


def test_a_point_that_cannot_be_told_is_one_line_and_code_2(coldstream, state, heavy):
    outcome = coldstream(f"query {heavy} --state {state} --at 2026-13-77")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: '2026-13-77' is no point of a stream")
    outcome = coldstream(f"query {heavy} --state {state} --at 1")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert "cannot be told; known: offsets" in outcome.err


def test_unknown_users_are_code_1_unless_items_are_asked_for(query):
    assert query("nobody", code=1).startswith("unknown user 'nobody': no event was learned")
    assert json.loads(query("nobody --json", code=1))["known"] is False
    assert "best for this user" in query("nobody --top 2")


def test_snapshots_as_the_command_takes_them_answer_for_their_offsets(coldstream, query, state, light, tmp_path):
    outcome = coldstream(f"snapshot --state {state} --to {tmp_path}/snapshots/first")
    assert outcome.code == 0, outcome.err
    now = json.loads(query(f"{light} --json"))
    then = json.loads(query(f"{light} --json --at {now['stream_offset']} --snapshots {tmp_path}/snapshots"))
    assert (then["events"], then["at"]["exact"], then["ledger"]) == (now["events"], True, now["ledger"])
    (tmp_path / "other").mkdir()
    moved = coldstream(f"restore {tmp_path}/snapshots/first --state {tmp_path}/other/state")
    assert moved.code == 0, moved.err
    restored = coldstream(f"query {light} --state {tmp_path}/other/state --json")
    assert json.loads(restored.out) == now


def test_it_runs_from_the_shell_beside_the_runs_writer(state, light, users, tmp_path):
    copy = tmp_path / "state"
    shutil.copytree(state, copy)
    with RocksReader(copy / "partition-0") as reader:
        layout = reader.layout
    with rocks_stores(copy, StateSettings())(0, layout):
        done = subprocess.run(
            [sys.executable, "-m", "streams.cli", "query", light, "--state", str(copy)],
            capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONWARNINGS": "error"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"user {light}: {users[light]} events")


def test_a_run_without_a_state_directory_leaves_nothing(coldstream, generated, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = coldstream(f"backtest --config {generated}/config.yaml {SMALL} --model {model}")
    assert outcome.code == 0, outcome.err
    assert list(tmp_path.iterdir()) == []
