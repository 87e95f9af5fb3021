"""``coldstream erase``, as it is typed, and what its receipt is worth."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from state.receipt import read_receipt
from state.store import RocksReader, RocksUserStore


@pytest.fixture(scope="module")
def made(coldstream, generated, model, small, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "state"
    done = coldstream(f"backtest --config {generated}/config.yaml {small} --model {model} --state {directory}")
    assert done.code == 0, done.err
    return directory


@pytest.fixture
def state(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "state"))


def users_of(state: Path) -> dict[str, int]:
    """User -> events."""
    with RocksReader(state / "partition-0") as store:
        return {user.decode(): int(store.layout.rows(row.reshape(1, -1))["events"][0]) for user, row in store.iterate()}


def test_an_erased_user_is_gone_and_the_receipt_holds(coldstream, state, tmp_path, generated):
    before = users_of(state)
    user = sorted(before)[3]
    done = coldstream(f"erase {user} --state {state} --receipt {tmp_path}/r.json")
    assert (done.code, done.err) == (0, "")
    assert re.match(rf"a row of {before[user]} events \([\d,]+ bytes\) removed from partition 0 of ", done.out)
    assert "outside its reach: the residual influence on the shared initialization" in done.out
    assert f"next: coldstream verify --state {state} --receipt {tmp_path}/r.json\n" in done.out
    assert users_of(state) == {name: events for name, events in before.items() if name != user}
    assert coldstream(f"query {user} --state {state}").code == 1
    assert f'"{user}"' not in (tmp_path / "r.json").read_text()

    held = coldstream(f"verify --state {state} --receipt {tmp_path}/r.json")
    assert held.code == 0
    assert f"unchanged since it was written; {len(before) - 1} ids of the store were searched" in held.out
    assert f"receipt {tmp_path}/r.json cannot show: the source: topics or files" in held.out
    source = f"--config {generated}/config.yaml"
    assert coldstream(f"verify --state {state} {source} --receipt {tmp_path}/r.json").code == 0
    missed = coldstream(f"verify --state {state} {source}")
    assert missed.code == 1
    assert f"missing: user '{user}' has no row, the source has {before[user]} events" in missed.out


def test_a_receipt_whose_user_is_there_again_is_a_difference(coldstream, state, made, tmp_path):
    user = sorted(users_of(state))[0]
    assert coldstream(f"erase {user} --state {state} --receipt {tmp_path}/r.json").code == 0
    done = coldstream(f"verify --state {made} --receipt {tmp_path}/r.json")
    assert done.code == 1
    assert f"erased: the user of receipt {tmp_path}/r.json is in the store: '{user}'" in done.out
    told = json.loads(coldstream(f"verify --state {made} --receipt {tmp_path}/r.json --json").out)
    assert told["receipts"][f"{tmp_path}/r.json"] == json.loads((tmp_path / "r.json").read_text())
    assert told["partitions"][0]["findings"][0]["kind"] == "erased"


def test_a_user_who_is_not_there_is_no_error_and_erasing_twice_neither(coldstream, state, tmp_path):
    before = users_of(state)
    done = coldstream(f"erase nobody-{'x' * 50} --state {state} --receipt {tmp_path}/r.json")
    assert done.code == 0
    assert done.out.startswith("nothing was found, and nothing removed, from partition 0 of ")
    assert not read_receipt(tmp_path / "r.json").partitions[0].found
    assert users_of(state) == before
    user = sorted(before)[0]
    assert coldstream(f"erase {user} --state {state}").code == 0
    again = coldstream(f"erase {user} --state {state} --json")
    assert again.code == 0
    assert [part["found"] for part in json.loads(again.out)["partitions"]] == [False]


def test_named_snapshots_lose_the_user_too(coldstream, state, tmp_path):
    user, snap = sorted(users_of(state))[2], tmp_path / "snap"
    assert coldstream(f"snapshot --state {state} --to {snap}").code == 0
    done = coldstream(f"erase {user} --state {state} --snapshot {snap} --receipt {tmp_path}/r.json")
    assert done.code == 0, done.err
    assert f"removed from partition 0 of snapshot {snap}" in done.out
    held = coldstream(f"verify --state {state} --receipt {tmp_path}/r.json")
    assert held.code == 0
    assert f"ids of partition 0 of the snapshot {snap} were searched" in held.out
    assert coldstream(f"restore {snap} --state {tmp_path}/back").code == 0
    assert user not in users_of(tmp_path / "back")


def test_a_snapshot_that_cannot_be_used_is_told_before_anything_is_erased(coldstream, state, tmp_path):
    before = users_of(state)
    done = coldstream(f"erase {sorted(before)[0]} --state {state} --snapshot {tmp_path}/none")
    assert done.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", done.err), done.err
    assert users_of(state) == before


def test_a_receipt_is_never_overwritten_and_the_user_stays(coldstream, state, tmp_path):
    before = users_of(state)
    (tmp_path / "r.json").write_text("kept")
    done = coldstream(f"erase {sorted(before)[0]} --state {state} --receipt {tmp_path}/r.json")
    assert done.code == 2
    assert "exists already, and a receipt is evidence; name another file" in done.err
    assert (tmp_path / "r.json").read_text() == "kept"
    assert users_of(state) == before


def test_a_store_that_is_in_use_is_refused_by_its_holder(coldstream, state):
    with RocksReader(state / "partition-0") as reader:
        layout = reader.layout
    with RocksUserStore(state / "partition-0", layout):
        done = coldstream(f"erase anybody --state {state}")
    assert done.code == 2
    assert "is open already in this process" in done.err
    assert "an erasure needs the store for itself" in done.err


def test_a_directory_without_a_run_is_refused(coldstream, tmp_path):
    done = coldstream(f"erase anybody --state {tmp_path}")
    assert done.code == 2
    assert "holds no partition: name the state directory of a run" in done.err
