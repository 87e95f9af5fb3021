"""A process that dies anywhere and streams again from the start ends with the rows of one clean pass, bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.user_state import HeadKind, RowLayout
from state.memory_store import MemoryUserStore
from state.store import RocksUserStore, UserStore
from streams.processor import Counts, Predictions, Processor
from tests.models import HEADS, offset_of, random_stream, small_model

EVENTS = 300


class Crash(Exception):
    """The process dies."""


class DyingStore(RocksUserStore):
    """Dies at its n-th commit, before anything of it is written."""

    commits_left = 0

    def write_batch(self, users, rows, progress, **more):
        if self.commits_left == 0:
            raise Crash
        self.commits_left -= 1
        return super().write_batch(users, rows, progress, **more)


@cache
def stream() -> Interactions:
    return random_stream(EVENTS, 20, seed=3)


def held(store: UserStore) -> dict[bytes, bytes]:
    return {user: row.tobytes() for user, row in store.iterate()}


@cache
def clean_pass(kind: HeadKind) -> tuple[Predictions, dict[bytes, bytes]]:
    with Processor(small_model(kind), lambda _, layout: MemoryUserStore(layout), StateSettings(ring=4)) as work:
        return work.process(0, stream()), held(work.store(0))


def run(kind: HeadKind, path: Path, commit_events: int, commits: int) -> int:
    """Streams everything until the store dies; returns how many commits became durable."""

    def open_store(partition: int, layout: RowLayout) -> UserStore:
        store = DyingStore(path, layout)
        store.commits_left = commits
        return store

    with Processor(small_model(kind), open_store, StateSettings(commit_events=commit_events, ring=4)) as work:
        try:
            work.process(0, stream())
        except Crash:
            return commits
    return -(-EVENTS // commit_events)


def check_replay(kind: HeadKind, path: Path, commit_events: int, commits: int) -> None:
    survived = min(run(kind, path, commit_events, commits) * commit_events, EVENTS)
    expected, rows = clean_pass(kind)
    state = StateSettings(commit_events=7, ring=4)
    with Processor(small_model(kind), lambda _, layout: RocksUserStore(path, layout), state) as work:
        assert offset_of(work.store(0)) == (int(stream().offset[survived - 1]) if survived else None)
        again = work.process(0, stream())
        assert again.applied.tolist() == [False] * survived + [True] * (EVENTS - survived)
        assert np.isnan(again.logit[:survived]).all()
        np.testing.assert_array_equal(again.logit[survived:], expected.logit[survived:])
        assert held(work.store(0)) == rows
        assert offset_of(work.store(0)) == stream().offset[-1]
        known = len(set(stream().user[:survived].tolist()))
        users = len(set(stream().user.tolist()))
        assert work.counts == Counts(events=EVENTS, skipped=survived, guarded=0, users_created=users - known)


@pytest.mark.parametrize("commits", [0, 1, 3, 100])
@pytest.mark.parametrize("kind", HEADS)
def test_a_replay_from_the_start_after_a_crash_gives_the_rows_of_a_clean_pass(kind, commits, tmp_path):
    check_replay(kind, tmp_path, 64, commits)


@settings(max_examples=15)
@given(kind=st.sampled_from(HEADS), commit_events=st.integers(1, EVENTS), commits=st.integers(0, 12))
def test_so_it_does_wherever_the_crash_came(kind, commit_events, commits):
    with TemporaryDirectory() as directory:
        check_replay(kind, Path(directory), commit_events, commits)
