"""``coldstream verify``, as it is typed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from state.codec import Progress
from state.store import RocksReader, RocksUserStore


@pytest.fixture(scope="module")
def made(coldstream, generated, model, small, tmp_path_factory) -> Path:
    """The state that a backtest leaves behind."""
    directory = tmp_path_factory.mktemp("run") / "state"
    done = coldstream(f"backtest --config {generated}/config.yaml {small} --model {model} --state {directory}")
    assert done.code == 0, done.err
    return directory


@pytest.fixture
def state(made, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(made, tmp_path / "state"))


def store_of(state: Path) -> RocksUserStore:
    with RocksReader(state / "partition-0") as reader:
        layout = reader.layout
    return RocksUserStore(state / "partition-0", layout)


def totals(state: Path) -> Progress:
    with RocksReader(state / "partition-0") as store:
        progress = store.progress()
    assert progress is not None
    return progress


def test_a_run_is_sound_by_itself_and_against_its_events(coldstream, made, generated):
    progress = totals(made)
    line = f"partition 0: sound, {progress.users} users, {progress.events} events, up to offset {progress.offset:,}\n"
    alone = coldstream(f"verify --state {made}")
    assert (alone.code, alone.err) == (0, "")
    assert alone.out == f"{line}rows were checked by themselves: checksums, owners, offsets, versions and totals\n"
    against = coldstream(f"verify --state {made} --config {generated}/config.yaml")
    assert (against.code, against.err) == (0, "")
    assert against.out == (
        f"{line}every count and ledger was compared with {progress.events} events of the source up to that offset\n"
    )


def test_machines_are_told_the_same(coldstream, made, generated):
    progress = totals(made)
    told = json.loads(coldstream(f"verify --state {made} --config {generated}/config.yaml --json").out)
    assert told == {
        "sound": True,
        "partitions": [
            {
                "partition": 0, "sound": True, "users": progress.users, "events": progress.events,
                "offset": progress.offset, "damaged": 0, "source_events": progress.events, "found": 0, "first": None,
                "findings": [], "notes": [],
            }
        ],
        "snapshots": [],
        "receipts": {},
    }  # fmt: skip


def test_a_row_that_was_set_back_is_named_with_the_offset_where_it_left_the_source(coldstream, state, generated):
    with store_of(state) as store:
        user, row = max(store.iterate(), key=lambda each: store.layout.rows(each[1].reshape(1, -1))["events"][0])
        events = int(store.layout.rows(row.reshape(1, -1))["events"][0])
        slab = row.reshape(1, -1).copy()
        store.layout.rows(slab)["ledger"] = 0
        store.layout.rows(slab)["events"] = 0
        store.write_batch([user], slab, None)
    done = coldstream(f"verify --state {state} --config {generated}/config.yaml")
    assert done.code == 1
    assert "partition 0: NOT SOUND" in done.out
    named = re.search(rf"differs: user '{user.decode()}' has 0 events, the source {events}; offset (\d+): ", done.out)
    assert named, done.out
    assert f"first to differ: user '{user.decode()}', offset {named[1]}\n" in done.out


def test_a_missing_and_a_damaged_row_are_told_and_the_exit_code_is_1(coldstream, state):
    with store_of(state) as store:
        users = [user for user, _ in store.iterate()]
        store.write_batch([], np.zeros((0, store.layout.row_bytes), np.uint8), None, deleted=users[:1])
        store._open_db().put(b"u" + users[1], b"rubbish")
    done = coldstream(f"verify --state {state}")
    assert done.code == 1
    assert f"damaged: the row of user '{users[1].decode()}' has 7 bytes where" in done.out
    assert "note: totals were not checked: 1 rows are damaged" in done.out
    told = json.loads(coldstream(f"verify --state {state} --partition 0 --json").out)
    assert (told["sound"], told["partitions"][0]["damaged"]) == (False, 1)


def test_another_share_of_users_than_the_runs_is_a_difference(coldstream, made, generated):
    done = coldstream(f"verify --state {made} --config {generated}/config.yaml --offline-fraction 0.5")
    assert done.code == 1
    assert done.out.count("missing: user") == 10
    assert re.search(r"… \d+ more, see --json", done.out)


def test_a_run_with_expiry_agrees_under_its_own_setting_only(coldstream, generated, model, small, tmp_path):
    source, expires = f"--config {generated}/config.yaml", "--set state.expire_after_days=0.5"
    done = coldstream(f"backtest {source} {small} {expires} --model {model} --state {tmp_path}/s")
    assert done.code == 0, done.err
    assert coldstream(f"verify --state {tmp_path}/s {source} {expires}").code == 0
    refused = coldstream(f"verify --state {tmp_path}/s {source}")
    assert refused.code == 2
    assert refused.err.endswith("was run with state.expire_after_days set: verify it with the settings of that run\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--state {tmp}/none", "none is no directory: name the state directory of a run"),
        ("--state {tmp}", "holds no partition: name the state directory of a run"),
        ("--state {made} --partition 5", "partition-5 holds no store"),
        ("--state {made} --partition 5 --config demo", "a backtest streams its events to partition 0, not to 5"),
        ("--state {made} --offline-fraction 0.7", "data.paths is empty"),
        ("--state {made} --receipt {tmp}/none.json", "cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_exit_code_2(coldstream, made, tmp_path, line, says):
    done = coldstream("verify " + line.format(tmp=tmp_path, made=made))
    assert done.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", done.err), done.err
    assert says in done.err


def test_a_damaged_progress_cannot_be_checked(coldstream, state):
    with store_of(state) as store:
        store._open_db().put(b"mprogress", b"rubbish of some length that is no progress record at all")
    done = coldstream(f"verify --state {state}")
    assert done.code == 2
    assert "progress record" in done.err
