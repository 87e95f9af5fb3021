"""Users with ids that look like paths, keys, commands or each other, through the whole path of the stream."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.user_state import RowLayout
from state import codec
from state.codec import Progress
from state.query import StateReader
from state.rocksdb import StoreMemory
from state.store import RocksReader, RocksUserStore
from streams.processor import Processor
from tests.models import random_stream, small_model

HOSTILE = [
    "", "\0", "\0\0", "a", "a\0", "a\0b", "aa", "../../etc/passwd", "/etc/passwd", "..", ".", "CURRENT", "LOCK",
    "000004.log", "~", "$(reboot)", "%s%n", "\n", "\r\nerror: forged", "\x1b[2J", "\u202etxt.exe", "مستخدم", "😀",
    "\U0001f469\u200d\U0001f467", "é", "e\u0301", "progress", "mprogress", "uprogress", "layout", "mlayout",
    "restoring", "mrestoring", "u", "m", "v", "\U0010ffff", "x" * 65_536, "x" * 65_535, "x" * 65_535 + "y",
]  # fmt: skip
ROCKSDB_FILES = re.compile(
    r"CURRENT|IDENTITY|LOCK|LOG(\.old\.\d+)?|MANIFEST-\d+|OPTIONS-\d+|\d+\.(log|sst)|rocksdict-config\.json"
)
KIND, RING = "full", 4
LAYOUT = RowLayout(KIND, 5, 4, RING)
STORED_ONLY = ("checksum", "owner")
"""Fields that depend on the id"""


def renamed(stream: Interactions, ids: list[str]) -> Interactions:
    """The same events of other users."""
    names = tuple(ids[int(user[1:])] for user in stream.user_ids)
    return Interactions(
        names, stream.item_ids, stream.user, stream.item, stream.label, stream.value, stream.event_time_ms,
        stream.offset, stream.user_features,
    )  # fmt: skip


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """The directories of two states with the same events: of hostile ids, and of neutral ones."""
    stream = random_stream(1_200, len(HOSTILE), seed=9)
    root = tmp_path_factory.mktemp("ids")
    neutral = [f"user-{k:03}" for k in range(len(HOSTILE))]
    for name, ids in (("hostile", HOSTILE), ("neutral", neutral)):
        memory = StoreMemory(1 << 20, 1 << 10)

        def open_store(partition: int, layout: RowLayout, place=root / name, memory=memory) -> RocksUserStore:
            return RocksUserStore(place / f"partition-{partition}", layout, memory)

        with Processor(small_model(KIND), open_store, StateSettings(commit_events=50, ring=RING)) as work:
            work.process(0, renamed(stream, ids))
    return root, neutral


def without_id(row: np.ndarray) -> bytes:
    rows = LAYOUT.rows(row.reshape(1, -1).copy())
    for field in STORED_ONLY:
        rows[field] = 0
    return rows.tobytes()


def test_every_users_row_is_that_of_a_neutral_id_with_the_same_events(streamed):
    root, neutral = streamed
    with (
        RocksReader(root / "hostile" / "partition-0") as hostile,
        RocksReader(root / "neutral" / "partition-0") as plain,
    ):
        found, there = hostile.get_many([user.encode() for user in HOSTILE])
        expected, known = plain.get_many([user.encode() for user in neutral])
        assert there.all()
        assert known.all()
        assert [without_id(row) for row in found] == [without_id(row) for row in expected]
        assert len({row.tobytes() for row in found}) == len(HOSTILE)
        walked = dict(hostile.iterate())
        assert sorted(walked) == sorted(user.encode() for user in HOSTILE)
        assert [walked[user.encode()].tobytes() for user in HOSTILE] == [row.tobytes() for row in found]
        assert LAYOUT.rows(found)["owner"].tolist() == [codec.owner(user.encode()) for user in HOSTILE]
        one, other = hostile.progress(), plain.progress()
        assert isinstance(one, Progress)
        assert (
            (one.offset, one.users, one.events)
            == (other.offset, len(HOSTILE), 1_200)
            == (other.offset, other.users, 1_200)
        )


def test_a_query_for_one_id_never_shows_another_users_row(streamed):
    root, neutral = streamed
    with StateReader(root / "hostile") as hostile, StateReader(root / "neutral") as plain:
        for user, same in zip(HOSTILE, neutral, strict=True):
            asked, expected = hostile.query(user), plain.query(same)
            assert (asked.user_id, asked.known) == (user, True)
            assert (asked.ledger, asked.events, asked.mean) == (expected.ledger, expected.events, expected.mean)


def test_an_id_beside_those_that_are_there_is_unknown(streamed):
    with StateReader(streamed[0] / "hostile") as reader:
        for stranger in ("b", "a\0c", "aaa", "x" * 65_534, "../../etc", "layou", "mprogres", "\0\0\0", "E\u0301"):
            assert not reader.query(stranger).known, stranger[:20]


def test_no_file_is_named_after_an_id_and_nothing_is_written_elsewhere(streamed):
    root, _ = streamed
    assert sorted(os.listdir(root)) == ["hostile", "neutral"]
    assert os.listdir(root / "hostile") == ["partition-0"]
    names = os.listdir(root / "hostile" / "partition-0")
    assert [name for name in names if not ROCKSDB_FILES.fullmatch(name)] == []
    assert all(entry.is_file(follow_symlinks=False) for entry in os.scandir(root / "hostile" / "partition-0"))
