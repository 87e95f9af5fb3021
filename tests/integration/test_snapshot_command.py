"""``coldstream snapshot`` and ``coldstream restore``, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from state.codec import Progress
from state.store import RocksReader, RocksUserStore


@pytest.fixture(scope="module")
def state(coldstream, generated, model, small, tmp_path_factory) -> Path:
    """The state that a backtest leaves behind."""
    directory = tmp_path_factory.mktemp("run") / "state"
    done = coldstream(f"backtest --config {generated}/config.yaml {small} --model {model} --state {directory}")
    assert done.code == 0, done.err
    return directory


def rows_of(path: Path) -> dict[bytes, bytes]:
    with RocksReader(path) as store:
        return {user: row.tobytes() for user, row in store.iterate()}


def test_a_run_is_snapshot_and_restored_and_answers_the_same(coldstream, state, model, tmp_path):
    with RocksReader(state / "partition-0") as store:
        progress, user = store.progress(), next(store.iterate())[0].decode()
    done = coldstream(f"snapshot --state {state} --to {tmp_path}/snap")
    assert done.code == 0, done.err
    assert f"partition 0: {progress.users:,} users, {progress.events:,} events, up to offset {progress.offset:,}" in (
        done.out
    )
    assert f"next: coldstream restore {tmp_path}/snap --state DIR" in done.out
    done = coldstream(f"restore {tmp_path}/snap --state {tmp_path}/back --model {model}")
    assert done.code == 0, done.err
    assert done.out.endswith(f"restored into {tmp_path}/back\n")
    assert rows_of(tmp_path / "back" / "partition-0") == rows_of(state / "partition-0")
    asked = [coldstream(f"query {user} --state {where} --json") for where in (state, tmp_path / "back")]
    assert asked[0].code == 0
    assert asked[0].out == asked[1].out


def test_both_commands_tell_machines_what_they_did(coldstream, state, tmp_path):
    with RocksReader(state / "partition-0") as store:
        progress, layout = store.progress(), store.layout.fingerprint
    taken = json.loads(coldstream(f"snapshot --state {state} --to {tmp_path}/snap --partition 0 --json").out)
    assert taken["url"] == f"{tmp_path}/snap"
    assert len(taken["partitions"]) == 1
    part = taken["partitions"][0]
    assert (part["partition"], part["layout"]) == (0, layout)
    assert part["progress"] == {
        "offset": progress.offset, "meta_version": progress.meta_version, "users": progress.users,
        "events": progress.events, "written_at_ms": progress.written_at_ms,
    }  # fmt: skip
    assert json.loads(coldstream(f"restore {tmp_path}/snap --state {tmp_path}/back --json").out) == taken


def test_a_snapshot_is_taken_while_somebody_writes(coldstream, tmp_path, state):
    with RocksReader(state / "partition-0") as store:
        layout = store.layout
    with RocksUserStore(tmp_path / "state" / "partition-3", layout) as writer:
        writer.write_batch([b"a"], np.zeros((1, layout.row_bytes), np.uint8), Progress(7, 0, 1, 0, 1))
        done = coldstream(f"snapshot --state {tmp_path}/state --to memory://{tmp_path}/snap")
        assert done.code == 0, done.err
    assert "partition 3: 1 users, 0 events, up to offset 7" in done.out
    done = coldstream(f"restore memory://{tmp_path}/snap --state {tmp_path}/back --partition 3")
    assert done.code == 0, done.err
    assert list(rows_of(tmp_path / "back" / "partition-3")) == [b"a"]


def refused(outcome) -> str:
    """The one line of a command that could not do its work."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1
    return outcome.err


def test_what_cannot_be_done_is_one_line_and_exit_code_2(coldstream, state, tmp_path):
    assert "nowhere is no directory" in refused(coldstream(f"snapshot --state {tmp_path}/nowhere --to {tmp_path}/s"))
    assert coldstream(f"snapshot --state {state} --to {tmp_path}/snap").code == 0
    assert "exists already" in refused(coldstream(f"snapshot --state {state} --to {tmp_path}/snap"))
    assert "partition-5 holds no store" in refused(
        coldstream(f"snapshot --state {state} --to {tmp_path}/s --partition 5")
    )
    assert "is not empty" in refused(coldstream(f"restore {tmp_path}/snap --state {state}"))
    assert "is no snapshot" in refused(coldstream(f"restore {state} --state {tmp_path}/back"))
    assert "has no partition 5: it holds 0" in refused(
        coldstream(f"restore {tmp_path}/snap --state {tmp_path}/back --partition 5")
    )
    assert not list((tmp_path / "back").glob("*"))


def test_rows_of_another_model_are_refused(coldstream, state, generated, small, tmp_path):
    assert coldstream(f"snapshot --state {state} --to {tmp_path}/snap").code == 0
    other = small.replace("learner.dim=4", "learner.dim=3")
    done = coldstream(f"train --config {generated}/config.yaml {other} --out {tmp_path}/other")
    assert done.code == 0, done.err
    said = refused(coldstream(f"restore {tmp_path}/snap --state {tmp_path}/back --model {tmp_path}/other"))
    assert "holds rows of row-v2 head=full d=4" in said
    assert f"the model in {tmp_path}/other needs row-v2 head=full d=3" in said
    assert not (tmp_path / "back").exists()
