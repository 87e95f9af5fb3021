"""Reading one user beside a live writer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from learner.user_state import RowLayout
from state.codec import Progress
from state.exceptions import StoreUnreadable
from state.query import query_user
from state.store import RocksUserStore
from streams.cli import app


@pytest.fixture
def store(tmp_path):
    layout = RowLayout("full", 2, 0, 4)
    slab = np.zeros((1, layout.row_bytes), np.uint8)
    row = layout.rows(slab)
    row["events"], row["last_offset"], row["first_time_ms"], row["last_time_ms"] = 3, 9, 1_000, 3_000
    row["ledger"], row["meta_version"] = 255, 2
    row["mean"], row["covariance"] = [0.5, -1.0], [0.3, 0.1, 0.2]
    row["ring"][0, :3] = [1 << 23, 0, 1 << 23]
    with RocksUserStore(tmp_path / "partition-0", layout) as store:
        store.write_batch([b"ann"], slab, Progress(9, 2))
        yield tmp_path


def test_a_row_is_read_while_its_writer_is_open(store):
    report = query_user(store / "partition-0", "ann")
    assert report.as_dict() == {
        "user_id": "ann",
        "events": 3,
        "first_event_ms": 1_000,
        "last_event_ms": 3_000,
        "last_offset": 9,
        "ledger": "00000000000000ff",
        "meta_version": 2,
        "guarded": 0,
        "mean": (0.5, -1.0),
        "variance": pytest.approx((0.3, 0.2)),
        "recent_labels": (1, 0, 1),
    }


def test_an_unknown_user_is_said_to_be_unknown_and_not_created(store):
    assert query_user(store / "partition-0", "bob") is None
    result = CliRunner().invoke(app, ["query", "bob", "--state", str(store)])
    assert result.exit_code == 1
    assert "unknown user 'bob'" in result.output
    assert query_user(store / "partition-0", "bob") is None


def test_the_command_prints_the_row_as_text_and_as_json(store):
    text = CliRunner().invoke(app, ["query", "ann", "--state", str(store)]).output
    assert "user ann: 3 events from 1970-01-01 00:00:01 UTC to 1970-01-01 00:00:03 UTC" in text
    assert "adaptive part +0.500 -1.000" in text
    shown = json.loads(CliRunner().invoke(app, ["query", "ann", "--state", str(store), "--json"]).output)
    assert (shown["events"], shown["recent_labels"]) == (3, [1, 0, 1])


def test_a_directory_without_a_store_is_an_error(tmp_path):
    with pytest.raises(StoreUnreadable, match="holds no store"):
        query_user(tmp_path, "ann")


def test_a_damaged_store_is_an_error_that_names_it(store, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    (copy / "CURRENT").write_text("MANIFEST-999999\n")
    with pytest.raises(StoreUnreadable, match=r"copy.* cannot be read: .*run again"):
        query_user(copy, "ann")
